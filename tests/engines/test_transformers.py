"""transformers: with the cache, a model says what it says without it, wherever the keys and values came from.

The models have random weights, large enough that an answer depends on the whole prompt; `test_wrong_...` shows that it
does. In fp32 the reference is the plain uncached run. In bf16 it is the uncached run with the same prefill split: there
a prompt computed in two parts need not give the bits that it gives in one, with or without a cache.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import stratakv  # noqa: E402 (after the skips)
from llamas import BLOCK, GREEDY, PROMPT_TOKENS, llama, prompt, settings  # noqa: E402
from stratakv.demo.report import Report, Turn  # noqa: E402
from stratakv.integrations.transformers import Restored, generate, geometry, restore, store  # noqa: E402

pytestmark = [
    pytest.mark.engines,
    # torch and transformers warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]


def split_run(model: Any, input_ids: Any, split: int, **options: Any) -> Any:
    """Without any cache of ours: the first `split` tokens in one forward pass, the rest in another, then generation."""
    past_key_values = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids[:, :split], past_key_values=past_key_values)
        return model.generate(input_ids, past_key_values=past_key_values, **GREEDY, **options)


def put_prefix(model: Any, cache: stratakv.ModelCache, input_ids: Any, split: int) -> None:
    past_key_values = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids[:, :split], past_key_values=past_key_values)
    assert store(cache, input_ids[:, :split], past_key_values) == split


def watched(model: Any, cache: stratakv.ModelCache, input_ids: Any, **options: Any) -> tuple[Any, Restored]:
    """The output, and what it was restored from."""
    found: list[Restored] = []
    output = generate(model, cache, input_ids, on_restored=found.append, **{**GREEDY, **options})
    return output, found[0]


def test_the_geometry_is_the_models() -> None:
    found = geometry(llama(dtype=torch.bfloat16), block_tokens=32)
    assert found == stratakv.Geometry(layers=3, kv_heads=2, head_dim=16, dtype="bf16", block_tokens=32)


def test_the_first_answer_is_the_uncached_one(model: Any, cache: stratakv.ModelCache) -> None:
    output, restored = watched(model, cache, prompt())
    assert restored.tokens == 0
    assert torch.equal(output, model.generate(prompt(), **GREEDY))


def test_from_ram_the_answer_is_the_uncached_one(model: Any, cache: stratakv.ModelCache) -> None:
    generate(model, cache, prompt(), **GREEDY)
    output, restored = watched(model, cache, prompt())
    assert restored.tokens == (PROMPT_TOKENS - 1) // BLOCK * BLOCK
    assert set(restored.explanation.blocks) == {"ram"}
    assert torch.equal(output, model.generate(prompt(), **GREEDY))


def test_from_ssd_the_answer_is_the_uncached_one(model: Any, tmp_path: Path) -> None:
    with stratakv.open(settings(tmp_path)) as caches:
        generate(model, caches.register("llama", geometry(model)), prompt(), **GREEDY)
        caches.flush()
    with stratakv.open(settings(tmp_path)) as caches:
        output, restored = watched(model, caches.register("llama", geometry(model)), prompt())
    assert restored.tokens == (PROMPT_TOKENS - 1) // BLOCK * BLOCK
    assert set(restored.explanation.blocks) == {"ssd"}
    assert torch.equal(output, model.generate(prompt(), **GREEDY))


def test_with_too_little_ram_answers_are_the_uncached_ones(model: Any, tmp_path: Path) -> None:
    prompts = [prompt(1200, seed) for seed in range(4)]
    expected = [model.generate(each, **GREEDY) for each in prompts]
    tiers = set()
    with stratakv.open(settings(tmp_path, ram="2MiB")) as caches:
        cache = caches.register("llama", geometry(model))
        for _ in range(2):
            for each, wanted in zip(prompts, expected, strict=True):
                output, restored = watched(model, cache, each)
                caches.flush()
                tiers |= set(restored.explanation.blocks)
                assert torch.equal(output, wanted)
    assert "ssd" in tiers


SERVE_UNTIL_KILLED = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[2])
import stratakv, test_transformers as here
model = here.llama()
with stratakv.open(here.settings(here.Path(sys.argv[1]))) as caches:
    cache = caches.register("llama", here.geometry(model))
    here.generate(model, cache, here.prompt(), **here.GREEDY)
    caches.flush()
    print("durable", flush=True)
    while True:
        here.generate(model, cache, here.prompt(seed=os.urandom(1)[0] + 2), **here.GREEDY)
"""


def test_after_a_sigkill_the_answer_is_the_uncached_one(model: Any, tmp_path: Path) -> None:
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", SERVE_UNTIL_KILLED, str(tmp_path), paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "durable\n"
        process.send_signal(signal.SIGKILL)
    with stratakv.open(settings(tmp_path)) as caches:
        output, restored = watched(model, caches.register("llama", geometry(model)), prompt())
    assert restored.tokens == (PROMPT_TOKENS - 1) // BLOCK * BLOCK
    assert torch.equal(output, model.generate(prompt(), **GREEDY))


@pytest.mark.parametrize("reopened", [False, True], ids=["ram", "ssd"])
def test_in_bf16_the_answer_is_that_of_the_same_prefill_split(tmp_path: Path, reopened: bool) -> None:
    model, split = llama(dtype=torch.bfloat16), 96
    logits = {"return_dict_in_generate": True, "output_logits": True}
    caches = stratakv.open(settings(tmp_path))
    cache = caches.register("llama", geometry(model))
    put_prefix(model, cache, prompt(), split)
    if reopened:
        caches.flush()
        caches.close()
        caches = stratakv.open(settings(tmp_path))
        cache = caches.register("llama", geometry(model))
    with caches:
        output, restored = watched(model, cache, prompt(), **logits)
    assert restored.tokens == split
    assert set(restored.explanation.blocks) == {"ssd" if reopened else "ram"}
    expected = split_run(model, prompt(), split, **logits)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.logits, expected.logits, strict=True))


def test_restored_keys_and_values_are_the_computed_bits(model: Any, cache: stratakv.ModelCache) -> None:
    computed = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt(), past_key_values=computed)
    store(cache, prompt(), computed)
    restored = restore(cache, prompt())
    assert restored.past_key_values.get_seq_length() == restored.tokens == PROMPT_TOKENS // BLOCK * BLOCK
    for ours, theirs in zip(restored.past_key_values.layers, computed.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, : restored.tokens])
        assert torch.equal(ours.values, theirs.values[:, :, : restored.tokens])


def test_wrong_keys_and_values_would_change_the_answer(model: Any, cache: stratakv.ModelCache) -> None:
    generate(model, cache, prompt(), **GREEDY)
    restored = restore(cache, prompt())
    for layer in restored.past_key_values.layers:
        layer.keys[:, :, :BLOCK], layer.values[:, :, :BLOCK] = 0, 0
    output = model.generate(prompt(), past_key_values=restored.past_key_values, **GREEDY)
    assert not torch.equal(output, model.generate(prompt(), **GREEDY))


def test_the_next_turn_reuses_the_generated_tokens(model: Any, cache: stratakv.ModelCache) -> None:
    first = generate(model, cache, prompt(), **{**GREEDY, "max_new_tokens": 40})
    second_prompt = torch.cat([first, prompt(20, seed=2)], dim=1)
    output, restored = watched(model, cache, second_prompt)
    assert restored.tokens == (first.shape[1] - 1) // BLOCK * BLOCK > PROMPT_TOKENS
    assert torch.equal(output, model.generate(second_prompt, **GREEDY))


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(model: Any, cache: stratakv.ModelCache) -> None:
    exactly = prompt(8 * BLOCK)
    generate(model, cache, exactly, **GREEDY)
    output, restored = watched(model, cache, exactly)
    assert restored.tokens == 7 * BLOCK
    assert torch.equal(output, model.generate(exactly, **GREEDY))


@pytest.mark.parametrize("tokens", [1, 2, BLOCK, BLOCK + 1])
def test_a_short_prompt_is_answered_as_without_the_cache(model: Any, cache: stratakv.ModelCache, tokens: int) -> None:
    for _ in range(2):
        output, restored = watched(model, cache, prompt(tokens))
        assert restored.tokens in (0, (tokens - 1) // BLOCK * BLOCK)
        assert torch.equal(output, model.generate(prompt(tokens), **GREEDY))


def test_users_with_the_same_prefix_share_it_and_get_their_own_answers(model: Any, cache: stratakv.ModelCache) -> None:
    shared = prompt(128)
    generate(model, cache, torch.cat([shared, prompt(10, seed=3)], dim=1), **GREEDY)
    for seed in (4, 5):
        asked = torch.cat([shared, prompt(30, seed=seed)], dim=1)
        output, restored = watched(model, cache, asked)
        assert restored.tokens == 128
        assert torch.equal(output, model.generate(asked, **GREEDY))


def test_sampling_draws_what_it_draws_without_the_cache(model: Any, cache: stratakv.ModelCache) -> None:
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 20, "pad_token_id": 0}
    generate(model, cache, prompt(), **sampled)
    torch.manual_seed(7)
    output = generate(model, cache, prompt(), **sampled)
    torch.manual_seed(7)
    assert torch.equal(output, model.generate(prompt(), **sampled))


def test_an_output_object_comes_back_as_asked(model: Any, cache: stratakv.ModelCache) -> None:
    output = generate(model, cache, prompt(), **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, model.generate(prompt(), **GREEDY))
    assert len(output.scores) == GREEDY["max_new_tokens"]


def test_a_mask_that_hides_nothing_is_welcome(model: Any, cache: stratakv.ModelCache) -> None:
    for _ in range(2):
        output = generate(model, cache, prompt(), attention_mask=torch.ones_like(prompt()), **GREEDY)
        assert torch.equal(output, model.generate(prompt(), **GREEDY))


@pytest.mark.parametrize("other", [{"adapter": "lora"}, {"tenant": "other"}])
def test_nothing_is_shared_across_adapters_and_tenants(
    model: Any, cache: stratakv.ModelCache, other: dict[str, str]
) -> None:
    generate(model, cache, prompt(), **GREEDY)
    assert restore(cache, prompt(), **other).tokens == 0
    generate(model, cache, prompt(), **GREEDY, **other)
    assert restore(cache, prompt(), **other).tokens > 0


def test_other_weights_never_hit(model: Any, caches: stratakv.CacheManager) -> None:
    one = caches.register("llama-1", geometry(model), weights_version="1")
    generate(model, one, prompt(), **GREEDY)
    assert restore(one, prompt()).tokens > 0
    caches.flush()
    assert restore(caches.register("llama-2", geometry(model), weights_version="2"), prompt()).tokens == 0


def test_after_a_restart_with_other_weights_nothing_hits(model: Any, tmp_path: Path) -> None:
    with stratakv.open(settings(tmp_path)) as caches:
        generate(model, caches.register("llama", geometry(model), weights_version="1"), prompt(), **GREEDY)
        caches.flush()
    other = llama(seed=9)
    with stratakv.open(settings(tmp_path)) as caches:
        output, restored = watched(other, caches.register("llama", geometry(other), weights_version="2"), prompt())
    assert restored.tokens == 0
    assert torch.equal(output, other.generate(prompt(), **GREEDY))


def test_a_damaged_segment_costs_reuse_and_never_the_answer(model: Any, tmp_path: Path) -> None:
    with stratakv.open(settings(tmp_path)) as caches:
        generate(model, caches.register("llama", geometry(model)), prompt(), **GREEDY)
        caches.flush()
    expected = model.generate(prompt(), **GREEDY)
    intact = (PROMPT_TOKENS - 1) // BLOCK * BLOCK
    keys = restore_after_reopening(model, tmp_path)
    assert keys.tokens == intact
    # The stored bits of one key in the middle of the prompt: where they stand on disk is found, not assumed.
    needle = keys.past_key_values.layers[1].keys[0, 0, 5 * BLOCK].numpy().tobytes()
    hits = 0
    for path in (each for each in tmp_path.rglob("*") if each.is_file()):
        content = bytearray(path.read_bytes())
        at = content.find(needle)
        while at >= 0:
            hits += 1
            content[at] ^= 0x10
            at = content.find(needle, at + 1)
        path.write_bytes(content)
    assert hits
    with stratakv.open(settings(tmp_path)) as caches:
        output, restored = watched(model, caches.register("llama", geometry(model)), prompt())
    assert restored.tokens == 5 * BLOCK
    assert restored.explanation.reason == "corrupt"
    assert torch.equal(output, expected)


def restore_after_reopening(model: Any, folder: Path) -> Restored:
    with stratakv.open(settings(folder)) as caches:
        return restore(caches.register("llama", geometry(model)), prompt())


def test_a_closed_cache_costs_prefill_and_a_line_in_the_log(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stratakv.open(settings(tmp_path)) as caches:
        cache = caches.register("llama", geometry(model))
    with caplog.at_level(logging.WARNING):
        output, restored = watched(model, cache, prompt())
    assert restored.tokens == 0
    assert torch.equal(output, model.generate(prompt(), **GREEDY))
    assert "not restored" in caplog.text
    assert "not put" in caplog.text


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def refused_models() -> list[Any]:
    small_rope = {"rope_theta": 10000.0}
    long = {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 128}
    return [
        pytest.param("MistralConfig", {"sliding_window": 64}, "DynamicSlidingWindowLayer", id="sliding"),
        pytest.param(
            "Gemma2Config",
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
            "sliding_attention",
            id="alternating",
        ),
        pytest.param(
            "Gemma3TextConfig",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
            "layer 1 .*sliding_attention",
            id="gemma3",
        ),
        pytest.param(
            "Qwen3NextConfig",
            {"layer_types": ["linear_attention", "full_attention"]},
            "linear_attention",
            id="linear",
        ),
        pytest.param(
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **small_rope}},
            "dynamic",
            id="dynamic-rope",
        ),
        pytest.param(
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "longrope", **small_rope, **long}},
            "longrope",
            id="longrope",
        ),
    ]


@pytest.mark.parametrize(("kind", "changes", "said"), refused_models())
def test_a_model_that_is_not_plain_full_attention_is_refused(kind: str, changes: dict[str, Any], said: str) -> None:
    config = getattr(transformers, kind)(**{**SMALL, **changes})
    refused = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(stratakv.InputError, match=said):
        geometry(refused)


def test_latent_attention_is_refused() -> None:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    names = {**SMALL, **latent, "num_key_value_heads": 2, "n_routed_experts": 2, "first_k_dense_replace": 2}
    refused = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**names))
    with pytest.raises(stratakv.InputError, match="latent"):
        geometry(refused)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(stratakv.InputError, match="encoder-decoder"):
        geometry(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_a_sliding_window_is_not_refused() -> None:
    config = transformers.MistralConfig(**SMALL, sliding_window=None)
    found = geometry(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    assert found == stratakv.Geometry(layers=2, kv_heads=1, head_dim=16, dtype="fp32")


def test_a_quantized_cache_is_not_stored(model: Any, cache: stratakv.ModelCache) -> None:
    class Quantized(transformers.DynamicCache):
        """Any cache that is more than its kind says."""

    with pytest.raises(stratakv.InputError, match="Quantized"):
        store(cache, prompt(), Quantized())


def test_a_cache_with_other_layers_is_not_stored(model: Any, cache: stratakv.ModelCache) -> None:
    sliding = transformers.DynamicCache(config=transformers.MistralConfig(**{**SMALL, "num_hidden_layers": 3}))
    for layer in range(3):
        sliding.update(torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32, 16), layer)
    with pytest.raises(stratakv.InputError, match="DynamicSlidingWindowLayer"):
        store(cache, prompt(32), sliding)


def test_a_cache_of_another_shape_is_not_stored(caches: stratakv.CacheManager, model: Any) -> None:
    other = caches.register("other", replace(geometry(model), head_dim=32))
    computed = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt(), past_key_values=computed)
    with pytest.raises(stratakv.InputError, match="geometry wants"):
        store(other, prompt(), computed)


def test_a_cache_of_another_model_is_refused(caches: stratakv.CacheManager, model: Any) -> None:
    other = caches.register("other", replace(geometry(model), layers=5))
    with pytest.raises(stratakv.InputError, match="registered with"):
        generate(model, other, prompt(), **GREEDY)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"past_key_values": "mine"}, "past_key_values"),
        ({"use_cache": False}, "use_cache"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"prefill_chunk_size": 64}, "prefill_chunk_size"),
        ({"token_healing": True}, "token_healing"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "inputs_embeds"),
        ({"position_ids": torch.arange(PROMPT_TOKENS)[None]}, "position_ids"),
        ({"assistant_model": "another"}, "assistant_model"),
        ({"generation_config": transformers.GenerationConfig(num_beams=3)}, "num_beams"),
        ({"attention_mask": torch.tensor([[1] * (PROMPT_TOKENS - 1) + [0]])}, "padded on the right, by 1 of 150"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0] + [1] * (PROMPT_TOKENS - 10)])}, "hides token 9"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
    ],
)
def test_an_argument_that_would_make_reuse_wrong_is_refused(
    model: Any, cache: stratakv.ModelCache, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(stratakv.InputError, match=said):
        generate(model, cache, prompt(), **options)


@pytest.mark.parametrize(
    ("input_ids", "said"),
    [
        (torch.ones(20, dtype=torch.long), r"\[rows, tokens\]"),
        (torch.ones(1, 0, dtype=torch.long), "empty"),
        (torch.ones(1, 20), "integers"),
        (torch.ones(0, 20, dtype=torch.long), "no rows"),
        ([[1, 2, 3]], r"\[rows, tokens\]"),
    ],
)
def test_a_prompt_that_is_no_tensor_of_token_ids_is_refused(
    model: Any, cache: stratakv.ModelCache, input_ids: Any, said: str
) -> None:
    with pytest.raises(stratakv.InputError, match=said):
        generate(model, cache, input_ids, **GREEDY)


def test_a_model_in_training_mode_is_refused(cache: stratakv.ModelCache) -> None:
    with pytest.raises(stratakv.InputError, match="training"):
        generate(llama().train(), cache, prompt(), **GREEDY)


@pytest.mark.timeout(300)
def test_the_tiny_demo_keeps_its_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stratakv.cli", "demo", "--tiny", "--turns", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "token-identical" in ran.stdout
    report = json.loads((tmp_path / "demo.json").read_text())
    assert len(report["turns"]) == 6
    assert [turn["after_kill"] for turn in report["turns"]].count(True) == 1
    page = (tmp_path / "demo.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page
    assert not list(tmp_path.glob("store-*"))


def test_the_demo_fails_if_one_answer_differs_or_nothing_survived_the_kill() -> None:
    turn = Turn(
        user=1,
        turn=1,
        prompt_tokens=40,
        reused_tokens=32,
        blocks=("ram", "ssd"),
        explanation="",
        restore_s=0.01,
        ttft_cold_s=1.0,
        ttft_cached_s=0.1,
        same=True,
        text="<b>",
        after_kill=True,
    )
    bf16 = {
        "prompt_tokens": 40,
        "reused_tokens": 32,
        "same_split_equal": True,
        "same_split_max_logit_difference": 0.0,
        "one_shot_equal": True,
        "one_shot_max_logit_difference": 0.0,
        "largest_logit": 1.0,
    }
    good = Report(model="m", block_tokens=16, facts={}, turns=(turn,), stats={"tiers": {}}, bf16=bf16)
    assert not good.problems()
    assert replace(good, turns=(replace(turn, same=False),)).problems()
    assert replace(good, turns=(replace(turn, blocks=("ram",)),)).problems()
    assert replace(good, bf16={**bf16, "same_split_equal": False}).problems()
    assert replace(good, bf16={**bf16, "reused_tokens": 0}).problems()
    assert "<b>" not in good.page()
