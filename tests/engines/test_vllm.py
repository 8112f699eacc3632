"""vLLM's CPU build: with stratakv it says, token by token, what it says without it.

Models have random weights, large enough that an answer depends on the whole prompt, or are SmolLM2. The reference is
the same engine without the connector. `test_wrong_...` shows that wrong keys and values change what is said.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engines.vllm_engine import damage

pytest.importorskip("vllm")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from stratakv.events import Removed, Stored, Subscriber  # noqa: E402 (after the skips)

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

ENGINE = Path(__file__).with_name("vllm_engine.py")
VOCABULARY = 512
BLOCK = 32


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("model") / "llama")


def llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**settings | changes)
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs vLLM. LMCache, once imported, has all processes count in files that they share."""
    out = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | more
    out.pop("PROMETHEUS_MULTIPROC_DIR", None)
    return out


def run(job: dict[str, Any], *, fails: bool = False, timeout_s: float = 300) -> Any:
    """What came of a job; of one that fails, what it said."""
    done = subprocess.run(
        [sys.executable, str(ENGINE)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment(),
    )
    if fails:
        assert done.returncode, done.stdout
        return done.stdout + done.stderr
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"said": done.stdout + done.stderr}


def connector(folder: Path | None, ram: str = "256MiB", **more: Any) -> dict[str, Any]:
    ssd = (
        {"enabled": False}
        if folder is None
        else {"path": str(folder), "capacity_bytes": "512MiB", "segment_bytes": "8MiB"}
    )
    return {
        "kv_connector": "StrataConnector",
        "kv_connector_module_path": "stratakv.integrations.vllm",
        "kv_connector_extra_config": {"ram": {"capacity_bytes": ram}, "ssd": ssd, **more},
    }


def conversation(count: int = 32, seed: int = 1, vocabulary: int = VOCABULARY) -> list[dict[str, Any]]:
    """Prompts that share prefixes by eights, of many lengths."""
    draw = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(10, vocabulary) for _ in range(n)]

    shared = [ids(draw.choice((64, 100, 160, 224))) for _ in range(max(count // 8, 1))]
    return [{"ids": shared[n % len(shared)] + ids(draw.randrange(5, 120))} for n in range(count)]


def failures(out: dict[str, Any]) -> int:
    return int(out["metrics"]["vllm:stratakv_failed_tokens"])


@pytest.fixture(scope="session")
def prompts() -> list[dict[str, Any]]:
    return conversation()


@pytest.fixture(scope="session")
def expected(model: Path, prompts: list[dict[str, Any]]) -> list[list[int]]:
    """What the engine says without the connector and without its own prefix cache."""
    out = run({"model": str(model), "engine": {"enable_prefix_caching": False}, "rounds": [{"prompts": prompts}]})
    tokens: list[list[int]] = out["rounds"][0]["tokens"]
    # The model is no parrot: what it says depends on the prompt.
    assert len({tuple(each) for each in tokens}) == len(prompts)
    return tokens


@pytest.mark.parametrize("own_cache", [False, True], ids=["without_its_prefix_cache", "with_its_prefix_cache"])
def test_32_requests_at_once_say_the_same_cold_warm_and_after_a_restart(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path, own_cache: bool
) -> None:
    # In few tokens a step, so that prompts are computed in parts, and in few blocks, so that requests are preempted.
    engine = {"enable_prefix_caching": own_cache, "max_num_batched_tokens": 128, "max_num_seqs": 32}
    few = engine | {"num_gpu_blocks_override": 40, "max_model_len": 512}
    job = {"model": str(model), "connector": connector(tmp_path), "engine": engine}
    cold = run(job | {"rounds": [{"prompts": prompts}, {"prompts": prompts}]})
    assert [each["tokens"] for each in cold["rounds"]] == [expected] * 2
    if not own_cache:
        assert sum(cold["rounds"][1]["cached"]) > 0.7 * sum(len(each["ids"]) for each in prompts)
    assert failures(cold) == 0

    restarted = run(job | {"engine": few, "rounds": [{"prompts": prompts}]})
    assert restarted["rounds"][0]["tokens"] == expected
    assert restarted["metrics"]["vllm:num_preemptions"] > 0
    # What the engine's own cache has is not asked for.
    least = 0.2 if own_cache else 0.7
    assert restarted["metrics"]["vllm:stratakv_hit_tokens"] > least * sum(len(each["ids"]) for each in prompts)
    assert failures(restarted) == 0


def test_wrong_keys_and_values_would_show(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    """The oracle sees what it must: a model of other weights leaves its blocks under this one's name."""
    other = llama(tmp_path / "llama", seed=1)
    same = connector(tmp_path / "store", weights_version="the same")
    job = {"engine": {"enable_prefix_caching": False}, "rounds": [{"prompts": prompts}], "connector": same}
    run(job | {"model": str(other)})
    # Said to be the same, the other model is found, and says what is wrong. Told apart by its weights, it is not.
    wrong = run(job | {"model": str(model)})
    assert wrong["rounds"][0]["cached"][0] > 0
    assert wrong["rounds"][0]["tokens"] != expected
    right = run(job | {"model": str(model), "connector": connector(tmp_path / "store")})
    assert right["rounds"][0]["cached"][0] == 0
    assert right["rounds"][0]["tokens"] == expected


def test_damaged_records_little_ram_and_drops_in_mid_flight_cost_time_and_no_token(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    engine = {"enable_prefix_caching": False, "max_num_batched_tokens": 256}
    job = {"model": str(model), "engine": engine, "rounds": [{"prompts": prompts}]}
    first = run(job | {"connector": connector(tmp_path)})
    assert first["rounds"][0]["tokens"] == expected

    # Every third record or so is damaged while they are served, in a store whose RAM holds half of them; and at rest.
    rounds = [{"prompts": prompts}, {"prompts": prompts, "damage": [str(tmp_path), 150_000]}, {"prompts": prompts}]
    little = run(job | {"connector": connector(tmp_path, ram="4MiB"), "rounds": rounds})
    assert [each["tokens"] for each in little["rounds"]] == [expected] * 3
    assert failures(little) > 0
    assert little["metrics"]["vllm:stratakv_loaded_tokens"] > 0
    assert damage(tmp_path, 330_000) > 20
    damaged = run(job | {"connector": connector(tmp_path)})
    assert damaged["rounds"][0]["tokens"] == expected

    # All of it is forgotten many times a second: between a match and its load, too.
    rounds = [{"prompts": prompts, "drop_every_s": 0.03}] * 3
    dropped = run(job | {"connector": connector(tmp_path), "rounds": rounds})
    assert [each["tokens"] for each in dropped["rounds"]] == [expected] * 3
    assert dropped["metrics"]["vllm:stratakv_hit_tokens"] > 0


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_what_passes_memory_in_between_as_on_a_device_is_the_same(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path, layer_by_layer: bool
) -> None:
    options = connector(tmp_path, staging=True, layer_by_layer=layer_by_layer)
    job = {"model": str(model), "engine": {"enable_prefix_caching": False}, "connector": options}
    out = run(job | {"rounds": [{"prompts": prompts, "wait_s": 0.5}, {"prompts": prompts}]})
    assert [each["tokens"] for each in out["rounds"]] == [expected] * 2
    assert sum(out["rounds"][1]["cached"]) > 0.7 * sum(len(each["ids"]) for each in prompts)
    assert failures(out) == 0
    # And in a store that was written in place.
    again = run(job | {"connector": connector(tmp_path), "rounds": [{"prompts": prompts}]})
    assert again["rounds"][0]["tokens"] == expected
    assert sum(again["rounds"][0]["cached"]) > 0.7 * sum(len(each["ids"]) for each in prompts)


def test_nothing_is_shared_between_salts(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    salted = [prompt | {"salt": "alice"} for prompt in prompts[:8]]
    other = [prompt | {"salt": "bob"} for prompt in prompts[:8]]
    job = {"model": str(model), "connector": connector(tmp_path), "engine": {"enable_prefix_caching": False}}
    rounds = [{"prompts": each} for each in (salted, other, prompts[:8], salted)]
    # After new weights nothing of before is found, in another process neither.
    out = run(job | {"rounds": [*rounds, {"prompts": salted, "reset": True}, {"prompts": salted}]})
    assert [each["tokens"] for each in out["rounds"]] == [expected[:8]] * 6
    assert [each["cached"][0] > 0 for each in out["rounds"]] == [False, False, False, True, True, False]
    after = run(job | {"rounds": [{"prompts": salted}]})
    assert after["rounds"][0]["cached"][0] == 0


def test_two_ranks_in_processes_of_their_own_give_one_answer(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    job = {"model": str(model), "processes": True, "connector": connector(tmp_path)}
    job["engine"] = {"enable_prefix_caching": False, "tensor_parallel_size": 2, "max_num_batched_tokens": 256}
    out = run(job | {"rounds": [{"prompts": prompts[:16]}, {"prompts": prompts[:16]}]})
    assert [each["tokens"] for each in out["rounds"]] == [expected[:16]] * 2
    assert sum(out["rounds"][1]["cached"]) > 0.7 * sum(len(each["ids"]) for each in prompts[:16])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rank-0-of-2", "rank-1-of-2"]
    # One rank has lost half of what it had: what both have is loaded.
    damage(tmp_path / "rank-1-of-2", 120_000)
    again = run(job | {"rounds": [{"prompts": prompts[:16]}]})
    assert again["rounds"][0]["tokens"] == expected[:16]
    assert 0 < sum(again["rounds"][0]["cached"]) < sum(out["rounds"][1]["cached"])


def adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of random weights."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj", "v_proj"]}))
    tensors = {}
    for layer in range(3):
        for name, rows in (("q_proj", 128), ("v_proj", 64)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn((8, 128), generator=generator) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn((rows, 8), generator=generator) * 0.3
    safetensors.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_share_nothing_and_one_with_new_weights_under_its_old_name_neither(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    folders = [adapter(tmp_path / f"adapter{n}", n) for n in (1, 2)]
    with_lora = [
        [prompt | {"lora": {"name": "a", "id": n, "path": str(folder)}} for prompt in prompts[:8]]
        for n, folder in enumerate(folders, 1)
    ]
    engine = {"enable_prefix_caching": False, "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    job = {"model": str(model), "engine": engine, "rounds": [{"prompts": each} for each in (*with_lora, prompts[:8])]}
    alone = run(job)
    said = [each["tokens"] for each in alone["rounds"]]
    assert said[0] != said[1] != said[2] == expected[:8]
    out = run(job | {"connector": connector(tmp_path / "store")})
    assert [each["tokens"] for each in out["rounds"]] == said
    assert [each["cached"][0] for each in out["rounds"]] == [0, 0, 0]
    again = run(job | {"connector": connector(tmp_path / "store")})
    assert [each["tokens"] for each in again["rounds"]] == said
    assert all(each["cached"][0] > 0 for each in again["rounds"])


def test_events_tell_what_is_stored_and_what_is_gone(
    model: Path, prompts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Heard as the router hears any engine."""
    endpoint = f"ipc://{tmp_path}/events"
    heard: list[object] = []
    over = threading.Event()

    def listen() -> None:
        with Subscriber(endpoint, topic="kv") as subscriber:
            while not over.is_set():
                heard.extend(subscriber.poll(0.1))
            heard.extend(subscriber.poll(0.5))

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        job = {
            "model": str(model),
            "connector": connector(tmp_path / "store", save_decoded=False),
            "engine": {"enable_prefix_caching": False},
        }
        job["events"] = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoint,
            "topic": "kv",
        }
        job["rounds"] = [
            {"prompts": prompts[:4], "wait_s": 1.1},
            {"prompts": prompts[4:5], "drop": True, "wait_s": 1.1},
            {"prompts": prompts[5:6], "wait_s": 0.5},
        ]
        run(job)
    finally:
        over.set()
        listener.join()
    held: dict[object, tuple[int, ...]] = {}
    removed = 0
    for event in heard:
        if isinstance(event, Stored) and event.place == "ram":
            assert not held.keys() & set(event.names)
            held |= {name: tuple(event.tokens) for name in event.names}
        elif isinstance(event, Removed) and event.place == "ram":
            removed += len([held.pop(name) for name in event.names])

    def blocks(of: list[dict[str, Any]]) -> set[tuple[int, ...]]:
        """Whole blocks, told by the prompt up to their end."""
        return {tuple(p["ids"][: n + BLOCK]) for p in of for n in range(0, len(p["ids"]) - BLOCK + 1, BLOCK)}

    # What was forgotten is gone but for what came again at once; what is held is told by its tokens.
    assert removed == len(blocks(prompts[:4]) - blocks(prompts[4:5]))
    assert sorted(held.values()) == sorted(block[-BLOCK:] for block in blocks(prompts[4:6]))


def test_loads_that_never_come_cost_no_token_and_end_with_drafts_too(
    model: Path, prompts: list[dict[str, Any]], expected: list[list[int]], tmp_path: Path
) -> None:
    """No load is let through by the quota: whatever is found is computed, and what is saved beside it is right."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engine = {"enable_prefix_caching": False, "speculative_config": drafts, "max_num_batched_tokens": 256}
    job = {"model": str(model), "engine": engine, "rounds": [{"prompts": prompts}]}
    refused = connector(tmp_path, quotas={"models": {"llama": {"loads": 0}}})
    out = run(job | {"connector": refused})
    assert out["rounds"][0]["tokens"] == expected
    assert failures(out) > 0
    assert out["metrics"]["vllm:stratakv_loaded_tokens"] == 0
    again = run(job | {"connector": connector(tmp_path)})
    assert again["rounds"][0]["tokens"] == expected
    assert again["metrics"]["vllm:stratakv_loaded_tokens"] > 0
    assert failures(again) == 0
