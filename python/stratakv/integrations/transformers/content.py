"""What a transformers cache holds of a batch, loaded from the store and put into it.

    columns   0 1 2 3 4 5 6 7 8 9
    row 0     · · · a a a a b b b        `·` padding, zeros; `a` loaded; `b` not: it is computed
    row 1     a a a a a a b b b b
                          ▲ 6: the least that all rows hold, padding included

A cache of transformers has one length for all rows, and the next forward pass computes all columns behind it. Each
row's prefix is loaded right behind its padding, where a forward pass would have left it, and the cache ends at the
least column to which all rows hold: what is computed is as wide as the longest uncached rest. Padding columns are
zeros; attention is masked there, and what is not a number would not stay behind a mask.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from stratakv import Explanation, InputError, Match, ModelCache, StrataKVError, TokenSequence, log
from stratakv.integrations.transformers.padding import Batch
from stratakv.integrations.transformers.refusals import require_empty_static, require_plain_cache, torch_dtype

__all__ = ["Hashed", "Loaded", "Restored", "load", "put", "restore", "store"]

_log = log.of(__name__)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What of one or more prompts was found, ready to be continued.

    Attributes:
        past_key_values: Exactly `tokens` columns, for `model.generate` or `model(...)`, which extend it in place: it
            serves one request.
        tokens: How many leading columns of `input_ids` need no prefill: of one prompt without padding its tokens, of a
            batch what all rows hold, padding included. 0 after a miss, at most all columns less one.
        rows: How many leading tokens of each prompt were loaded, padding not counted.
        explanations: For each prompt, which tier each block came from and why there were not more; None if there was
            nothing to ask for or the cache could not be asked.
        seconds: Time that the matches and the loads took.
    """

    past_key_values: DynamicCache | StaticCache
    tokens: int
    rows: tuple[int, ...]
    explanations: tuple[Explanation | None, ...]
    seconds: float

    @property
    def explanation(self) -> Explanation | None:
        """That of the first prompt, which is the only one unless there is a batch."""
        return self.explanations[0]


class Hashed:
    """The tokens of one sequence that are hashed already, so that a longer one hashes only what is new.

    Keys and values are put under these hashes, so it is compared with each prompt, token by token.
    """

    def __init__(self, cache: ModelCache, tokens: torch.Tensor, *, adapter: str, tenant: str) -> None:
        """Hashes the first tokens.

        Args:
            cache: the model's cache.
            tokens: `[tokens]`.
            adapter: as in `ModelCache.sequence`.
            tenant: as in `ModelCache.sequence`.
        """
        self.sequence: TokenSequence = cache.sequence(tokens, adapter=adapter, tenant=tenant)
        self._tokens = tokens

    def leads(self, tokens: torch.Tensor) -> bool:
        """Whether some tokens start with those that are hashed."""
        count = len(self._tokens)
        return len(tokens) >= count and torch.equal(tokens[:count], self._tokens)

    def extend(self, tokens: torch.Tensor) -> None:
        """Hashes what `tokens` have behind those that are hashed; they have to start with these."""
        self.sequence.extend(tokens[len(self._tokens) :])
        self._tokens = tokens


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Tensors with what was loaded of a batch.

    Attributes:
        kv: Keys and values of each layer, `[rows, heads, columns, dim]`; empty if nothing was loaded.
        levels: The column to which each row holds what a forward pass would have left, padding included.
        static: Whose tensors they are; None if they belong to no cache yet.
        restored: What was found, and a cache of it.
    """

    kv: list[tuple[torch.Tensor, torch.Tensor]]
    levels: tuple[int, ...]
    static: StaticCache | None
    restored: Restored

    def held(self, columns: int) -> DynamicCache | StaticCache:
        """A cache of the leading columns, without a copy."""
        return _held(self.kv, columns, self.static, len(self.restored.past_key_values.layers))


def restore(
    cache: ModelCache,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    past_key_values: StaticCache | None = None,
    adapter: str = "",
    tenant: str = "",
) -> Restored:
    """Loads the longest cached prefix of each prompt into a cache that a model continues.

    The last token is never restored: the model has to compute at least one to say what follows it. Continue with the
    same `input_ids` and `attention_mask`; `model.generate` derives the position ids of a padded row from its mask.

    Args:
        cache: The model's cache, registered with `geometry(model)`.
        input_ids: Whole prompts, `[rows, tokens]`, or `[tokens]` for one, integers on the CPU.
        attention_mask: Which columns are padding, of the same shape; None: none is.
        past_key_values: An empty `StaticCache` to load into; None: a `DynamicCache` is made.
        adapter: As in `ModelCache.match`.
        tenant: As in `ModelCache.match`.

    Raises:
        InputError: `input_ids` are no prompts, are padded otherwise than on the left, or do not fit into
            `past_key_values`.
    """
    batch = Batch.of(input_ids, attention_mask)
    return load(cache, batch, static=past_key_values, adapter=adapter, tenant=tenant).restored


def store(
    cache: ModelCache,
    input_ids: torch.Tensor,
    past_key_values: DynamicCache | StaticCache,
    *,
    attention_mask: torch.Tensor | None = None,
    adapter: str = "",
    tenant: str = "",
) -> int:
    """Puts the keys and values that a transformers cache holds; returns how many leading tokens are cached now.

    Of a batch it is the sum over its rows. Padding is not stored.

    Args:
        cache: The model's cache, registered with `geometry(model)`.
        input_ids: The tokens, `[rows, tokens]`, or `[tokens]` for one row. Those past the end of `past_key_values` are
            left out: after `generate` that is the last one.
        past_key_values: Their keys and values, as the model left them.
        attention_mask: Which columns are padding; that of the prompts will do. None: none is.
        adapter: As in `ModelCache.put`.
        tenant: As in `ModelCache.put`.

    Raises:
        InputError: The two do not belong together or to this cache's geometry.
        StrataKVError: The cache is closed or cannot take more.
    """
    batch = Batch.of(input_ids, attention_mask)
    return put(cache, batch, past_key_values, adapter=adapter, tenant=tenant)


def load(
    cache: ModelCache,
    batch: Batch,
    *,
    static: StaticCache | None = None,
    hashed: Hashed | None = None,
    adapter: str,
    tenant: str,
) -> Loaded:
    """Matches and loads each row of a batch.

    Args:
        cache: The model's cache.
        batch: The prompts.
        static: Where to load to; None: new tensors.
        hashed: The one prompt of the batch, hashed: it has its adapter and tenant already.
        adapter: As in `ModelCache.match`.
        tenant: As in `ModelCache.match`.

    Raises:
        InputError: The batch does not fit into `static`.
    """
    shape = cache.geometry
    dtype = torch_dtype(shape)
    if static is not None:
        require_empty_static(static, shape, batch)
        # Tensors at once, not with the first forward pass: they are loaded into. Again does nothing.
        static.early_initialization(batch.rows, shape.kv_heads, shape.head_dim, dtype, torch.device("cpu"))
    started = time.perf_counter()
    problems: list[StrataKVError] = []
    explanations: list[Explanation | None] = [None] * batch.rows
    loaded = [0] * batch.rows
    kv = [(layer.keys, layer.values) for layer in static.layers] if static is not None else []
    with ExitStack() as leases:
        matches: dict[int, Match] = {}
        for row in range(batch.rows):
            tokens = batch.tokens(row)
            if len(tokens) > 1:
                try:
                    match = (
                        cache.match(tokens[:-1], adapter=adapter, tenant=tenant)
                        if hashed is None
                        else cache.match(hashed.sequence)
                    )
                except InputError:
                    raise
                except StrataKVError as problem:
                    problems.append(problem)
                else:
                    matches[row] = leases.enter_context(match)
        width = max((batch.padding[row] + match.tokens for row, match in matches.items() if match.tokens), default=0)
        if static is None and width:
            size = (batch.rows, shape.kv_heads, width, shape.head_dim)
            # Rows without padding are written from their first column on, and cut where they are not.
            empty = torch.zeros if any(batch.padding) else torch.empty
            kv = [(empty(size, dtype=dtype), empty(size, dtype=dtype)) for _ in range(shape.layers)]
        for row, match in matches.items():
            pad = batch.padding[row]
            try:
                if match.tokens:
                    behind = [(keys[:, :, pad:], values[:, :, pad:]) for keys, values in kv]
                    # A sequence that was hashed ends with the token that is computed anyway.
                    loaded[row] = min(match.load(behind, layout="BHND", batch=row), batch.columns - pad - 1)
                explanations[row] = match.explain()
            except InputError:
                raise
            except StrataKVError as problem:
                problems.append(problem)
    if problems:
        _log.warning(
            "prefix_not_restored",
            "prefix not restored of %d of %d prompts, they are computed: %s",
            len(problems),
            batch.rows,
            problems[0],
        )
    # Where nothing was loaded, padding is computed with the rest: that is the uncached run.
    levels = tuple(map(sum, zip(batch.padding, loaded, strict=True))) if any(loaded) else (0,) * batch.rows
    columns = min(levels)
    restored = Restored(
        past_key_values=_held(kv, columns, static, shape.layers),
        tokens=columns,
        rows=tuple(loaded),
        explanations=tuple(explanations),
        seconds=time.perf_counter() - started,
    )
    return Loaded(kv=kv, levels=levels, static=static, restored=restored)


def put(
    cache: ModelCache,
    batch: Batch,
    past_key_values: DynamicCache | StaticCache,
    *,
    ends: tuple[int, ...] | None = None,
    hashed: Hashed | None = None,
    adapter: str,
    tenant: str,
) -> int:
    """Puts each row of a batch without its padding.

    Args:
        cache: The model's cache.
        batch: Prompts and what was generated.
        past_key_values: Their keys and values.
        ends: The column at which each row's tokens end; None: with the batch.
        hashed: As in `load`; extended by what is put.
        adapter: As in `ModelCache.put`.
        tenant: As in `ModelCache.put`.

    Returns:
        Leading tokens that are cached now, of all rows together.

    Raises:
        InputError: Tokens and tensors do not belong together or to this cache's geometry.
        StrataKVError: The cache is closed or cannot take more.
    """
    held = require_plain_cache(past_key_values, cache.geometry, batch.rows)
    cached = 0
    for row, pad in enumerate(batch.padding):
        end = min(held, batch.columns if ends is None else ends[row])
        count = end - pad
        if count < cache.geometry.block_tokens:
            continue
        kv = [
            (layer.keys[:, :, pad:end].detach(), layer.values[:, :, pad:end].detach())
            for layer in past_key_values.layers
        ]
        tokens = batch.tokens(row)[:count]
        if hashed is None:
            cached += cache.put(tokens, kv, layout="BHND", batch=row, adapter=adapter, tenant=tenant)
        else:
            hashed.extend(tokens)
            cached += cache.put(hashed.sequence, kv, layout="BHND", batch=row)
    return cached


def _held(
    kv: list[tuple[torch.Tensor, torch.Tensor]], columns: int, static: StaticCache | None, layers: int
) -> DynamicCache | StaticCache:
    """Makes loaded tensors the content of a cache without copying them, as its layers' `update` would."""
    if static is not None:
        for layer in static.layers:
            # In place: a compiled model knows this tensor by its address.
            layer.cumulative_length.fill_(columns)
        return static
    past_key_values = DynamicCache()
    past_key_values.layers.extend(DynamicLayer() for _ in range(layers))
    if columns:
        for layer, (keys, values) in zip(past_key_values.layers, kv, strict=True):
            layer.keys, layer.values = keys[:, :, :columns], values[:, :, :columns]
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.is_initialized = True
    return past_key_values
