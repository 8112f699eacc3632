"""Keeps the catalog's database as this node is, behind the calls; and hears what is retired there.

store's log, ends of puts and matches, usage ─▶ `Keeper` ─(behind)─▶ PostgreSQL
versions retired there ─▶ `Keeper` ─▶ this node drops their blocks
what was asked for most ─▶ `Keeper` ─▶ comes to RAM when a model is registered
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stratakv import _native, log
from stratakv.config import Geometry
from stratakv.errors import ClosedError
from stratakv.tiers.behind import BehindStats, WriteBehind
from stratakv.tiers.postgres import Postgres, PrefixRow, Row

_log = log.of(__name__)

# Prefixes that are told at a time.
_PREFIXES = 1000
# Seconds between two signs of life, two rows of usage, and two times of upkeep.
_BEAT_S, _USAGE_S, _UPKEEP_S = 10.0, 60.0, 3600.0
# Seconds that closing waits for what is to be told.
_DRAIN_S = 2.0
# Of these the hottest are brought up when a model is registered, as far as their bytes go.
_WARM_PREFIXES = 1000


class Entry(Protocol):
    """A registered model."""

    @property
    def model(self) -> _native.Model:
        """Its native half."""

    @property
    def geometry(self) -> Geometry:
        """Shape of its blocks."""

    @property
    def weights_version(self) -> str:
        """Names its weights."""


@dataclass(slots=True)
class _Batch:
    """What the database is told at a time; what it was told already is no more in it."""

    anew: bool
    rows: list[Row]
    prefixes: list[Any]
    usage: list[tuple[int, str, str, list[int]]]


class Keeper:
    """Keeps the database as this node is, and hears what is retired there."""

    def __init__(
        self,
        postgres: Postgres,
        store: _native.Store,
        models: Callable[[], Mapping[str, Entry]],
        retire: Callable[[set[bytes]], None],
        warm: Callable[[str, list[tuple[str | None, str | None, list[bytes]]]], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the threads.

        Args:
            postgres: the database.
            store: what is told of.
            models: those registered now, by name.
            retire: is told of which fingerprints the version is retired, of all of them each time.
            warm: brings prefixes up, those first that are worth most; how many bytes came.
            clock: seconds.
        """
        self._postgres, self._store, self._models, self._retire, self._warm = postgres, store, models, retire, warm
        self._clock = clock
        self._since: int | None = None
        # From now on it is noted where puts and matches end.
        store.used(0)
        self._ids: dict[str, tuple[bytes, int]] = {}
        # What each tenant of each registration of a model had counted when it was told last.
        self._told: dict[tuple[int, str], list[int]] = {}
        self._generation = 0
        # Models that were registered anew since what is being told was taken: whose it is, is not known.
        self._changed: set[str] = set()
        self._due = dict.fromkeys(("beat", "usage", "upkeep"), clock())
        self._opened = False
        # Fingerprints; the threads tell of them one at a time.
        self._retired: set[bytes] = set()
        self._telling = threading.Lock()
        self._block_tokens: dict[str, int] = {}
        self._stop = threading.Event()
        self._warming: list[threading.Thread] = []
        self._warmed: set[bytes] = set()
        self._behind = WriteBehind(
            "stratakv-catalog",
            self._take,
            self._write,
            interval_s=postgres.config.interval_s,
            dropped=self._tell_all,
        )
        self._watcher = threading.Thread(target=self._watch, name="stratakv-retired", daemon=True)
        self._watcher.start()

    def id_of(self, model: str) -> int | None:
        """A model's number in the database; ``None``: it does not know it yet."""
        known = self._ids.get(model)
        return None if known is None else known[1]

    def flush(self) -> bool:
        """Tells what there is to tell, for as long as closing would wait; whether all was told."""
        return self._behind.flush(_DRAIN_S)

    def stats(self) -> BehindStats:
        """What became of what was to be told."""
        return self._behind.stats()

    def close(self) -> None:
        """Tells what is left, and ends; the database may be away."""
        self._stop.set()
        self._due["usage"] = self._clock()
        # A call that is under way may take much longer than anybody waits for it.
        late = threading.Timer(_DRAIN_S, self._postgres.interrupt)
        late.start()
        self._behind.close(_DRAIN_S)
        late.cancel()
        if self._opened and self._postgres.stats().guard.state == "closed":
            self._postgres.write_events([("closed", None, None, (0, 0, 0, 0, 0))])
            self._postgres.beat(closing=True)
        self._postgres.close()
        for thread in (self._watcher, *self._warming):
            thread.join()

    def _take(self) -> list[_Batch]:
        anew, rows, self._since = self._store.events(self._since)
        # A copy in the GPU tier is of a block in one of the others, and no other node can have it.
        rows = [row for row in rows if row[3] != "gpu"]
        prefixes = self._store.used(_PREFIXES)
        usage = self._store.usage() if self._is_due("usage", _USAGE_S) else []
        if not (anew or rows or prefixes or usage):
            # A model that has nothing yet may be retired, or have something elsewhere.
            self._enter()
            self._live()
            return []
        return [_Batch(anew, rows, prefixes, usage)]

    def _write(self, batches: list[_Batch]) -> list[_Batch]:
        for n, batch in enumerate(batches):
            if not (self._enter() and self._tell(batch)):
                return batches[n:]
        self._changed.clear()
        self._live()
        return []

    def _tell(self, batch: _Batch) -> bool:
        ids = {name: number for name, (_, number) in self._ids.items() if name not in self._changed}
        write = self._postgres.write_all if batch.anew else self._postgres.write
        if (batch.anew or batch.rows) and not write(batch.rows, ids):
            return False
        batch.anew, batch.rows = False, []
        rows = [
            PrefixRow(
                model=ids[model],
                space=space,
                adapter=names and names[0],
                tenant=names and names[1],
                tokens=len(places) * self._block_tokens[model],
                chain=blocks,
                since=since,
                used=used,
                uses=uses,
            )
            for model, space, names, blocks, places, since, used, uses in batch.prefixes
            if model in ids and model in self._block_tokens
        ]
        if rows and not self._postgres.write_prefixes(rows):
            return False
        batch.prefixes = []
        events: list[tuple[str, int | None, str | None, Sequence[int]]] = []
        for registration, model, tenant, counts in batch.usage:
            before = self._told.get((registration, tenant), [0] * len(counts))
            more = [max(now - then, 0) for now, then in zip(counts, before, strict=True)]
            if model in ids and any(more):
                events.append(("usage", ids[model], tenant, more))
        if events and not self._postgres.write_events(events):
            return False
        if batch.usage:
            self._told = {(registration, tenant): counts for registration, _, tenant, counts in batch.usage}
        batch.usage = []
        return True

    def _enter(self) -> bool:
        """Enters models that the database does not know yet; whether it knows all now."""
        if self._postgres.generation != self._generation:
            # Connected anew, by another name perhaps, or to another database: all is told again.
            again = self._generation > 0
            self._generation, self._ids, self._opened = self._postgres.generation, {}, False
            if again:
                self._since = None
        self._block_tokens = {name: entry.geometry.block_tokens for name, entry in self._models().items()}
        for name, entry in self._models().items():
            fingerprint = entry.model.fingerprint
            if self._ids.get(name, (b"", 0))[0] == fingerprint:
                continue
            found = self._postgres.register(fingerprint, name, entry.weights_version, entry.geometry)
            if found is None:
                return False
            if name in self._ids:
                # Rows name models by name: which of them are of the one before is not known, so all are told again.
                self._since = None
                self._changed.add(name)
            number, retired = found
            warm = fingerprint not in self._warmed
            self._warmed.add(fingerprint)
            self._ids[name] = (fingerprint, number)
            if retired:
                self._hear(self._retired | {fingerprint})
            elif self._postgres.config.warm_start_bytes and warm:
                self._warming = [thread for thread in self._warming if thread.is_alive()]
                thread = threading.Thread(target=self._warm_up, args=(name, number), name="stratakv-warm", daemon=True)
                self._warming.append(thread)
                thread.start()
        if not self._opened:
            self._opened = self._postgres.write_events([("opened", None, None, (0, 0, 0, 0, 0))])
        return True

    def _hear(self, retired: set[bytes]) -> None:
        with self._telling:
            self._retire(retired)
            self._retired = retired

    def _warm_up(self, name: str, number: int) -> None:
        try:
            hottest = self._postgres.hottest(number, _WARM_PREFIXES)
            if hottest and self._warm(name, hottest):
                self._postgres.write_events([("warmed", number, None, (0, 0, 0, 0, 0))])
        except ClosedError:
            return
        except Exception:
            # It starts cold.
            _log.exception("warm_up_failed", "model %r could not be warmed up", name, key=name, model=name)

    def _tell_all(self, _: list[_Batch]) -> None:
        self._since = None

    def _live(self) -> None:
        if self._opened and self._is_due("beat", _BEAT_S):
            self._postgres.beat(upkeep=self._is_due("upkeep", _UPKEEP_S))

    def _is_due(self, what: str, interval_s: float) -> bool:
        now = self._clock()
        if now < self._due[what]:
            return False
        self._due[what] = now + interval_s
        return True

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._postgres.watch(self._postgres.config.poll_s)
            retired = None if self._stop.is_set() else self._postgres.retired()
            if retired is None:
                continue
            try:
                self._hear(retired)
            except ClosedError:
                return
            except Exception:
                # The next look tries again.
                _log.exception("retired_not_dropped", "versions that are retired could not be dropped")
