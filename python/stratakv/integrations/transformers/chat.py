"""A conversation: its messages, and the tokens of them that are hashed already.

Each turn the tokenizer's template makes a prompt of all messages. It should start with the tokens of the turn before,
prompt and answer; then only the new ones are hashed, matched and computed. A template may write history otherwise than
it was generated: it strips an answer, leaves its thoughts out, or its text is cut into other tokens. Then the turn
starts with a new sequence, and finds what is cached of its prompt up to the first token that differs.

    send ─▶ template ─▶ starts as before? ─yes─▶ extend the sequence ─▶ generate ─▶ put ─▶ message kept
                              └────────────no──▶ a new sequence ───────────┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from stratakv import InputError, ModelCache, StrataKVError, log
from stratakv.integrations.transformers.content import Hashed, Restored
from stratakv.integrations.transformers.generation import run, sequences
from stratakv.integrations.transformers.streaming import Left, pieces

__all__ = ["Chat"]

_log = log.of(__name__)


class Chat:
    """Keeps a conversation with a model, each turn of which computes only what is new.

    A turn that fails leaves the conversation as it was. One thread at a time.

    Attributes:
        messages: What was said so far, as `{"role": ..., "content": ...}`: kept and handed to another `Chat`, they
            continue the conversation, after a restart too.
        restored: What of the last prompt was found; None before the first turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ModelCache,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] = (),
        template: Mapping[str, Any] | None = None,
        adapter: str = "",
        tenant: str = "",
        **generate_kwargs: Any,  # noqa: ANN401 (whatever `model.generate` takes)
    ) -> None:
        """Starts a conversation, or goes on with one.

        Args:
            model: As in `generate`.
            cache: As in `generate`.
            tokenizer: Has a chat template.
            system: What the model is told before everything else.
            messages: What was said before.
            template: Arguments of `tokenizer.apply_chat_template`, as `tools` or `enable_thinking`.
            adapter: As in `generate`.
            tenant: As in `generate`.
            **generate_kwargs: As in `generate`, for every turn: how much is generated, and how it is sampled.

        Raises:
            InputError: Both `system` and a system message are given.
        """
        self.messages: list[dict[str, Any]] = [dict(each) for each in messages]
        if system is not None:
            if self.messages and self.messages[0].get("role") == "system":
                raise InputError("system is given, and messages begin with a system message")
            self.messages.insert(0, {"role": "system", "content": system})
        self.restored: Restored | None = None
        self._model = model
        self._cache = cache
        self._tokenizer = tokenizer
        self._template = dict(template or {})
        self._names = {"adapter": adapter, "tenant": tenant}
        self._generate_kwargs = generate_kwargs
        self._hashed: Hashed | None = None

    def send(self, text: str, **generate_kwargs: Any) -> str:  # noqa: ANN401 (whatever `model.generate` takes)
        """Says something to the model, and returns its answer.

        Args:
            text: What the user says.
            **generate_kwargs: For this turn, beside and before those of the conversation.

        Raises:
            InputError: As in `generate`.
        """
        return self._answer(text, generate_kwargs)

    def stream(self, text: str, **generate_kwargs: Any) -> Iterator[str]:  # noqa: ANN401
        """Says something to the model, and hands its answer over as it is made.

        The turn begins with the first piece that is asked for. Closing the iterator, as leaving a `for` over it does,
        ends the answer at the next token: what there is of it is the answer that the conversation goes on with.

        Args:
            text: As in `send`.
            **generate_kwargs: As in `send`, but for `streamer`.

        Raises:
            InputError: As in `stream`.
        """
        if {**self._generate_kwargs, **generate_kwargs}.get("streamer") is not None:
            raise InputError("streamer is what this iterator is; call send to use your own")

        def work(streamer: TextIteratorStreamer, left: Left) -> None:
            criteria = {**self._generate_kwargs, **generate_kwargs}.get("stopping_criteria") or []
            self._answer(text, {**generate_kwargs, "streamer": streamer, "stopping_criteria": [*criteria, left]})

        return pieces(self._tokenizer, work, skip_special_tokens=True)

    def _answer(self, text: str, generate_kwargs: dict[str, Any]) -> str:
        """One turn."""
        asked = [*self.messages, {"role": "user", "content": text}]
        input_ids = self._tokenizer.apply_chat_template(
            asked, **self._template, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        hashed, self._hashed = self._hash(input_ids[0]), None
        kwargs = {**self._generate_kwargs, **generate_kwargs}
        # The template's prompt is one without padding, whatever tokens it has.
        kwargs["attention_mask"] = torch.ones_like(input_ids)
        output, stored = run(
            self._model, self._cache, input_ids, kwargs, **self._names, on_restored=self._note, hashed=hashed
        )
        if stored:
            # Of a sequence nothing is stored any more after its namespace was dropped.
            self._hashed = hashed
        answer = str(self._tokenizer.decode(sequences(output)[0, input_ids.shape[1] :], skip_special_tokens=True))
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _note(self, restored: Restored) -> None:
        """Keeps what was found."""
        self.restored = restored

    def _hash(self, tokens: torch.Tensor) -> Hashed | None:
        """The prompt's tokens, hashed; None if they cannot be, and the cache then says itself what is wrong."""
        try:
            if self._hashed is not None and self._hashed.leads(tokens):
                self._hashed.extend(tokens)
                return self._hashed
            return Hashed(self._cache, tokens, **self._names)
        except InputError:
            raise
        except StrataKVError as problem:
            _log.warning("prompt_not_hashed", "a prompt is not hashed: %s", problem)
            return None
