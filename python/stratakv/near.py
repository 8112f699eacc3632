"""What comes up to RAM before it is asked for: prefixes near to a prompt that found too little, while that pays.

    put ─ ─▶ queue ─(behind)─▶ embedded ─▶ a point in Qdrant
    match that found too little ─ ─▶ queue ─(behind)─▶ embedded ─▶ near points ─▶ their blocks: SSD or Dragonfly ─▶ RAM
    of the bytes that came so, how many were asked for since? too few: nothing comes for a while

A near prompt has other keys and values: what comes is served to who asks for it by its own tokens, and to nobody else.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stratakv import _native, log
from stratakv.cache import ModelCache
from stratakv.embedding import Embedding, embedding_of
from stratakv.errors import ClosedError, InputError
from stratakv.sections import QdrantConfig
from stratakv.tiers.behind import BehindStats, WriteBehind
from stratakv.tiers.qdrant import Near, Point, Qdrant

_log = log.of(__name__)

# Prompts that wait to be embedded; the oldest goes where one more comes.
_WAITING = 1024
# Tokens of a prompt that are embedded.
_TOKENS = 4096
# Points that are sent at a time.
_POINTS = 64
# Near prefixes that are brought up for one prompt.
_LIMIT = 3
# Seconds that closing and flushing wait.
_DRAIN_S = 2.0
# Whether it pays is seen after so many bytes and seconds: so much of them was asked for, or nothing comes for a while.
_JUDGED_BYTES, _JUDGED_S, _LEAST_USE = 64 << 20, 30.0, 0.1
_FIRST_PAUSE_S, _MOST_PAUSE_S = 600.0, 7200.0
# Seconds between two times of dropping points that are too old.
_UPKEEP_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NearStats:
    """How bringing up what is near goes.

    Attributes:
        prefetching: whether it is done; it pauses where it does not pay.
        lifted: bytes that came to RAM by it.
        hit: bytes of those that a match asked for since.
        paused: how often it was found not to pay.
        forgotten: prompts that were not embedded, since too many waited.
        behind: what became of points that were to be written.
    """

    prefetching: bool
    lifted: int
    hit: int
    paused: int
    forgotten: int
    behind: BehindStats


@dataclass(frozen=True, slots=True)
class _Note:
    """A prompt that was put, or that found too little."""

    kind: Literal["put", "missed"]
    cache: ModelCache
    # Token ids, as they were given; or a sequence's, 4 bytes each.
    tokens: Any
    text: str | None
    adapter: str
    tenant: str


class SemanticIndex:
    """Points of what is stored, and what is near. Any thread may use it."""

    def __init__(
        self,
        tier: Qdrant,
        config: QdrantConfig,
        secret: str | None,
        lifted: Callable[[], tuple[int, int]],
        missed: Callable[[], list[tuple[ModelCache, str, str, bytes]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the thread.

        Args:
            tier: where the points are.
            config: what makes them, and how much may come.
            secret: the store's, which keys the vectors.
            lifted: bytes that came to RAM by this, and those of them that were asked for since.
            missed: prompts of which matches found too little: cache, adapter, tenant, and token ids.
            clock: seconds.

        Raises:
            ConfigError: the embedding cannot be had.
        """
        self.tier, self.config, self._lifted, self._missed, self._clock = tier, config, lifted, missed, clock
        self._embedding: Embedding = embedding_of(config.embedding, config.dimension, (secret or "").encode())
        self._notes: deque[_Note] = deque()
        self._lock = threading.Lock()
        self._forgotten = 0
        # What had come, and was asked for: when it was judged last, and at a look since. Until when it pauses, and how
        # long the next time.
        self._judged = self._looked = (*lifted(), clock())
        self._closing = False
        self._paused_until, self._pause_s, self._paused = 0.0, _FIRST_PAUSE_S, 0
        self._upkeep_at = clock() + _UPKEEP_S
        self._behind = WriteBehind("stratakv-near", self._take, self._write, interval_s=0.02, tries=8)

    @property
    def embeds(self) -> Literal["tokens", "text"]:
        """What prompts are embedded by."""
        return self._embedding.embeds

    def note(
        self,
        kind: Literal["put", "missed"],
        cache: ModelCache,
        tokens: object,
        text: str | None,
        adapter: str,
        tenant: str,
    ) -> None:
        """Has a prompt embedded behind the call that it came with."""
        if self.embeds == "text" and text is None:
            return
        if kind == "missed" and (not self.config.prefetch_bytes or self._clock() < self._paused_until):
            return
        # The caller goes on with what is his.
        kept: Any
        if isinstance(tokens, _native.TokenSequence):
            kept = tokens._ids()
        elif isinstance(tokens, list | tuple):
            kept = tokens[:]
        else:
            kept = np.array(tokens if hasattr(tokens, "__array__") else np.from_dlpack(tokens))  # type: ignore[arg-type]
        with self._lock:
            self._notes.append(_Note(kind, cache, kept, text, adapter, tenant))
            if len(self._notes) > _WAITING:
                self._notes.popleft()
                self._forgotten += 1

    def near(
        self, cache: ModelCache, asked: object, adapter: str, tenant: str, limit: int
    ) -> tuple[list[Near], str | None]:
        """Stored prefixes near to tokens, or to a text if that is embedded; and why none, if that is not known.

        Raises:
            InputError: a text where tokens are embedded, or the other way round.
        """
        if isinstance(asked, str) != (self.embeds == "text"):
            other = "tokens" if self.embeds == "tokens" else "a text"
            raise InputError(f"qdrant.embedding is {self.config.embedding!r}: give {other}")
        space = cache.space(adapter, tenant)
        item = asked if isinstance(asked, str) else _ids(asked)[:_TOKENS]
        (vector,) = self._embedding([item], space)
        return self.tier.suggest(cache.fingerprint, space, vector, limit=limit)

    def flush(self) -> bool:
        """Writes what was put up to now; whether the server took it."""
        return self._behind.flush(_DRAIN_S)

    def stats(self) -> NearStats:
        """How it goes."""
        lifted, hit = self._lifted()
        return NearStats(
            prefetching=bool(self.config.prefetch_bytes) and self._clock() >= self._paused_until,
            lifted=lifted,
            hit=hit,
            paused=self._paused,
            forgotten=self._forgotten,
            behind=self._behind.stats(),
        )

    def close(self) -> None:
        """Writes what is left, if the server takes it, and ends."""
        # Nobody is served any more: nothing is brought up.
        self._closing = True
        self._behind.close(_DRAIN_S)
        self.tier.close()

    def _take(self) -> list[_Note]:
        if self._clock() >= self._upkeep_at:
            self._upkeep_at = self._clock() + _UPKEEP_S
            self.tier.forget_before(None, time.time() - self.config.keep_days * 86_400)
        with self._lock:
            notes, self._notes = list(self._notes), deque()
        if self.embeds == "tokens" and self.config.prefetch_bytes:
            missed = self._missed()
            if self._clock() >= self._paused_until:
                notes += (_Note("missed", cache, ids, None, adapter, tenant) for cache, adapter, tenant, ids in missed)
        return notes

    def _write(self, notes: list[_Note]) -> list[_Note]:
        # Who asked waits for nobody's points.
        for note in (note for note in notes if note.kind == "missed" and not self._closing):
            try:
                self._bring(note)
            except (ClosedError, InputError) as error:
                _log.debug("near_not_lifted", "nothing near was brought up: %s", error)
        left: list[_Note] = []
        put = (note for note in notes if note.kind == "put")
        while some := list(itertools.islice(put, _POINTS)):
            points = [point for note in some if (point := self._point(note)) is not None]
            if points and not self.tier.store(points):
                left += some
        return left

    def _bring(self, note: _Note) -> None:
        now = self._clock()
        self._judge(now)
        names = note.cache.names(_ids(note.tokens), note.adapter, note.tenant)
        if now < self._paused_until or note.cache.in_ram(names) == len(names):
            return
        asked = note.text if self.embeds == "text" else note.tokens
        found, _ = self.near(note.cache, asked, note.adapter, note.tenant, _LIMIT)
        left = int(self.config.prefetch_bytes)
        for each in found:
            if left <= 0:
                break
            left -= note.cache.lift(list(each.chain), note.adapter, note.tenant, "near", left)

    def _judge(self, now: float) -> None:
        """Whether what came was asked for often enough for the time it had."""
        if now - self._looked[2] < _JUDGED_S:
            return
        # What had come by the look before had its time to be asked for.
        now_lifted, hit = self._lifted()
        lifted, (lifted_then, hit_then, _) = self._looked[0], self._judged
        self._looked = (now_lifted, hit, now)
        if lifted - lifted_then < _JUDGED_BYTES:
            return
        use = (hit - hit_then) / (lifted - lifted_then)
        self._judged = (lifted, hit, now)
        if use >= _LEAST_USE:
            self._pause_s = _FIRST_PAUSE_S
            return
        self._paused_until, self._paused = now + self._pause_s, self._paused + 1
        _log.warning(
            "near_paused",
            "of what was brought up for near prompts %.3g %% was asked for: nothing is for %.3g s",
            100 * use,
            self._pause_s,
            used=use,
            pause_s=self._pause_s,
        )
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)

    def _point(self, note: _Note) -> Point | None:
        try:
            ids = _ids(note.tokens)
            chain = note.cache.names(ids, note.adapter, note.tenant)
            if not chain:
                return None
            space = note.cache.space(note.adapter, note.tenant)
            item = note.text if self.embeds == "text" else ids[:_TOKENS]
            (vector,) = self._embedding([item], space)
        except (ClosedError, InputError) as error:
            _log.warning("prefix_without_point", "a prefix has no point: %s", error, model=note.cache.name)
            return None
        size = note.cache.geometry.block_tokens
        return Point(
            name=chain[-1],
            model=note.cache.fingerprint,
            space=space,
            vector=vector,
            chain=tuple(chain),
            tokens=size * len(chain),
            stored_at=time.time(),
        )


def _ids(tokens: object) -> Any:  # noqa: ANN401 - an array
    if isinstance(tokens, _native.TokenSequence):
        tokens = tokens._ids()
    return np.frombuffer(tokens, "<u4") if isinstance(tokens, bytes) else np.asarray(tokens)
