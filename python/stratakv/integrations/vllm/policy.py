"""`StrataPolicy`: the eviction of this package inside vLLM's own CPU cache.

vLLM keeps the bytes, and says what is held; the order in which chunks leave is that of ``ram.eviction``. vLLM hands a
policy no options, so there is a class for each: `StrataPolicy` is ``adaptive``.

Chunks of one request and cache group follow one another. That is told as far as it is known when they come, and in full
when the request ends, so a prefix leaves from its end, and a later prompt finds its start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, get_offload_group_idx
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from stratakv import _native

__all__ = ["ArcPolicy", "LfuPolicy", "LruPolicy", "S3FifoLongPolicy", "S3FifoPolicy", "StrataPolicy", "WTinyLfuPolicy"]


@dataclass(slots=True)
class _Seen:
    """What one request has shown to one policy."""

    policy: StrataPolicy
    # The last chunk of each cache group.
    last: dict[int, OffloadKey]
    # Whether accesses are told as they happen; before 0.33 they are told at the end alone.
    accessed: bool = False


class StrataPolicy(CachePolicy):
    """Which chunk leaves next: ``adaptive``, whichever policy does best on a sample of the present load."""

    eviction: ClassVar[str] = "adaptive"

    def __init__(self, cache_capacity: int) -> None:
        """Of a cache of so many chunks."""
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._order = _native.EvictionPolicy(self.eviction, cache_capacity)
        # Of the chunks that are about to come: which one each continues.
        self._after: dict[OffloadKey, OffloadKey] = {}

    @property
    def running(self) -> str:
        """The policy that runs at present; another than `eviction` only for ``adaptive``."""
        return self._order.running

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """The chunk of a key, if it is here."""
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None) -> None:
        """A chunk came; since 0.33 vLLM says for which request."""
        self._order.insert(key, self._after.get(key), chunk.ref_cnt != 0)
        self._chunks[key] = chunk

    def remove(self, key: OffloadKey) -> None:
        """A chunk left without being evicted."""
        del self._chunks[key]
        self._order.remove(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Chunks were used; they follow one another."""
        self._order.access(list(keys), [])

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """These are about to come: notes what each continues. That is no use of them."""
        seen, self._after = self._seen(req_context), {}
        for key in keys:
            group = get_offload_group_idx(key)
            if group in seen.last:
                self._after[key] = seen.last[group]
            seen.last[group] = key

    def on_request_access(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """A request asks for these for the first time; only vLLM 0.33 and later tell it."""
        seen = self._seen(req_context)
        seen.accessed = True
        groups: dict[int, list[OffloadKey]] = {}
        for key in keys:
            groups.setdefault(get_offload_group_idx(key), []).append(key)
        for group, path in groups.items():
            seen.last[group] = path[-1]
            self._order.access(path, [])

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """All that a request asked for, each group from its start on: what it reused was used, what is new was not."""
        accessed = self._seen(req_context).accessed
        for path in key_groups:
            if accessed:
                self._order.follow(list(path))
            else:
                self._order.access(list(path), [key for key in path if key not in reused_keys])

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Takes out `n` chunks that are neither held nor protected; ``None``: there are not so many, and all stay.

        What the coming chunks continue leaves after all others, so that they are not stored behind a gap.
        """
        gone = self._order.evict(n, list(protected), list(set(self._after.values())))
        return None if gone is None else [(key, self._chunks.pop(key)) for key in map(OffloadKey, gone)]

    def clear(self) -> None:
        """Forgets all chunks, and what was learnt from them."""
        self._chunks.clear()
        self._after.clear()
        self._order.clear()

    def mark_evictable(self, key: OffloadKey) -> None:
        """Nobody uses a chunk any more."""
        self._order.hold(key, False)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Somebody uses a chunk."""
        self._order.hold(key, True)

    def _seen(self, request: ReqContext) -> _Seen:
        seen: _Seen | None = request.get_state(_Seen)
        if seen is None or seen.policy is not self:
            seen = _Seen(self, {})
            request.set_state(seen)
        return seen


class LruPolicy(StrataPolicy):
    """Least recently used."""

    eviction = "lru"


class LfuPolicy(StrataPolicy):
    """Least frequently used, aged. Chunks cost alike, so ``gdsf`` would be the same."""

    eviction = "lfu"


class S3FifoPolicy(StrataPolicy):
    """S3-FIFO."""

    eviction = "s3fifo"


class S3FifoLongPolicy(StrataPolicy):
    """S3-FIFO for what comes back late."""

    eviction = "s3fifo_long"


class ArcPolicy(StrataPolicy):
    """ARC."""

    eviction = "arc"


class WTinyLfuPolicy(StrataPolicy):
    """W-TinyLFU."""

    eviction = "wtinylfu"
