"""The process that the demo kills: it serves one turn at a time, cached and uncached, over a store on disk.

It is asked in JSON lines on standard input and answers in JSON lines on standard output; standard error is free text.
It keeps nothing that the next process would need but what is in the store: conversations come with each question.

    start ─▶ note… ready ─▶ turn ─▶ first_token, turn ─▶ … ─▶ bf16 ─▶ bf16 ─▶ stats ─▶ stats, end of input: exit
                              └── SIGKILL is welcome at any moment
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

# Before transformers is imported: nothing here is looked up on a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from transformers import DynamicCache

import stratakv
from stratakv.demo.model import Chat, smollm2, tiny
from stratakv.integrations.transformers import Restored, generate, geometry, store

__all__ = ["main"]

_BF16_PREFIX_TOKENS = 512


@dataclass
class Stopwatch:
    """A streamer that notes when the first token was there; `generate` hands it the prompt before.

    Attributes:
        replies: Where to tell that the first token is there; None to tell nobody.
    """

    replies: TextIO | None = None
    begin: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then one token at a time; only the time matters."""
        if self.prompt_seen and self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.begin
            if self.replies is not None:
                reply(self.replies, event="first_token")
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the time is known by now."""


def reply(replies: TextIO, **message: Any) -> None:  # noqa: ANN401 (JSON)
    """Writes one line, whole and at once."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def turn(chat: Chat, model: Any, cache: stratakv.ModelCache, asked: dict[str, Any], replies: TextIO) -> None:  # noqa: ANN401
    """Answers one question with the cache, then without, and reports both."""
    prompt = chat.ask(asked["history"], asked["question"])
    input_ids = torch.tensor([prompt])
    options = {"max_new_tokens": asked["new_tokens"], "do_sample": False}

    found: list[Restored] = []
    cached = Stopwatch(replies)
    output = generate(model, cache, input_ids, on_restored=found.append, streamer=cached, **options)
    answer = output[0, len(prompt) :].tolist()

    cold = Stopwatch()
    uncached = model.generate(input_ids, streamer=cold, **options)[0, len(prompt) :].tolist()

    explanation = found[0].explanation
    reply(
        replies,
        event="turn",
        prompt_tokens=len(prompt),
        reused_tokens=found[0].tokens,
        blocks=list(explanation.blocks)[: found[0].tokens // cache.geometry.block_tokens] if explanation else [],
        explanation=str(explanation),
        restore_s=found[0].seconds,
        ttft_cached_s=cached.first_token_s,
        ttft_cold_s=cold.first_token_s,
        answer=answer,
        uncached=uncached,
        text=chat.decode(answer),
        history=chat.closed(prompt, answer),
    )


def bf16(chat: Chat, caches: stratakv.CacheManager, asked: dict[str, Any], replies: TextIO) -> None:
    """Compares a cached bf16 run with the uncached run of the same prefill split, and with a one-shot prefill.

    In bf16 a prompt computed in two parts need not give the bits that it gives in one, with or without a cache.
    """
    model = chat.load(torch.bfloat16)
    cache = caches.register(f"{chat.name}-bf16", geometry(model))
    opening = asked["history"][:_BF16_PREFIX_TOKENS]
    split = len(opening) // cache.geometry.block_tokens * cache.geometry.block_tokens
    prompt = torch.tensor([chat.ask(opening, asked["question"])])
    options = {
        "max_new_tokens": asked["new_tokens"],
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def prefix() -> DynamicCache:
        past_key_values = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(prompt[:, :split], past_key_values=past_key_values, logits_to_keep=1)
        return past_key_values

    past_key_values = prefix()
    store(cache, prompt[:, :split], past_key_values)
    found: list[Restored] = []
    cached = generate(model, cache, prompt, on_restored=found.append, **options)
    past_key_values = prefix()
    if found[0].tokens < split:
        past_key_values.crop(found[0].tokens - split)
    same_split = model.generate(prompt, past_key_values=past_key_values, **options)
    one_shot = model.generate(prompt, **options)

    def furthest(other: Any) -> float:  # noqa: ANN401 (what `model.generate` returns)
        return float((cached.logits[0].float() - other.logits[0].float()).abs().max())

    reply(
        replies,
        event="bf16",
        prompt_tokens=prompt.shape[1],
        reused_tokens=found[0].tokens,
        same_split_equal=bool(torch.equal(cached.sequences, same_split.sequences)),
        same_split_max_logit_difference=furthest(same_split),
        one_shot_equal=bool(torch.equal(cached.sequences, one_shot.sequences)),
        one_shot_max_logit_difference=furthest(one_shot),
        largest_logit=float(cached.logits[0].float().abs().max()),
    )


def stats(caches: stratakv.CacheManager, replies: TextIO) -> None:
    """Reports what the store counted since this process opened it."""
    counted = caches.stats()
    tiers = {name: asdict(each) for name, each in counted.tiers.items()}
    reply(replies, event="stats", hit_ratio=counted.hit_ratio, asked_blocks=counted.asked_blocks, tiers=tiers)


def serve(questions: TextIO, replies: TextIO) -> None:
    """Serves until the input ends."""
    start = json.loads(questions.readline())

    def say(text: str) -> None:
        reply(replies, event="note", text=text)

    chat = tiny() if start["tiny"] else smollm2(Path(start["models"]), say)
    model = chat.load(torch.float32)
    opening = chat.opening(start["system"], start["system_tokens"])
    # The first long prompt of a process is slower than the next; that shall not count against either run.
    model.generate(torch.tensor([opening]), max_new_tokens=2, do_sample=False)
    config = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes=start["ram"]),
        # Through, not back: what was put is on its way to the SSD at once, whatever happens to this process.
        ssd=stratakv.SsdConfig(path=start["store"], capacity_bytes=start["ssd"], policy="write_through"),
    )
    with stratakv.open(config) as caches:
        cache = caches.register(chat.name, geometry(model))
        reply(
            replies,
            event="ready",
            model=chat.name,
            opening=opening,
            block_tokens=cache.geometry.block_tokens,
            token_bytes=cache.geometry.token_bytes,
            threads=torch.get_num_threads(),
        )
        for line in questions:
            asked = json.loads(line)
            match asked["do"]:
                case "turn":
                    turn(chat, model, cache, asked, replies)
                case "bf16":
                    bf16(chat, caches, asked, replies)
                case "stats":
                    stats(caches, replies)


def main() -> None:
    """Serves on the standard streams; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
