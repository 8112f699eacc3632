"""`model.generate`, with what is cached before it and what it computed after it.

Whatever ends a generation, what it computed is put: its last token, a stopping criterion, or an exception of a
streamer, an interrupt, a model. After an exception only those columns count that were complete when a token was drawn
the last time; a forward pass that broke off may have left half of a column.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache, StoppingCriteriaList

from stratakv import InputError, ModelCache, StrataKVError, log
from stratakv.integrations.transformers.catchup import catch_up
from stratakv.integrations.transformers.content import Hashed, Loaded, Restored, load, put
from stratakv.integrations.transformers.padding import Batch
from stratakv.integrations.transformers.refusals import require_plain_arguments, require_servable, setting

__all__ = ["generate", "run", "sequences"]

_log = log.of(__name__)

# What transformers generates if nothing says how much.
_DEFAULT_NEW_TOKENS = 20


class _Witness:
    """A stopping criterion that sees every token as it is drawn, and stops nothing."""

    def __init__(self) -> None:
        """Has seen nothing yet."""
        self.seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 (transformers calls it)
        """Takes the tokens up to the one just drawn, `[rows, tokens]`."""
        self.seen = input_ids
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    model: PreTrainedModel,
    cache: ModelCache,
    input_ids: torch.Tensor,
    *,
    adapter: str = "",
    tenant: str = "",
    on_restored: Callable[[Restored], None] | None = None,
    **generate_kwargs: Any,  # noqa: ANN401 (whatever `model.generate` takes)
) -> Any:  # noqa: ANN401 (whatever `model.generate` returns)
    """`model.generate` that computes only what is not cached, and caches what it computed.

    Prompts and answers are put, so the next turn of a conversation reuses both: also when a streamer, a stopping
    criterion or an exception ends the generation early.

    Rows of a batch may be of different lengths, padded on the left, and each reuses what is cached of it. All rows are
    computed in one forward pass from the least column that all of them have loaded, padding included, so it is as wide
    as the longest uncached rest; rows that lag far behind the others are computed up to them first, by themselves.

    Args:
        model: In evaluation mode, on the CPU, with the geometry that `cache` was registered with.
        cache: The model's cache.
        input_ids: Whole prompts, `[rows, tokens]`. Rows share nothing while they are computed together: what one
            puts, the next call finds.
        adapter: As in `ModelCache.match`, of all rows.
        tenant: As in `ModelCache.match`, of all rows.
        on_restored: Called before anything is computed with what was found.
        **generate_kwargs: For `model.generate`; greedy search and sampling of one sequence per prompt. Without an
            `attention_mask`, padding is told by `pad_token_id` as transformers does. With
            `cache_implementation="static"`, or an empty `StaticCache` as `past_key_values`, keys and values are loaded
            straight into the static tensors.

    Returns:
        What `model.generate` returns: `[rows, tokens]`, or its output object with `return_dict_in_generate`.

    Raises:
        InputError: An argument with which the cache could not be used, or the output could differ.
    """
    output, _ = run(
        model, cache, input_ids, generate_kwargs, adapter=adapter, tenant=tenant, on_restored=on_restored, hashed=None
    )
    return output


def sequences(output: Any) -> torch.Tensor:  # noqa: ANN401 (whatever `model.generate` returns)
    """Prompts and answers of what `model.generate` returned, `[rows, tokens]`."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def run(
    model: PreTrainedModel,
    cache: ModelCache,
    input_ids: torch.Tensor,
    generate_kwargs: dict[str, Any],
    *,
    adapter: str,
    tenant: str,
    on_restored: Callable[[Restored], None] | None,
    hashed: Hashed | None,
) -> tuple[Any, int]:
    """What `generate` does; with `hashed`, of one prompt that is hashed already, and extended by the answer.

    Returns:
        What `model.generate` returned, and how many leading tokens are cached now, of all rows together.
    """
    require_servable(model, cache)
    require_plain_arguments(model, generate_kwargs)
    batch = _prompts(model, input_ids, generate_kwargs)
    kwargs, static = _with_cache(model, batch, generate_kwargs)
    loaded = load(cache, batch, static=static, hashed=hashed, adapter=adapter, tenant=tenant)
    if on_restored is not None:
        on_restored(loaded.restored)
    past_key_values = _started(model, batch, loaded)

    witness = _Witness()
    criteria = kwargs.pop("stopping_criteria", None) or []
    stored = 0

    def keep(tokens: torch.Tensor) -> int:
        grown = Batch(input_ids=tokens.detach(), padding=batch.padding)
        ends = _ends(model, grown, batch.columns, generate_kwargs)
        try:
            return put(cache, grown, past_key_values, ends=ends, hashed=hashed, adapter=adapter, tenant=tenant)
        except StrataKVError as problem:
            _log.warning("turn_not_put", "keys and values not put, the next turn computes them again: %s", problem)
            return 0

    try:
        output = model.generate(
            batch.input_ids,
            past_key_values=past_key_values,
            # First: what it has not seen is not kept, should another one raise.
            stopping_criteria=StoppingCriteriaList([witness, *criteria]),
            **kwargs,
        )
    except BaseException:
        # An interrupt, too: it is how a generation is stopped by hand.
        if witness.seen is not None:
            keep(witness.seen[:, :-1])
        raise
    stored = keep(sequences(output))
    return output, stored


def _prompts(model: PreTrainedModel, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Batch:
    """The prompts, padded as `model.generate` would take them to be."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        raise InputError("input_ids is not a tensor of [rows, tokens]")
    if input_ids.shape[1] == 0:
        raise InputError("input_ids is empty")
    mask = kwargs.get("attention_mask")
    if mask is not None and tuple(mask.shape) != tuple(input_ids.shape):
        raise InputError(f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}")
    pad, stops = _padding_token(model, kwargs)
    if mask is None and pad is not None and pad not in stops and bool((input_ids == pad).any()):
        try:
            batch = Batch.of(input_ids, (input_ids != pad).long())
        except InputError as problem:
            raise InputError(
                f"without an attention_mask, transformers takes each token {pad} (pad_token_id) for padding: {problem}"
            ) from problem
    else:
        batch = Batch.of(input_ids, mask)
    if any(batch.padding) and "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"{model.config.model_type} takes no position_ids, so padding changes keys; pass each prompt alone"
        )
    return batch


def _padding_token(model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[int | None, set[int]]:
    """What finished rows are filled with, and the tokens that finish them."""
    stops = setting("eos_token_id", model, kwargs)
    stops = set() if stops is None else set(torch.as_tensor(stops).flatten().tolist())
    pad = setting("pad_token_id", model, kwargs)
    if pad is None:
        first = setting("eos_token_id", model, kwargs)
        return (None if first is None else int(torch.as_tensor(first).flatten()[0])), stops
    return int(pad), stops


def _with_cache(
    model: PreTrainedModel, batch: Batch, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], StaticCache | None]:
    """The arguments for `model.generate` without the cache, and the static cache to load into, if there is one."""
    kwargs = {**kwargs, "attention_mask": batch.mask()}
    given = kwargs.pop("past_key_values", None)
    wanted = setting("cache_implementation", model, kwargs)
    room = setting("max_cache_len", model, kwargs)
    # The cache is handed over; beside one, transformers wants nothing said about it.
    for name, value in (("cache_implementation", wanted), ("max_cache_len", room)):
        if value is not None:
            kwargs[name] = None
    if given is not None:
        if type(given) is not StaticCache:
            raise InputError(
                f"past_key_values is {type(given).__name__}; the cache provides it, and only an empty StaticCache is "
                "loaded into: call restore and model.generate to use your own"
            )
        return kwargs, given
    if wanted != "static":
        return kwargs, None
    new = setting("max_new_tokens", model, kwargs)
    if new is None:
        # Which of the two holds is for transformers to say; room that is not used costs memory, not correctness.
        new = max(_DEFAULT_NEW_TOKENS, (setting("max_length", model, kwargs) or 0) - batch.columns)
    columns = max(batch.columns + new, room or 0)
    return kwargs, StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=columns)


def _started(model: PreTrainedModel, batch: Batch, loaded: Loaded) -> Any:  # noqa: ANN401 (a transformers cache)
    """The cache that generation starts from, rows that lagged behind included."""
    columns = catch_up(model, batch, loaded)
    return loaded.restored.past_key_values if columns == loaded.restored.tokens else loaded.held(columns)


def _ends(model: PreTrainedModel, batch: Batch, prompt: int, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The column at which each row ends: rows that finish before others are filled up to them with padding."""
    pad, _ = _padding_token(model, kwargs)
    ends = []
    for row in range(batch.rows):
        end = batch.columns
        while pad is not None and end > prompt and int(batch.input_ids[row, end - 1]) == pad:
            end -= 1
        ends.append(end)
    return tuple(ends)
