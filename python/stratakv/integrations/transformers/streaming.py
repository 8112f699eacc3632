"""Text as it is generated, for whoever iterates over it.

The model runs in a thread of its own. A consumer that stops early stops it at the next token, and waits for that; what
was computed until then is put like any other answer.

    next() ─▶ thread: restore ─▶ prefill ─▶ token ─▶ token ─▶ … ─▶ put
                                              └─ text ─▶ queue ─▶ yield      close(): no further token
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from stratakv import InputError, ModelCache, log
from stratakv.integrations.transformers.content import Restored
from stratakv.integrations.transformers.generation import generate

__all__ = ["Left", "pieces", "stream"]

_log = log.of(__name__)


class Left:
    """A stopping criterion that ends a generation to which nobody listens any more."""

    def __init__(self) -> None:
        """Somebody does."""
        self.now = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 (transformers calls it)
        """Whether each row ends here."""
        return torch.full((input_ids.shape[0],), self.now.is_set(), dtype=torch.bool, device=input_ids.device)


def stream(
    model: PreTrainedModel,
    cache: ModelCache,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    *,
    adapter: str = "",
    tenant: str = "",
    on_restored: Callable[[Restored], None] | None = None,
    skip_special_tokens: bool = True,
    **generate_kwargs: Any,  # noqa: ANN401 (whatever `model.generate` takes)
) -> Iterator[str]:
    """The answer to one prompt, piece by piece as the model makes it; joined, the pieces are the text.

    Generation starts with the first piece that is asked for, in a thread of its own. Closing the iterator, as leaving a
    `for` over it does, stops generation at the next token; what was computed is put all the same.

    Args:
        model: As in `generate`.
        cache: As in `generate`.
        tokenizer: Turns tokens into text.
        input_ids: One whole prompt, `[1, tokens]`.
        adapter: As in `generate`.
        tenant: As in `generate`.
        on_restored: As in `generate`; called in the thread.
        skip_special_tokens: Whether tokens such as the end of a turn are left out of the text.
        **generate_kwargs: As in `generate`, but for `streamer`.

    Raises:
        InputError: There is more than one prompt. With the first piece that is asked for, as in `generate`.
    """

    def work(streamer: TextIteratorStreamer, left: Left) -> None:
        criteria = generate_kwargs.get("stopping_criteria") or []
        kwargs = {**generate_kwargs, "streamer": streamer, "stopping_criteria": [*criteria, left]}
        generate(model, cache, input_ids, adapter=adapter, tenant=tenant, on_restored=on_restored, **kwargs)

    if generate_kwargs.get("streamer") is not None:
        raise InputError("streamer is what this iterator is; call generate to use your own")
    if isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and input_ids.shape[0] != 1:
        raise InputError(f"input_ids is a batch of {input_ids.shape[0]} prompts; one at a time can be streamed")
    return pieces(tokenizer, work, skip_special_tokens=skip_special_tokens)


def pieces(
    tokenizer: PreTrainedTokenizerBase,
    work: Callable[[TextIteratorStreamer, Left], None],
    *,
    skip_special_tokens: bool,
) -> Iterator[str]:
    """What `work` hands to the streamer that it is given; `work` runs in a thread, and ends before this does.

    Args:
        tokenizer: Turns tokens into text.
        work: Generates with the streamer and the criterion, which says when to stop.
        skip_special_tokens: As in `stream`.
    """
    # Its queue holds no more than the answer is long.
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens)
    left = Left()

    def until_done() -> None:
        try:
            work(streamer, left)
        finally:
            # A generation that failed has not said that it ended, and the consumer would wait for ever.
            streamer.on_finalized_text("", stream_end=True)

    with ThreadPoolExecutor(1, thread_name_prefix="stratakv-stream") as thread:
        done = thread.submit(until_done)
        try:
            yield from (piece for piece in streamer if piece)
        except BaseException:
            left.now.set()
            if (problem := done.exception()) is not None:
                _log.warning(
                    "stream_failed_unheard",
                    "a stream that nobody listened to any more ended with an error: %s",
                    problem,
                )
            raise
        done.result()
