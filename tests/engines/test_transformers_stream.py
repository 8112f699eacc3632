"""transformers, streaming: text arrives as it is made, and however a generation ends, what it computed is put."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import stratakv  # noqa: E402 (after the skips)
from llamas import BLOCK, GREEDY, padded, prompt, tokenizer  # noqa: E402
from stratakv.integrations.transformers import generate, restore, stream  # noqa: E402

pytestmark = [
    pytest.mark.engines,
    # torch and transformers warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]

LONG = {**GREEDY, "max_new_tokens": 40}


def text_of(output: Any) -> str:
    return str(tokenizer().decode(output[0, 150:], skip_special_tokens=True))


def cached_tokens(cache: stratakv.ModelCache, tokens: Any) -> int:
    """How many leading ones of some tokens are cached, whatever follows them."""
    return restore(cache, torch.cat([tokens, prompt(40, 99)], dim=1)).tokens


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


class Raising:
    """A streamer whose consumer breaks after some tokens."""

    def __init__(self, tokens: int, error: BaseException) -> None:
        self.left, self.error = tokens, error

    def put(self, value: Any) -> None:
        if value.ndim == 1:
            self.left -= 1
            if self.left == 0:
                raise self.error

    def end(self) -> None:
        """Never reached."""


def test_a_printing_streamer_prints_what_it_prints_uncached(model: Any, cache: stratakv.ModelCache) -> None:
    printed = []
    for run in (
        lambda **options: model.generate(prompt(), **options),
        *[lambda **o: generate(model, cache, prompt(), **o)] * 2,
    ):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run(streamer=transformers.TextStreamer(tokenizer()), **GREEDY)
        printed.append(out.getvalue())
    assert printed[0] == printed[1] == printed[2]
    assert len(printed[0].split()) == 150 + GREEDY["max_new_tokens"]


def test_an_iterating_streamer_in_a_thread_gets_the_uncached_text(model: Any, cache: stratakv.ModelCache) -> None:
    for _ in range(2):
        streamer = transformers.TextIteratorStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True)
        options = {**LONG, "streamer": streamer}
        thread = threading.Thread(target=generate, args=(model, cache, prompt()), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text == text_of(model.generate(prompt(), **LONG))
    assert cached_tokens(cache, model.generate(prompt(), **LONG)[:, :-1]) == whole_blocks(150 + 39)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_stream_is_the_uncached_text_and_is_put(
    model: Any, cache: stratakv.ModelCache, options: dict[str, Any]
) -> None:
    expected = model.generate(prompt(), **LONG)
    found: list[Any] = []
    for _ in range(2):
        text = "".join(stream(model, cache, tokenizer(), prompt(), on_restored=found.append, **LONG, **options))
        assert text == text_of(expected)
    assert [each.tokens for each in found] == [0, 144]
    assert cached_tokens(cache, expected[:, :-1]) == whole_blocks(189)


def test_text_arrives_while_the_model_goes_on(model: Any, cache: stratakv.ModelCache) -> None:
    arrived = threading.Event()
    waited: list[bool] = []

    def gate(input_ids: Any, scores: Any, **_: Any) -> Any:
        # The tenth token is not made before the consumer has text of an earlier one.
        if input_ids.shape[1] == 150 + 10:
            waited.append(arrived.wait(timeout=60))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    for _ in stream(model, cache, tokenizer(), prompt(), stopping_criteria=[gate], **LONG):
        arrived.set()
    assert waited == [True]


def test_a_consumer_that_leaves_ends_the_generation_and_what_there_is_is_put(
    model: Any, cache: stratakv.ModelCache
) -> None:
    made: list[int] = []

    def watch(input_ids: Any, scores: Any, **_: Any) -> Any:
        made.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    options = {**GREEDY, "max_new_tokens": 1500}
    first = ""
    for piece in stream(model, cache, tokenizer(), prompt(), stopping_criteria=[watch], **options):
        first = piece
        break
    end = made[-1]
    assert 150 < end < 150 + 1500
    expected = model.generate(prompt(), **{**GREEDY, "max_new_tokens": end + 12 - 150})
    assert first
    assert text_of(expected).startswith(first)
    assert cached_tokens(cache, expected[:, : end - 1]) == whole_blocks(end - 1)
    # It is what it would have been: the next request goes on from there as without the cache.
    assert torch.equal(generate(model, cache, expected[:, :end], **GREEDY), expected)


@pytest.mark.parametrize("error", [ValueError("gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_streamer_that_raises_loses_nothing_that_was_computed(
    model: Any, cache: stratakv.ModelCache, error: BaseException, options: dict[str, Any]
) -> None:
    with pytest.raises(type(error)):
        generate(model, cache, prompt(), streamer=Raising(20, error), **LONG, **options)
    expected = model.generate(prompt(), **LONG)
    assert cached_tokens(cache, expected[:, : 150 + 19]) == whole_blocks(150 + 19)
    assert torch.equal(generate(model, cache, prompt(), **LONG), expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_of_a_forward_pass_that_broke_off_nothing_is_put(model: Any, cache: stratakv.ModelCache, layer: int) -> None:
    calls = []

    def breaks(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(breaks)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(model, cache, prompt(149), **LONG)
    finally:
        hook.remove()
    # Eleven forward passes were whole: the prompt and ten tokens, the last block of which just begins. The twelfth
    # wrote the keys of some layers.
    expected = model.generate(prompt(149), **LONG)
    assert cached_tokens(cache, expected[:, : 149 + 10]) == whole_blocks(149 + 10) == 144
    assert cached_tokens(cache, expected[:, : 149 + 11]) == 144
    assert torch.equal(generate(model, cache, prompt(149), **LONG), expected)


@pytest.mark.parametrize("how", ["criterion", "eos", "string"])
def test_a_generation_that_is_ended_early_is_put_to_its_end(model: Any, cache: stratakv.ModelCache, how: str) -> None:
    free = model.generate(prompt(), **LONG)
    seventh = int(free[0, 150 + 20])
    options: dict[str, Any] = {
        "criterion": {"stopping_criteria": [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 150 + 21])]},
        "eos": {"eos_token_id": seventh},
        "string": {"stop_strings": [tokenizer().decode([seventh])], "tokenizer": tokenizer()},
    }[how]
    expected = model.generate(prompt(), **LONG, **options)
    assert torch.equal(generate(model, cache, prompt(), **LONG, **options), expected)
    assert expected.shape[1] < free.shape[1]
    assert cached_tokens(cache, expected[:, :-1]) == whole_blocks(expected.shape[1] - 1) > 0


def test_an_error_in_the_thread_reaches_the_consumer(model: Any, cache: stratakv.ModelCache) -> None:
    with pytest.raises(stratakv.InputError, match="num_beams"):
        list(stream(model, cache, tokenizer(), prompt(), num_beams=2, **GREEDY))


def test_an_error_after_the_consumer_left_is_in_the_log(
    model: Any, cache: stratakv.ModelCache, caplog: pytest.LogCaptureFixture
) -> None:
    reached, left = threading.Event(), threading.Event()

    def fails(input_ids: Any, scores: Any, **_: Any) -> Any:
        if input_ids.shape[1] == 150 + 10:
            reached.set()
            left.wait(timeout=60)
            raise ValueError("too late")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    texts = stream(model, cache, tokenizer(), prompt(), stopping_criteria=[fails], **LONG)
    next(texts)
    assert reached.wait(timeout=60)
    left.set()
    with caplog.at_level(logging.WARNING):
        texts.close()
    assert "too late" in caplog.text


def test_what_cannot_be_streamed_is_refused(model: Any, cache: stratakv.ModelCache) -> None:
    batch = padded([prompt(20, 1), prompt(40, 2)])
    with pytest.raises(stratakv.InputError, match="batch of 2"):
        stream(model, cache, tokenizer(), **batch, **GREEDY)
    with pytest.raises(stratakv.InputError, match="streamer"):
        stream(model, cache, tokenizer(), prompt(), streamer=transformers.TextStreamer(tokenizer()), **GREEDY)
