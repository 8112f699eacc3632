"""Models are found by what their files say, with the shape that their engines use; what cannot be cached says why."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stratakv
from stores import config, kv_of, loaded, tokens_of
from stratakv import cli
from stratakv.registry import of_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0},
}  # fmt: skip


def write_weights(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    kinds = {"float32": "F32", "float16": "F16", "uint8": "U8"}
    header, at = {}, 0
    for key, value in tensors.items():
        header[key] = {"dtype": kinds[str(value.dtype)], "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    body = b"".join(value.tobytes() for value in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder / name


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    small = LLAMA | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "head_dim": 8, "torch_dtype": "float32"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(small | changes))
    weight = np.random.default_rng(seed).random((16, 32), np.float32)
    write_weights(folder, {"model.layers.0.self_attn.k_proj.weight": weight})
    return folder


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (LLAMA, (16, 2, 8, 64, "bf16")),
        # Qwen2.5-7B: no head_dim; a window that is switched off.
        (
            {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
             "num_key_value_heads": 4, "sliding_window": 131072, "use_sliding_window": False, "dtype": "bfloat16"},
            (28, 2, 4, 128, "bf16"),
        ),
        # DeepSeek-V2-Lite: one latent vector of 512 and 64 with positions.
        (
            {"model_type": "deepseek_v2", "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512,
             "qk_rope_head_dim": 64, "hidden_size": 2048, "torch_dtype": "bfloat16"},
            (27, 1, 1, 576, "bf16"),
        ),
        # GPT-2, by its own names, in which every head has keys and values.
        ({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "torch_dtype": "float32"},
         (12, 2, 12, 64, "fp32")),
        ({"model_type": "falcon", "num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544,
          "multi_query": True, "torch_dtype": "float16"}, (32, 2, 1, 64, "fp16")),
        # What a model of text and images says of its text, and of itself.
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
             "text_config": {"model_type": "x", "num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64,
                             "layer_types": ["full_attention"] * 4}},
            (4, 2, 8, 8, "bf16"),
        ),
        ({"model_type": "mistral", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
          "hidden_size": 4096, "sliding_window": None, "torch_dtype": "bfloat16"}, (32, 2, 8, 128, "bf16")),
    ],
)  # fmt: skip
def test_a_configuration_tells_the_geometry(about: dict[str, Any], expected: tuple[object, ...]) -> None:
    g = of_config(about)
    assert (g.layers, g.planes, g.kv_heads, g.head_dim, g.dtype) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 8}, "8 of 16 layers of llama are sliding_attention"),
        ({"layer_types": ["linear_attention"] * 16}, "16 of 16 layers of llama are linear_attention"),
        ({"sliding_window": 4096, "max_position_embeddings": 32768}, "sliding window of 4096 tokens"),
        ({"mamba_d_state": 16}, "keep a state .mamba_d_state."),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic rotary positions"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "generates no text"),
        ({"use_bidirectional_attention": True}, "attends to later tokens"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many', expected a positive integer"),
        ({"head_dim": None, "hidden_size": 2050}, "no multiple of 32 heads"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn', expected one of float32"),
        ({"torch_dtype": None}, "give dtype"),
    ],
)
def test_what_cannot_be_cached_says_why(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(stratakv.InputError, match=says):
        of_config({key: value for key, value in (LLAMA | changes).items() if value is not None})


def test_every_model_of_a_folder_is_found_whatever_is_wrong_with_others(tmp_path: Path) -> None:
    write_model(tmp_path / "one")
    write_model(tmp_path / "deeper" / "two", num_hidden_layers=3)
    write_model(tmp_path / "window", sliding_window=128)
    write_model(tmp_path / "mismatch", num_key_value_heads=4)
    (write_model(tmp_path / "broken") / "config.json").write_text("{")
    (write_model(tmp_path / "list") / "config.json").write_text("[]")
    (write_model(tmp_path / "none") / "config.json").unlink()
    (write_model(tmp_path / "cut") / "model.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "empty").mkdir()
    found = stratakv.discover(tmp_path, block_tokens=32)
    assert [(model.name, model.geometry.layers) for model in found.models] == [("deeper/two", 3), ("one", 2)]
    assert all(model.geometry.block_tokens == 32 and model.weights_bytes > 2048 for model in found.models)
    reasons = {refused.name: refused.reason for refused in found.refused}
    assert reasons.keys() == {"window", "mismatch", "broken", "list", "none", "cut"}
    assert "sliding window of 128" in reasons["window"]
    assert "has 16 rows, but config.json tells of 32" in reasons["mismatch"]
    assert "config.json cannot be read" in reasons["broken"]
    assert "expected an object" in reasons["list"]
    assert "there is no config.json" in reasons["none"]
    assert "is no safetensors file" in reasons["cut"]
    with pytest.raises(stratakv.InputError, match="there is no such folder"):
        stratakv.discover(tmp_path / "nowhere")
    assert [model.name for model in stratakv.discover(tmp_path / "one").models] == ["one"]


def test_the_command_lists_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "one")
    assert cli.main(["models", str(tmp_path)]) == 0
    assert "one: 2 layers, 2 kv heads x 8, fp32, 0.25 KiB a token" in capsys.readouterr().out
    write_model(tmp_path / "window", sliding_window=128)
    assert cli.main(["models", str(tmp_path)]) == 1
    assert "window: cannot be cached: llama has a sliding window" in capsys.readouterr().out
    assert cli.main(["models", str(tmp_path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    [one], [window] = said["models"], said["refused"]
    assert (one["name"], one["path"], one["geometry"]["layers"]) == ("one", str(tmp_path / "one"), 2)
    assert (window["name"], "sliding window" in window["reason"]) == ("window", True)
    assert cli.main(["models", str(tmp_path / "nowhere")]) == 2


def test_a_hugging_face_cache_has_names_and_digests_of_its_own(tmp_path: Path) -> None:
    model = tmp_path / "models--meta--llama-1b"
    for revision in ("aaaa", "bbbb"):
        folder = write_model(model / "snapshots" / revision, num_hidden_layers=2 if revision == "aaaa" else 5)
        blob = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        (model / "blobs").mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(model / "blobs" / blob)
        (folder / "model.safetensors").symlink_to(Path("../../blobs") / blob)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("aaaa")
    (found,) = stratakv.discover(tmp_path).models
    assert (found.name, found.geometry.layers) == ("meta/llama-1b", 2)
    plain = write_model(tmp_path / "plain")
    (copy,) = stratakv.discover(plain).models
    assert copy.weights_version() == found.weights_version(), "the same bytes, read here and named there"


def test_weights_that_differ_in_one_byte_are_another_version(tmp_path: Path) -> None:
    (before,) = stratakv.discover(write_model(tmp_path / "one")).models
    version = before.weights_version()
    file = tmp_path / "one" / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    (after,) = stratakv.discover(tmp_path / "one").models
    assert after.geometry == before.geometry
    assert after.weights_version() != version


def test_a_folder_is_followed_as_it_changes(tmp_path: Path) -> None:
    models, tokens = tmp_path / "models", tokens_of(1, 32)
    for name in ("stays", "changes", "goes"):
        write_model(models / name)
    with stratakv.open(config(tmp_path / "store", ram="16MiB")) as caches:
        own = caches.register("own", stratakv.Geometry(layers=1, kv_heads=1, head_dim=8, dtype="fp32"))
        found = caches.load_models(models)
        assert sorted(model.name for model in found.models) == ["changes", "goes", "stays"]
        for name in ("stays", "changes", "goes"):
            cache = caches[name]
            assert cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND") == 32
        stays = caches["stays"]
        write_model(models / "changes", seed=1)
        for file in (models / "goes").iterdir():
            file.unlink()
        (models / "goes").rmdir()
        write_model(models / "comes")
        (write_model(models / "wrong") / "config.json").write_text("{")
        found = caches.load_models(models)
        assert sorted(model.name for model in found.models) == ["changes", "comes", "stays"]
        assert [refused.name for refused in found.refused] == ["wrong"]
        assert sorted(caches) == ["changes", "comes", "own", "stays"]
        assert caches["stays"] is stays
        assert caches["own"] is own
        assert loaded(stays, tokens)[1].loaded_tokens == 32
        assert loaded(caches["changes"], tokens)[1].loaded_tokens == 0, "it has other weights"
        # What cannot be read for a moment stays as it is.
        text = (models / "stays" / "config.json").read_text()
        (models / "stays" / "config.json").write_text("{")
        assert "stays" in {refused.name for refused in caches.load_models(models).refused}
        assert loaded(stays, tokens)[1].loaded_tokens == 32
        (models / "stays" / "config.json").write_text(text)
        assert "stays" in {model.name for model in caches.load_models(models).models}
        assert loaded(caches["stays"], tokens)[1].loaded_tokens == 32


def test_a_model_that_grew_too_large_is_listed_once_with_the_reason(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "one")
    with stratakv.open(config(None)) as caches:
        assert [model.name for model in caches.load_models(tmp_path / "models").models] == ["one"]
        for file in (tmp_path / "models" / "one").iterdir():
            file.unlink()
        (tmp_path / "models" / "one" / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4000}))
        found = caches.load_models(tmp_path / "models")
        assert (found.models, [refused.name for refused in found.refused]) == ((), ["one"])
        assert list(caches) == []


def test_a_model_that_does_not_fit_the_tiers_is_refused_and_the_others_are_there(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "small")
    large = tmp_path / "models" / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4000}))
    with stratakv.open(config(None)) as caches:
        found = caches.load_models(tmp_path / "models")
        assert [model.name for model in found.models] == ["small"]
        assert "below one block" in found.refused[0].reason
        assert list(caches) == ["small"]


def test_weights_tell_their_version_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(stratakv.InputError, match=r"no weights there, expected \*\.safetensors"):
        stratakv.weights_version(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    version = stratakv.weights_version(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert len(version) == 32
    assert stratakv.weights_version(tmp_path) != version
