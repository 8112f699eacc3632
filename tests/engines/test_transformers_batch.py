"""transformers, batches and static caches: each row says what it says without the cache, whatever was found of it.

The reference is the plain uncached run of the same batch, in fp32. What the model computes is counted by a hook on its
forward pass.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import stratakv  # noqa: E402 (after the skips)
from llamas import BLOCK, GREEDY, llama, padded, prompt, settings  # noqa: E402
from stratakv.integrations.transformers import Restored, generate, geometry, restore, store  # noqa: E402
from stratakv.integrations.transformers.catchup import starts  # noqa: E402

pytestmark = [
    pytest.mark.engines,
    # torch and transformers warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def computed(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of each forward pass."""
    passes: list[tuple[int, int]] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        passes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield passes
    hook.remove()


def warm(model: Any, cache: stratakv.ModelCache, input_ids: Any, tokens: int) -> None:
    """Puts the leading tokens of one prompt, whole blocks of them."""
    if tokens:
        past_key_values = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids[:, :tokens], past_key_values=past_key_values)
        assert store(cache, input_ids[:, :tokens], past_key_values) == tokens


def cached(model: Any, cache: stratakv.ModelCache, batch: dict[str, Any], **options: Any) -> tuple[Any, Restored]:
    """The output, and what it was restored from."""
    found: list[Restored] = []
    output = generate(model, cache, **batch, on_restored=found.append, **{**GREEDY, **options})
    return output, found[0]


# Lengths of the prompts, and how many leading tokens of each are cached before.
MIXES = {
    "none": ([40, 70, 150], [0, 0, 0]),
    "one": ([97], [96]),
    "all": ([49, 70, 150], [48, 64, 144]),
    "none-partial-full": ([150, 150, 150], [0, 64, 144]),
    "the-longest-is-cold": ([33, 150, 80], [32, 0, 64]),
    "the-shortest-is-cold": ([20, 150, 80], [0, 144, 64]),
    "one-token": ([1, 150, 80], [0, 128, 64]),
    "a-whole-block": ([32, 64, 48], [32, 64, 48]),
    "eight": ([150, 141, 90, 66, 40, 17, 5, 130], [144, 96, 0, 64, 32, 16, 0, 48]),
}


@pytest.mark.parametrize(("lengths", "before"), MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_rows_of_a_batch_say_what_they_say_uncached(
    model: Any, cache: stratakv.ModelCache, lengths: list[int], before: list[int], implementation: str | None
) -> None:
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    for each, tokens in zip(prompts, before, strict=True):
        warm(model, cache, each, tokens)
    batch = padded(prompts)
    output, restored = cached(model, cache, batch, cache_implementation=implementation)
    assert torch.equal(output, model.generate(**batch, **GREEDY))
    # The last token of a prompt is computed in any case.
    assert restored.rows == tuple(
        min(tokens, (length - 1) // BLOCK * BLOCK) for tokens, length in zip(before, lengths, strict=True)
    )
    if any(before):
        columns = max(lengths)
        assert restored.tokens == min(columns - n + tokens for n, tokens in zip(lengths, restored.rows, strict=True))
    # What was put is found, each row without its padding, and leads to the same answers once more.
    again, restored = cached(model, cache, batch, cache_implementation=implementation)
    assert torch.equal(again, output)
    assert restored.rows == tuple((length - 1) // BLOCK * BLOCK for length in lengths)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_from_ssd_a_batch_says_what_it_says_uncached(model: Any, tmp_path: Path, rows: int) -> None:
    batch = padded([prompt(30 + 17 * row, row) for row in range(rows)])
    with stratakv.open(settings(tmp_path)) as caches:
        generate(model, caches.register("llama", geometry(model)), **batch, **GREEDY)
        caches.flush()
    with stratakv.open(settings(tmp_path)) as caches:
        output, restored = cached(model, caches.register("llama", geometry(model)), batch)
    assert all(set(each.blocks) == {"ssd"} for each in restored.explanations)
    assert torch.equal(output, model.generate(**batch, **GREEDY))


def test_wrong_keys_and_values_of_one_row_would_change_its_answer(model: Any, cache: stratakv.ModelCache) -> None:
    batch = padded([prompt(100, 1), prompt(60, 2), prompt(150, 3)])
    generate(model, cache, **batch, **GREEDY)
    restored = restore(cache, **batch)
    for layer in restored.past_key_values.layers:
        # The first block of row 1, behind its padding.
        layer.keys[1, :, 90 : 90 + BLOCK], layer.values[1, :, 90 : 90 + BLOCK] = 0, 0
    output = model.generate(**batch, past_key_values=restored.past_key_values, **GREEDY)
    expected = model.generate(**batch, **GREEDY)
    assert [torch.equal(output[row], expected[row]) for row in range(3)] == [True, False, True]


def test_a_prefix_that_does_not_sit_behind_its_padding_would_change_the_answer(
    model: Any, cache: stratakv.ModelCache
) -> None:
    batch = padded([prompt(100, 1), prompt(150, 3)])
    generate(model, cache, **batch, **GREEDY)
    restored = restore(cache, **batch)
    for layer in restored.past_key_values.layers:
        layer.keys[0] = layer.keys[0].roll(-1, dims=1)
        layer.values[0] = layer.values[0].roll(-1, dims=1)
    output = model.generate(**batch, past_key_values=restored.past_key_values, **GREEDY)
    expected = model.generate(**batch, **GREEDY)
    assert not torch.equal(output[0], expected[0])
    assert torch.equal(output[1], expected[1])


def test_a_restored_batch_is_what_a_forward_pass_leaves(model: Any, cache: stratakv.ModelCache) -> None:
    prompts = [prompt(100, 1), prompt(150, 3)]
    for each in prompts:
        warm(model, cache, each, each.shape[1] // BLOCK * BLOCK)
    restored = restore(cache, **padded(prompts))
    assert restored.tokens == restored.past_key_values.get_seq_length() == min(50 + 96, 144)
    for row, (each, pad) in enumerate(zip(prompts, (50, 0), strict=True)):
        alone = restore(cache, each).past_key_values
        for ours, theirs in zip(restored.past_key_values.layers, alone.layers, strict=True):
            assert torch.equal(ours.keys[row, :, pad:144], theirs.keys[0, :, : 144 - pad])
            assert torch.equal(ours.values[row, :, pad:144], theirs.values[0, :, : 144 - pad])
            assert not ours.keys[row, :, :pad].any()


def test_only_the_longest_rest_is_computed_of_each_row(
    model: Any, cache: stratakv.ModelCache, computed: list[tuple[int, int]]
) -> None:
    shared = prompt(96, 9)
    prompts = [torch.cat([shared, prompt(tokens, tokens)], dim=1) for tokens in (5, 9, 20)]
    warm(model, cache, shared, 96)
    computed.clear()
    output, _ = cached(model, cache, padded(prompts))
    assert computed == [(3, 20)] + [(3, 1)] * (GREEDY["max_new_tokens"] - 1)
    assert torch.equal(output, model.generate(**padded(prompts), **GREEDY))


def test_a_row_that_lags_far_behind_is_computed_by_itself_first(
    model: Any, cache: stratakv.ModelCache, computed: list[tuple[int, int]]
) -> None:
    prompts = [prompt(330, 1), prompt(310, 2), prompt(300, 3), prompt(330, 4)]
    for each, tokens in zip(prompts, (320, 288, 0, 320), strict=True):
        warm(model, cache, each, tokens)
    computed.clear()
    output, restored = cached(model, cache, padded(prompts))
    assert restored.tokens == 30
    assert computed[:2] == [(1, 308 - 30), (4, 330 - 308)]
    assert torch.equal(output, model.generate(**padded(prompts), **GREEDY))
    static, _ = cached(model, cache, padded(prompts), cache_implementation="static")
    assert torch.equal(static, output)


def test_passes_are_the_least_work_there_is() -> None:
    for levels in itertools.product((0, 10, 40, 64), repeat=4):
        known = sorted(set(levels))
        # Every choice of where passes start, counted by hand.
        options = []
        for chosen in itertools.product((False, True), repeat=len(known) - 1):
            marks = [known[0], *(at for at, taken in zip(known[1:], chosen, strict=True) if taken)]
            work = 8 * len(marks) + 4 * (100 - marks[-1])
            work += sum(
                sum(level < end for level in levels) * (end - start) for start, end in itertools.pairwise(marks)
            )
            options.append((work, tuple(marks)))
        assert starts(levels, 100, pass_tokens=8) in {marks for work, marks in options if work == min(options)[0]}


@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_rows_that_finish_early_are_put_without_what_fills_them_up(
    model: Any, cache: stratakv.ModelCache, implementation: str | None
) -> None:
    prompts = [prompt(60, 1), prompt(90, 2)]
    batch = padded(prompts)
    plain = model.generate(**batch, **{**GREEDY, "max_new_tokens": 60})
    # What row 0 says third ends it; row 1 goes on unless it says that, too.
    end = int(plain[0, 92])
    options = {**GREEDY, "max_new_tokens": 60, "eos_token_id": end, "cache_implementation": implementation}
    output, _ = cached(model, cache, batch, **options)
    options.pop("cache_implementation")
    assert torch.equal(output, model.generate(**batch, **options))
    assert output[0, 93:].eq(0).all()
    assert output.shape[1] > 93 + 2 * BLOCK
    assert restore(cache, torch.cat([output[:1, 30:], prompt(40, 5)], dim=1)).tokens == (60 + 3) // BLOCK * BLOCK
    # Row 1 is put to its end.
    said = output[1:, :-1]
    assert restore(cache, torch.cat([said, prompt(40, 5)], dim=1)).tokens == said.shape[1] // BLOCK * BLOCK


def test_padding_is_told_by_its_token_as_transformers_does(model: Any, cache: stratakv.ModelCache) -> None:
    input_ids = padded([prompt(60, 1), prompt(90, 2)])["input_ids"]
    for _ in range(2):
        output, restored = cached(model, cache, {"input_ids": input_ids})
        assert torch.equal(output, model.generate(input_ids, **GREEDY))
    assert restored.rows == (48, 80)
    hole = prompt(60, 1)
    hole[0, 20] = 0
    with pytest.raises(stratakv.InputError, match=r"without an attention_mask.*token 0 .*hides token 20"):
        generate(model, cache, hole, **GREEDY)
    # With a mask it is a token like any other.
    output, _ = cached(model, cache, {"input_ids": hole, "attention_mask": torch.ones_like(hole)})
    assert torch.equal(output, model.generate(hole, attention_mask=torch.ones_like(hole), **GREEDY))


def test_a_batch_shares_blocks_with_prompts_that_came_alone(model: Any, cache: stratakv.ModelCache) -> None:
    one, other = prompt(100, 1), prompt(150, 2)
    generate(model, cache, one, **GREEDY)
    _, restored = cached(model, cache, padded([one, other]))
    assert restored.rows == (96, 0)
    output, restored = cached(model, cache, {"input_ids": other})
    assert restored.rows == (144,)
    assert torch.equal(output, model.generate(other, **GREEDY))


def test_sampling_a_batch_draws_what_it_draws_without_the_cache(model: Any, cache: stratakv.ModelCache) -> None:
    batch = padded([prompt(60, 1), prompt(90, 2)])
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 20, "pad_token_id": 0}
    generate(model, cache, **batch, **sampled)
    torch.manual_seed(7)
    output = generate(model, cache, **batch, **sampled)
    torch.manual_seed(7)
    assert torch.equal(output, model.generate(**batch, **sampled))


@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_a_closed_cache_costs_a_batch_its_prefill(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, implementation: str | None
) -> None:
    with stratakv.open(settings(tmp_path)) as caches:
        cache = caches.register("llama", geometry(model))
    batch = padded([prompt(60, 1), prompt(90, 2)])
    with caplog.at_level(logging.WARNING):
        output, restored = cached(model, cache, batch, cache_implementation=implementation)
    assert restored.rows == (0, 0)
    assert torch.equal(output, model.generate(**batch, **GREEDY))
    assert "not restored of 2 of 2 prompts" in caplog.text
    assert "not put" in caplog.text


@pytest.mark.parametrize("kind", ["GPT2Config", "Qwen2Config", "GPTNeoXConfig", "OPTConfig"])
def test_models_with_other_positions_say_the_same_in_a_batch(caches: stratakv.CacheManager, kind: str) -> None:
    terms = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {
        "GPT2Config": {"n_positions": 256},
        "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
        "Qwen2Config": {"intermediate_size": 64, "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2},
        "GPTNeoXConfig": {"intermediate_size": 64},
    }[kind]
    config = getattr(transformers, kind)(**terms, **more, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = caches.register(kind, geometry(model))
    prompts = [prompt(50, 1), prompt(120, 2), prompt(110, 3)]
    generate(model, cache, prompts[1], **GREEDY)
    batch = padded(prompts)
    expected = model.generate(**batch, **GREEDY)
    for rows in ((0, 112, 0), (48, 112, 96)):
        output, restored = cached(model, cache, batch)
        assert restored.rows == rows
        assert torch.equal(output, expected)


def test_a_padded_batch_of_a_model_without_position_ids_is_refused(caches: stratakv.CacheManager) -> None:
    config = transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=2, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = caches.register("bloom", geometry(model))
    with pytest.raises(stratakv.InputError, match="takes no position_ids"):
        generate(model, cache, **padded([prompt(20, 1), prompt(40, 2)]), **GREEDY)
    batch = padded([prompt(40, 1), prompt(40, 2)])
    expected = model.generate(**batch, **GREEDY)
    for _ in range(2):
        output, restored = cached(model, cache, batch)
        assert torch.equal(output, expected)
    assert restored.rows == (32, 32)


def test_restored_content_lies_in_the_static_tensors(model: Any, cache: stratakv.ModelCache) -> None:
    generate(model, cache, prompt(), **GREEDY)
    static = transformers.StaticCache(config=model.config, max_cache_len=256)
    generate(model, cache, prompt(20), past_key_values=static, **GREEDY)
    static.reset()
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in static.layers]
    restored = restore(cache, prompt(), past_key_values=static)
    assert restored.past_key_values is static
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in static.layers] == places
    assert int(static.get_seq_length()) == restored.tokens == 144
    dynamic = restore(cache, prompt()).past_key_values
    for ours, theirs in zip(static.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :144], theirs.keys)
        assert torch.equal(ours.values[:, :, :144], theirs.values)
    output = model.generate(prompt(), past_key_values=static, **GREEDY)
    assert torch.equal(output, model.generate(prompt(), **GREEDY))
    assert store(cache, output, static) == (output.shape[1] - 1) // BLOCK * BLOCK


def test_a_static_cache_serves_one_request_after_another(model: Any, cache: stratakv.ModelCache) -> None:
    static = transformers.StaticCache(config=model.config, max_cache_len=256)
    for seed in (1, 2, 1):
        static.reset()
        output = generate(model, cache, prompt(seed=seed), past_key_values=static, **GREEDY)
        assert torch.equal(output, model.generate(prompt(seed=seed), **GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 170},
        {"max_new_tokens": 12, "max_cache_len": 512},
        {},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=9, cache_implementation="static")},
    ],
    ids=["max_length", "max_cache_len", "default", "generation_config"],
)
def test_a_static_cache_has_room_for_what_is_generated(
    model: Any, cache: stratakv.ModelCache, options: dict[str, Any]
) -> None:
    plain = {name: value for name, value in options.items() if name != "max_cache_len"}
    expected = model.generate(prompt(), do_sample=False, **plain)
    found: list[Restored] = []
    for _ in range(2):
        static = {} if "generation_config" in options else {"cache_implementation": "static"}
        output = generate(model, cache, prompt(), do_sample=False, on_restored=found.append, **options, **static)
        assert torch.equal(output, expected)
    assert type(found[1].past_key_values) is transformers.StaticCache
    assert found[1].tokens == 144
    room = found[1].past_key_values.get_max_length()
    assert room >= options.get("max_cache_len", expected.shape[1] - 1)


def sliding() -> Any:
    config = transformers.MistralConfig(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=64
    )
    return transformers.StaticCache(config=config, max_cache_len=256)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda model: transformers.StaticCache(config=model.config, max_cache_len=100),
            "room for 100 tokens.* has 150",
        ),
        (lambda model: transformers.DynamicCache(config=model.config), "DynamicCache"),
        (lambda _: sliding(), "StaticSlidingWindowLayer"),
        (lambda _: transformers.StaticCache(config=llama(num_hidden_layers=2).config, max_cache_len=256), "2 layers"),
    ],
    ids=["small", "dynamic", "sliding", "layers"],
)
def test_a_cache_that_cannot_be_loaded_into_is_refused(
    model: Any, cache: stratakv.ModelCache, made: Any, said: str
) -> None:
    with pytest.raises(stratakv.InputError, match=said):
        generate(model, cache, prompt(), past_key_values=made(model), **GREEDY)
    with pytest.raises(stratakv.InputError, match=said):
        restore(cache, prompt(), past_key_values=made(model))


def test_a_static_cache_that_is_in_use_is_refused(model: Any, cache: stratakv.ModelCache) -> None:
    static = transformers.StaticCache(config=model.config, max_cache_len=256)
    generate(model, cache, prompt(), past_key_values=static, **GREEDY)
    with pytest.raises(stratakv.InputError, match=r"holds 161 tokens; call its reset\(\) first"):
        generate(model, cache, prompt(), past_key_values=static, **GREEDY)
    static.reset()
    with pytest.raises(stratakv.InputError, match=r"holds \[1, 2, 256, 16\].*wants \[2, "):
        generate(model, cache, prompt().repeat(2, 1), past_key_values=static, **GREEDY)
    with pytest.raises(stratakv.InputError, match="both given"):
        generate(model, cache, prompt(), past_key_values=static, cache_implementation="static", **GREEDY)


MASK = [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1, 1, 1], [1, 1, 1, 0]], "row 1 .* padded on the right, by 1 of 4 tokens.*padding_side = 'left'"),
        ([[0, 1, 0, 1], [1, 1, 1, 1]], "row 0 .* hides token 2, behind the first"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "row 0 .* hides its whole prompt"),
        ([[2, 1, 1, 1], [1, 1, 1, 1]], "values other than 0 and 1"),
        ([[1, 1, 1], [1, 1, 1]], r"attention_mask is \[2, 3\], input_ids \[2, 4\]"),
        ([[1, 1, 1, 1]], r"attention_mask is \[1, 4\], input_ids \[2, 4\]"),
    ],
)
def test_a_mask_that_is_not_of_left_padding_is_refused(
    model: Any, cache: stratakv.ModelCache, mask: list[list[int]], said: str
) -> None:
    input_ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(stratakv.InputError, match=said):
        generate(model, cache, input_ids, attention_mask=torch.tensor(mask), **GREEDY)


def test_storing_a_batch_leaves_its_padding_out(model: Any, cache: stratakv.ModelCache) -> None:
    prompts = [prompt(40, 1), prompt(90, 2)]
    batch = padded(prompts)
    past_key_values = transformers.DynamicCache(config=model.config)
    output = model.generate(**batch, past_key_values=past_key_values, **GREEDY)
    # The mask is that of the prompts; the answers behind them have no padding.
    assert store(cache, output, past_key_values, attention_mask=batch["attention_mask"]) == 48 + 96
    for each, tokens in zip(prompts, (32, 80), strict=True):
        restored = restore(cache, each)
        assert restored.tokens == tokens
        assert torch.equal(
            model.generate(each, past_key_values=restored.past_key_values, **GREEDY), model.generate(each, **GREEDY)
        )
    with pytest.raises(stratakv.InputError, match=r"holds \[2, .*wants \[1, "):
        store(cache, output[:1], past_key_values)
