"""Rows of a batch that lag behind the others are computed by themselves first, where that is less work.

    row 0     a a a a a a a a b b        `a` loaded, `b` not
    row 1     a a b b b b b b b b
    row 2     a a a a a a a b b b
                  └──1──────┘             a pass over row 1 alone
                            └─2───┘       the pass over all rows, which `generate` makes

One pass over all rows computes as many columns of each as the row with the least needs. With a pass over those that lag
behind, and so on, it can be fewer tokens; but each pass takes time of its own, as it reads all weights of the model.
`starts` weighs the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from stratakv.integrations.transformers.content import Loaded
from stratakv.integrations.transformers.padding import Batch

__all__ = ["catch_up", "starts"]

# What a pass costs beside its tokens, in tokens: so many take as long as the weights take to be read. SmolLM2-135M in
# fp32 takes 69 ms for one token and 416 ms for 128 on one core of an EPYC (Zen 3): some 25. A larger value errs on the
# side of fewer passes.
_PASS_TOKENS = 32


def starts(levels: Sequence[int], columns: int, pass_tokens: int = _PASS_TOKENS) -> tuple[int, ...]:
    """At which columns the passes start that compute a batch with the least work.

    Each but the last goes to the start of the next, over the rows that do not hold so much yet; the last goes to the
    end, over all rows.

    Args:
        levels: the column to which each row is loaded, below `columns`.
        columns: how many there are.
        pass_tokens: what a pass costs beside its tokens, in tokens.
    """
    known = sorted(set(levels))
    # From the last level on: the work from there to the end, and the starts behind it.
    best: dict[int, tuple[int, tuple[int, ...]]] = {}
    for at in reversed(known):
        best[at] = (pass_tokens + len(levels) * (columns - at), (at,))
        for further in known[known.index(at) + 1 :]:
            rows = sum(level < further for level in levels)
            work = pass_tokens + rows * (further - at) + best[further][0]
            if work < best[at][0]:
                best[at] = (work, (at, *best[further][1]))
    return best[known[0]][1]


def catch_up(model: PreTrainedModel, batch: Batch, loaded: Loaded) -> int:
    """Makes the passes before the last, into the loaded tensors; returns the column at which the last starts."""
    passes = starts(loaded.levels, batch.columns)
    if len(passes) == 1:
        return passes[0]
    accepted = inspect.signature(model.forward).parameters
    mask = batch.mask()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start, end in pairwise(passes):
        rows = torch.tensor([row for row, level in enumerate(loaded.levels) if level < end])
        past_key_values = DynamicCache()
        past_key_values.layers.extend(DynamicLayer() for _ in loaded.kv)
        if start:
            for layer, (keys, values) in zip(past_key_values.layers, loaded.kv, strict=True):
                layer.update(keys[rows, :, :start], values[rows, :, :start])
        inputs = {"input_ids": batch.input_ids[rows, start:end], "use_cache": True}
        if any(batch.padding[row] for row in rows.tolist()):
            inputs["attention_mask"] = mask[rows, :end]
        if "position_ids" in accepted:
            inputs["position_ids"] = positions[rows, start:end]
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        with torch.no_grad():
            model(**inputs, past_key_values=past_key_values)
        for layer, (keys, values) in zip(past_key_values.layers, loaded.kv, strict=True):
            keys[rows, :, start:end] = layer.keys[:, :, start:]
            values[rows, :, start:end] = layer.values[:, :, start:]
    return passes[-1]
