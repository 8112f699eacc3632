"""`StrataTier`: the tiers of this package below the CPU cache of vLLM's native offloading connector.

    scheduler   lookup ─▶ lease ─▶ submit_load ──┐  submit_store ──┐     get_finished_jobs
                                                 ▼                 ▼             ▲
    workers                   row ◀─ load of the lease     row ─▶ put            │
                                                 └── a failed row is said to be ─┘

Calls come in the scheduler's process, one at a time, and do not wait: a few workers copy, read, and ask other nodes.
A chunk is a row of vLLM's CPU cache, and is read and written where it lies.

What a lookup found is leased until its load is done; or until the step ends in which no load was asked for, or the
request. A load that fails says which rows it did not fill, and its request is told from then on that these chunks are
not here: vLLM computes them, and never reads what such a row holds.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from stratakv import ClosedError, Config, ConfigError, Geometry, Match, StrataKVError, log
from stratakv.integrations.engine import KeyedBlocks, open_caches
from stratakv.integrations.vllm import VERSION

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

__all__ = ["StrataTier"]

# Below vLLM's own, which alone it shows from INFO on.
_log = log.of(__name__, below="vllm")

# Rows that may wait to be stored, lookups that may wait for another node, and uses that may wait to be told; each.
_WAITING = 1 << 16
# Seconds between two looks at what the tiers hold.
_LOOK_S = 1.0
# Seconds after which a wait for transfers says so.
_PATIENCE_S = 5.0

_LOADED = "stratakv_loaded_blocks_total"
_FAILED = "stratakv_failed_loads_total"
_REFUSED = "stratakv_refused_blocks_total"
_USED = "stratakv_used_bytes"

_Kind = Literal["load", "store", "look", "touch"]


@dataclass(slots=True, eq=False)
class _Job:
    """A transfer of vLLM's; its rows are done one by one."""

    terms: TransferJob
    keys: list[OffloadKey]
    rows: list[int]
    leases: dict[OffloadKey, Match]
    left: int
    started: float | None = None
    good: list[OffloadKey] = field(default_factory=list)
    # Why others are not, and how many.
    bad: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Request:
    """Chunks that are leased for one request, those that are not here for it, and those that workers look for."""

    leases: dict[OffloadKey, Match] = field(default_factory=dict)
    missing: set[OffloadKey] = field(default_factory=set)
    asked: set[OffloadKey] = field(default_factory=set)
    ended: bool = False


class StrataTier(SecondaryTierManager):
    """A secondary tier over one store, of one engine.

    In ``secondary_tiers`` of `TieringOffloadingSpec`::

        {"type": "StrataTier", "module_path": "stratakv.integrations.vllm",
         "ram": {"capacity_bytes": "8GiB"}, "ssd": {"path": "/nvme/stratakv", "capacity_bytes": "500GiB"}}
    """

    medium: ClassVar[Medium] = Medium.STORAGE
    # Nothing outside this engine asks this tier for anything, so there is nothing to serve between its steps.
    tolerates_off_thread_polling: ClassVar[bool] = False

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        *,
        threads: int = 4,
        weights_version: str = "",
        locality: str = "LOCAL",
        enable_kv_events: bool = False,
        **options: Any,  # noqa: ANN401 - a table of settings
    ) -> None:
        """Opens the store, and finds again what it holds of this model in this layout.

        Args:
            offloading_spec: vLLM's settings.
            primary_kv_view: rows of vLLM's CPU cache, ``[chunks, bytes]``.
            tier_type: what vLLM calls this tier.
            backpressure_detector: vLLM's; it drops stores where these take too long or, since 0.33, fail.
            threads: workers, 1 to 64.
            weights_version: names the weights; vLLM tells the model's name alone.
            locality: ``LOCAL`` or ``REMOTE``, for requests that choose among tiers.
            enable_kv_events: publishes which chunks this tier has got and lost, if vLLM publishes events at all.
            options: ``config``, a TOML file, and sections of `stratakv.Config`.

        Raises:
            ConfigError: an option makes no sense, or a tier is smaller than one chunk.
            StoreLockedError: another engine has the directory open.
            StoreError: the directory cannot be used.
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if type(threads) is not int or not 1 <= threads <= 64:
            raise ConfigError(f"threads is {threads!r}, expected an integer from 1 to 64")
        if not isinstance(weights_version, str):
            raise ConfigError(f"weights_version is {weights_version!r}, expected text")
        if locality not in Locality.__members__:
            raise ConfigError(f"locality is {locality!r}, expected one of {', '.join(Locality.__members__)}")
        self.locality = Locality[locality]
        _check_sections(options)
        # No array stands on vLLM's memory before all that may fail is done: vLLM could not take it back.
        shape = primary_kv_view.shape or ()
        if len(shape) != 2 or 0 in shape or not primary_kv_view.c_contiguous or primary_kv_view.itemsize != 1:
            raise ConfigError(f"vLLM's CPU cache is {shape}, expected rows of bytes, one behind the other")
        chunks, row_bytes = shape
        geometry = _geometry(row_bytes)
        parallel = offloading_spec.config.parallel
        folders = [f"dp{parallel.data_parallel_index}"] if parallel.data_parallel_size > 1 else []
        self._caches = open_caches(options, *folders)
        try:
            name, version = _namespace(offloading_spec, row_bytes, weights_version)
            cache = self._caches.register(name, geometry, weights_version=version)
            self._blocks = KeyedBlocks(cache, "PLKHND")
            # Where a tier is on another machine, a lookup has to wait for it.
            self._remote = self._caches.dragonfly is not None
            self._events = _Events(self._blocks, self._caches.events) if self._wants(enable_kv_events) else None
        except BaseException:
            self._caches.close()
            raise
        block = (geometry.layers, geometry.planes, geometry.kv_heads, geometry.block_tokens, geometry.head_dim)
        self._rows: Any = np.asarray(primary_kv_view).view(np.uint8).reshape(chunks, *block)
        self._requests: dict[str, _Request] = {}
        # What was found in this step.
        self._told: list[tuple[_Request, OffloadKey]] = []
        self._metrics = OffloadingConnectorStats()
        self._looked = float("-inf")
        # Guards all that follows; nothing is copied and nobody is waited for while it is held.
        self._changed = threading.Condition()
        self._work: dict[_Kind, deque[tuple[_Job | _Request | None, int, OffloadKey]]] = {
            "load": deque(),
            "store": deque(),
            "look": deque(),
            "touch": deque(),
        }
        self._unfinished = 0
        self._finished: list[JobResult] = []
        self._closing = False
        # The first of several prefers stores, so that loads without end do not keep rows from being written.
        first: tuple[_Kind, ...] = ("look", "load", "store", "touch")
        second: tuple[_Kind, ...] = ("look", "store", "load", "touch")
        orders = [second if n == 0 and threads > 1 else first for n in range(threads)]
        self._workers = [
            threading.Thread(target=self._serve, args=(order,), name=f"stratakv-tier-{n}", daemon=True)
            for n, order in enumerate(orders)
        ]
        for worker in self._workers:
            worker.start()
        held = self._caches.model_stats(name).tiers
        _log.info(
            "tier_opened",
            "model %r: chunks of %d bytes, %d of them found again in RAM and on SSD",
            name,
            row_bytes,
            sum(tier.blocks for tier in held.values()),
            model=name,
        )

    def _wants(self, enable_kv_events: bool) -> bool:
        published = bool(self._offloading_spec.kv_events_config.enable_kv_cache_events)
        if enable_kv_events and not published:
            _log.warning(
                "events_not_published",
                "enable_kv_events is set, and vLLM publishes no events: set kv_events_config, too",
            )
        return enable_kv_events and published

    # What the scheduler calls.

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunks are stored as they are computed."""
        self._requests.setdefault(req_context.req_id, _Request())
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a chunk is here, from the index alone; ``RETRY`` while another node is asked."""
        request = self._requests.setdefault(req_context.req_id, _Request())
        if key in request.leases:
            return self._tell(request, key)
        if key in request.missing:
            return LookupResult.MISS
        if self._remote:
            return self._ask(request, key)
        try:
            match = self._blocks.lease(key)
        except StrataKVError as error:
            if not isinstance(error, ClosedError):
                _log.warning(
                    "chunk_not_asked_for", "a chunk is not looked for: %s", error, request_id=req_context.req_id
                )
            return LookupResult.MISS
        if match is None:
            return LookupResult.MISS
        request.leases[key] = match
        return self._tell(request, key)

    def _tell(self, request: _Request, key: OffloadKey) -> LookupResult:
        self._told.append((request, key))
        return LookupResult.HIT

    def _ask(self, request: _Request, key: OffloadKey) -> LookupResult:
        """Has a worker look; the answer is in the request then."""
        with self._changed:
            if key in request.leases:
                return self._tell(request, key)
            if key in request.missing or len(self._work["look"]) >= _WAITING:
                return LookupResult.MISS
            if key not in request.asked:
                request.asked.add(key)
                self._work["look"].append((request, 0, key))
                self._changed.notify()
        return LookupResult.RETRY

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Has rows filled, from what was leased for the request."""
        request = self._requests.get(job_metadata.req_context.req_id)
        keys = list(job_metadata.keys)
        leases = {} if request is None else {key: request.leases.pop(key) for key in keys if key in request.leases}
        self._submit("load", job_metadata, keys, leases)

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Has rows stored; vLLM keeps them until that is done."""
        self._submit("store", job_metadata, list(job_metadata.keys), {})

    def _submit(self, kind: _Kind, terms: TransferJob, keys: list[OffloadKey], leases: dict[OffloadKey, Match]) -> None:
        rows = [int(row) for row in terms.chunk_ids]
        job = _Job(terms, keys, rows, leases, len(keys))
        with self._changed:
            full = kind == "store" and len(self._work["store"]) + len(keys) > _WAITING
            if not keys or full or self._closing:
                if kind == "store":
                    self._metrics.increase_counter(_REFUSED, len(keys))
                self._finished.append(JobResult(terms.job_id, success=not keys))
            else:
                self._unfinished += 1
                self._work[kind].extend((job, at, key) for at, key in enumerate(keys))
                self._changed.notify(len(keys))
                return
        for match in leases.values():
            match.release()

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The transfers that ended since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
        return finished

    def has_pending_work(self) -> bool:
        """Whether a transfer is not over, or one that is was not asked for yet."""
        with self._changed:
            return bool(self._unfinished or self._finished)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Has chunks counted as used, behind the call; the first of a prefix is used last."""
        with self._changed:
            if len(self._work["touch"]) + len(keys) <= _WAITING:
                self._work["touch"].extend((None, 0, key) for key in reversed(list(keys)))
                self._changed.notify(len(keys))

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """What was found in this step and is not to be loaded is leased no longer."""
        told, self._told = self._told, []
        for request, key in told:
            match = request.leases.pop(key, None)
            if match is not None:
                match.release()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forgets a request; what was leased for it is free, but for loads under way."""
        request = self._requests.pop(req_context.req_id, None)
        if request is None:
            return
        with self._changed:
            request.ended = True
            leases, request.leases = request.leases, {}
        for match in leases.values():
            match.release()

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Which chunks this tier has got and lost, of those that were stored by this process."""
        if self._events is None:
            return
        for keys, removed in self._events.take():
            yield OffloadingEvent(
                keys=keys, medium=self.medium, removed=removed, locality=self.locality, ownership=self.tier_type
            )

    def drain_jobs(self) -> None:
        """Waits until no transfer touches vLLM's CPU cache; all that were submitted have ended then."""
        with self._changed:
            while not self._changed.wait_for(lambda: not self._unfinished, _PATIENCE_S):
                _log.warning("transfers_awaited", "still waiting for %d transfers", self._unfinished)

    def shutdown(self) -> None:
        """Ends transfers and closes the store; again does nothing. Rows that wait to be stored are, loads are not."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            dropped = [*self._work["load"], *self._work["look"], *self._work["touch"]]
            for kind in ("load", "look", "touch"):
                self._work[kind].clear()
            self._changed.notify_all()
        for job, _, key in dropped:
            if isinstance(job, _Job):
                lease = job.leases.pop(key, None)
                if lease is not None:
                    lease.release()
                self._end_row(job, key, "closed")
        for worker in self._workers:
            worker.join()
        for request in self._requests.values():
            for match in request.leases.values():
                match.release()
        self._requests.clear()
        self._told.clear()
        # vLLM takes its memory back.
        self._rows = None
        try:
            self._caches.close()
        except StrataKVError as error:
            # Nothing uses vLLM's memory any more, so vLLM may go on and give it back.
            _log.error("chunks_not_written", "not all chunks could be written: %s", error)

    # What workers do.

    def _serve(self, order: tuple[_Kind, ...]) -> None:
        work = {"load": self._load, "store": self._store, "look": self._look, "touch": self._touch}
        while True:
            with self._changed:
                while True:
                    kind = next((kind for kind in order if self._work[kind]), None)
                    if kind is not None or self._closing:
                        break
                    self._changed.wait()
                if kind is None:
                    return
                job, at, key = self._work[kind].popleft()
                if isinstance(job, _Job) and job.started is None:
                    job.started = time.monotonic()
            work[kind](job, at, key)  # type: ignore[operator]  # each kind has its own

    def _load(self, job: _Job, at: int, key: OffloadKey) -> None:
        place, reason = None, "error"
        match = job.leases.pop(key, None)
        try:
            match = match or self._blocks.lease(key)
            if match is None:
                reason = "missing"
            elif match.load(self._rows, layout=self._blocks.layout, pages=[job.rows[at]]):
                place = match.explain().blocks[0]
            else:
                reason = match.explain().reason or "missing"
        except ClosedError:
            reason = "closed"
        except Exception:
            # vLLM has to hear of it, or it waits for ever.
            _log.exception("chunk_load_failed", "a chunk could not be loaded")
        finally:
            if match is not None:
                match.release()
        with self._changed:
            if place is not None:
                self._metrics.increase_counter(_LOADED, 1, (place,))
            else:
                self._metrics.increase_counter(_FAILED, 1, (reason,))
        self._end_row(job, key, None if place is not None else reason)

    def _store(self, job: _Job, at: int, key: OffloadKey) -> None:
        reason: str | None = "error"
        try:
            name = None if self._events is None else self._events.expect(key)
            reason = None if self._blocks.put(key, self._rows, pages=[job.rows[at]]) else "no room"
            if self._events is not None and name is not None:
                self._events.stored(name, reason is None)
        except ClosedError:
            reason = "closed"
        except Exception:
            _log.exception("chunk_store_failed", "a chunk could not be stored")
        if reason is not None:
            with self._changed:
                self._metrics.increase_counter(_REFUSED)
        self._end_row(job, key, reason)

    def _look(self, request: _Request, _: int, key: OffloadKey) -> None:
        match = None
        try:
            match = self._blocks.lease(key)
        except ClosedError:
            pass
        except Exception:
            _log.exception("chunk_lookup_failed", "a chunk could not be looked for")
        with self._changed:
            request.asked.discard(key)
            if match is not None and not request.ended:
                request.leases[key] = match
                return
            request.missing.add(key)
        if match is not None:
            match.release()

    def _touch(self, _: None, __: int, key: OffloadKey) -> None:
        try:
            self._blocks.has(key)
        except ClosedError:
            return
        except Exception:
            _log.exception("chunk_use_not_counted", "a chunk could not be counted as used")

    def _end_row(self, job: _Job, key: OffloadKey, wrong: str | None) -> None:
        """A row is done, or not for some reason; with the last one the transfer is."""
        loaded = job.terms.is_promotion
        request = self._requests.get(job.terms.req_context.req_id) if loaded and wrong else None
        with self._changed:
            if wrong is None:
                job.good.append(key)
            else:
                job.bad[wrong] = job.bad.get(wrong, 0) + 1
            if request is not None:
                request.missing.add(key)
            job.left -= 1
            if job.left:
                return
        self._end(job)

    def _end(self, job: _Job) -> None:
        loaded = job.terms.is_promotion
        if job.bad:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(job.bad.items()))
            done = "loaded, and are computed" if loaded else "stored"
            _log.warning(
                "chunks_incomplete",
                "%d of %d chunks are not %s: %s",
                sum(job.bad.values()),
                len(job.keys),
                done,
                why,
                request_id=job.terms.req_context.req_id,
            )
        result = JobResult(
            job_id=job.terms.job_id,
            success=not job.bad,
            successful_keys=tuple(job.good) if loaded and job.good and job.bad else None,
            transfer_time=None if job.started is None else time.monotonic() - job.started,
            transfer_bytes=len(job.good) * self.block_size_bytes,
        )
        with self._changed:
            self._finished.append(result)
            self._unfinished -= 1
            self._changed.notify_all()

    # What operators see.

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Metrics of this tier, beside those that vLLM has of each tier."""
        return {
            _LOADED: OffloadingCounterMetadata("Chunks loaded into vLLM's CPU cache, by where they were.", ("place",)),
            _FAILED: OffloadingCounterMetadata("Chunks found and not loaded, by reason.", ("reason",)),
            _REFUSED: OffloadingCounterMetadata("Chunks not stored: there was no room, or too many waited."),
            _USED: OffloadingGaugeMetadata("Bytes of chunks that are held, by place.", ("place",)),
        }

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What was counted since the last call; what the tiers hold is looked at once a second."""
        used: dict[str, int] = {}
        if not self._closing and time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            used = {place: tier.used_bytes for place, tier in self._blocks.cache.stats().tiers.items()}
        with self._changed:
            counted, self._metrics = self._metrics, OffloadingConnectorStats()
        for place, size in used.items():
            counted.set_gauge(_USED, size, (place,))
        return None if counted.is_empty() else counted


class _Events:
    """Which chunks the store has got and lost. It names blocks by digests: only those this process stored are known.

    A block is lost when it left a tier and is in none; what came and went between two looks was never there.
    """

    def __init__(self, blocks: KeyedBlocks, tell: Any) -> None:  # noqa: ANN401 - a method of the manager
        """Goes on from now."""
        self._blocks, self._tell = blocks, tell
        self._next: int = tell(None)[2]
        self._lock = threading.Lock()
        # By name: the chunk, and whether it was told.
        self._known: dict[bytes, tuple[OffloadKey, bool]] = {}
        self._new: list[bytes] = []

    def expect(self, key: OffloadKey) -> bytes:
        """A chunk is about to be stored: that it leaves is not missed from now on. Its name."""
        name = self._blocks.name(key)
        with self._lock:
            self._known.setdefault(name, (key, False))
        return name

    def stored(self, name: bytes, good: bool) -> None:
        """It was, or was not."""
        with self._lock:
            told = self._known.get(name, (None, False))[1]
            if good and not told:
                self._new.append(name)
            elif not told:
                self._known.pop(name, None)

    def take(self) -> Iterator[tuple[list[OffloadKey], bool]]:
        """Chunks that were stored, and those that were lost, since the last call."""
        with self._lock:
            try:
                anew, rows, self._next = self._tell(self._next)
            except ClosedError:
                return
            # Read too late, it tells all that is there, and nothing of what left.
            names = [*self._known] if anew else [name for _, name, _, _, stored in rows if not stored]
            left = [name for name in dict.fromkeys(names) if name in self._known]
            held = self._blocks.cache.held(left)
            lost = [self._known.pop(name) for name, here in zip(left, held, strict=True) if not here]
            kept = []
            for name in dict.fromkeys(self._new):
                if name in self._known:
                    kept.append(self._known[name][0])
                    self._known[name] = (kept[-1], True)
            self._new.clear()
        if gone := [key for key, told in lost if told]:
            yield gone, True
        if kept:
            yield kept, False


def _check_sections(options: dict[str, Any]) -> None:
    own = ("threads", "weights_version", "locality", "enable_kv_events", "config")
    valid = [*own, *Config.__dataclass_fields__]
    for name in options:
        if name not in valid:
            raise ConfigError(f"StrataTier: unknown option {name!r}, expected one of {', '.join(valid)}")
    if "qdrant" in options:
        raise ConfigError("StrataTier: qdrant finds prompts by their tokens, which vLLM shows to no tier; leave it out")


def _geometry(row_bytes: int) -> Geometry:
    """A row as one block of bytes; the more tokens, up to 16, the more of its key is compared on load."""
    tokens = 1 << len(list(takewhile(lambda n: row_bytes % (1 << n) == 0, range(1, 5))))
    return Geometry(layers=1, planes=1, kv_heads=1, head_dim=row_bytes // tokens, dtype="uint8", block_tokens=tokens)


def _namespace(spec: OffloadingSpec, row_bytes: int, weights_version: str) -> tuple[str, str]:
    """The model, and what tells its rows from those of another layout: as vLLM's own file tier, and more."""
    config = spec.config
    mapper = FileMapper.from_offloading_spec(
        root_dir="", offloading_spec=spec, blocks_per_file=spec.blocks_per_chunk, parallel_agnostic=True
    )
    fields = {
        **mapper.get_run_config(),
        "row_bytes": row_bytes,
        "worker_kv_bytes_per_block": config.worker_kv_bytes_per_block,
        "kv_cache_layout": config.kv_cache_layout,
        "vllm": ".".join(VERSION.split(".")[:2]),
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return config.model.name, f"{weights_version}+vllm-{digest}" if weights_version else f"vllm-{digest}"
