"""The tier that nodes share: records in DragonflyDB, Valkey or Redis, one key for a block.

    put ─▶ RAM ─ ─(events, behind)─ ─▶ which are not there yet? ─▶ SET in batches
    match ─▶ which of the blocks behind the local ones are there? ─▶ load ─▶ GET in batches ─▶ checked ─▶ RAM

Keys are ``stratakv:<model>:<block>``, both in hex and of no use without the store's secret; a value is a record with a
keyed digest, see docs/formats.md. What comes from here is hostile until the native half has checked it. No call takes
longer than its deadline, and none raises: what cannot be had is a miss with a reason.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from stratakv.config import DragonflyConfig
from stratakv.errors import ClosedError, ConfigError, StoreError
from stratakv.guard import Deadline, Guard, GuardStats

_log = logging.getLogger(__name__)

# Bytes of values in one batch: longer replies are slower for each byte.
_BATCH_BYTES = 16 << 20
# Keys that are asked for at once.
_BATCH_KEYS = 256
# Calls under way at once.
_CALLS = 8

_T = TypeVar("_T")


_COUNTS = (
    *("asked_blocks", "hit_blocks", "miss_blocks", "found_blocks", "read_bytes"),
    *("written_blocks", "written_bytes", "known_blocks", "dropped_blocks"),
)


class Exports(Protocol):
    """A model whose blocks can be written here; a native model is one."""

    @property
    def fingerprint(self) -> bytes:
        """Names it here."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, at most."""

    def export(self, name: bytes) -> bytes | None:
        """The record of a block; ``None``: it left RAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DragonflyStats:
    """What was asked of the tier.

    Attributes:
        asked_blocks: blocks asked for by loads; ``asked = hit + miss`` holds exactly.
        hit_blocks: blocks it delivered, checked and right.
        miss_blocks: blocks it did not have any more, could not deliver, or that were not right.
        found_blocks: blocks that matches found here.
        read_bytes: bytes of records that came from it.
        written_blocks: blocks that were written to it.
        written_bytes: bytes of their records.
        known_blocks: blocks that were there when they were to be written.
        dropped_blocks: blocks that were not written: they left RAM before their turn, or the server did not take them.
        guard: of its calls.
    """

    asked_blocks: int
    hit_blocks: int
    miss_blocks: int
    found_blocks: int
    read_bytes: int
    written_blocks: int
    written_bytes: int
    known_blocks: int
    dropped_blocks: int
    guard: GuardStats


class Dragonfly:
    """Reads and writes records. Any thread may use it."""

    def __init__(self, config: DragonflyConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Connects when it is first asked; at once, if it is required.

        Args:
            config: where, and for how long.
            clock: seconds, for the breaker.

        Raises:
            ConfigError: the library is not installed.
            StoreError: the server is required, and does not answer.
        """
        self.config = config
        _library()
        self._connected: Any = None
        self._guard = Guard("dragonfly", deadline_s=config.deadline_s, clock=clock)
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="stratakv-dragonfly")
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(_COUNTS, 0)
        if self._ask(lambda: self._client().ping())[1] is not None:
            kind = self._guard.stats().last_error
            if config.required:
                self.close()
                raise StoreError(f"dragonfly.url does not answer ({kind}); start the server, or do not require it")
            _log.warning("dragonfly does not answer (%s): the store runs without it until it does", kind)

    def leading(self, model: bytes, names: list[bytes]) -> tuple[int, str | None]:
        """How many of these blocks are there, up to the first that is not; and why that is not known, if so."""
        found = 0
        for some in _some(names, _BATCH_KEYS):
            there, reason = self._exist(_keys(model, some))
            if there is None:
                return self._found(found), reason
            leading = next((n for n, here in enumerate(there) if not here), len(there))
            found += leading
            if leading < len(some):
                break
        return self._found(found), None

    def fetch(self, model: bytes, names: list[bytes], record_bytes: int) -> tuple[list[bytes], str | None]:
        """The records of these blocks, up to the first that cannot be had; and why not all."""
        records: list[bytes] = []
        for some in _some(_keys(model, names), max(_BATCH_BYTES // record_bytes, 1)):
            values, reason = self._ask(functools.partial(self._pipeline, "GET", [(key,) for key in some]))
            if values is None:
                return records, "timeout" if reason == "open" else reason
            for value in values:
                if not isinstance(value, bytes):
                    return records, "evicted"
                records.append(value)
        return records, None

    def booked(self, asked: int, hit: int, read_bytes: int) -> None:
        """Counts what became of a load: of so many blocks so many were right."""
        self._count(asked_blocks=asked, hit_blocks=hit, miss_blocks=asked - hit, read_bytes=read_bytes)

    def write(self, model: Exports, names: list[bytes]) -> None:
        """Writes those of these blocks that are not there yet."""
        for some in _some(names, max(min(_BATCH_BYTES // model.record_bytes, _BATCH_KEYS), 1)):
            keys = _keys(model.fingerprint, some)
            there, _ = self._exist(keys)
            if there is None:
                self._count(dropped_blocks=len(some))
                continue
            new = [(key, name) for key, name, here in zip(keys, some, there, strict=True) if not here]
            records = [(key, record) for key, name in new if (record := model.export(name)) is not None]
            self._count(known_blocks=len(some) - len(new), dropped_blocks=len(new) - len(records))
            if records:
                done, _ = self._ask(functools.partial(self._set, records))
                sizes = [len(record) for (_, record), one in zip(records, done or [], strict=False) if one]
                self._count(
                    written_blocks=len(sizes),
                    written_bytes=sum(sizes),
                    dropped_blocks=len(records) - len(sizes),
                )

    def forget(self, model: bytes) -> int:
        """Unlinks what is there of a model; returns how many blocks. What comes meanwhile may stay."""
        gone = 0
        pattern = f"stratakv:{model.hex()}:*"
        for keys in _some(self._client().scan_iter(match=pattern, count=1000), _BATCH_KEYS):
            removed, _ = self._ask(functools.partial(self._pipeline, "UNLINK", [(key,) for key in keys]))
            gone += sum(one or 0 for one in removed or ())
        return gone

    def stats(self) -> DragonflyStats:
        """What was asked of it."""
        with self._lock:
            return DragonflyStats(**self._counts, guard=self._guard.stats())

    def close(self) -> None:
        """Disconnects; calls that are under way fail."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        if self._connected is not None:
            self._connected.close()

    def _exist(self, keys: list[str]) -> tuple[list[int] | None, str | None]:
        there, reason = self._ask(lambda: self._pipeline("EXISTS", [(key,) for key in keys]))
        return there, "timeout" if reason == "open" else reason

    def _set(self, records: list[tuple[str, bytes]]) -> list[Any]:
        life = [] if self.config.ttl_s is None else ["PX", int(1000 * self.config.ttl_s)]
        return self._pipeline("SET", [(key, record, *life) for key, record in records])

    def _pipeline(self, command: str, calls: list[tuple[Any, ...]]) -> list[Any]:
        """The results of some commands; ``None`` of those that failed, unless all did."""
        client = self._client()
        if not self.config.cluster:
            return _done(_execute(client, command, calls))
        # Node by node: one that is gone takes no others along.
        nodes: dict[str, list[int]] = {}
        by_name = {}
        for n, call in enumerate(calls):
            node = client.get_node_from_key(call[0])
            by_name[node.name] = node
            nodes.setdefault(node.name, []).append(n)
        results: list[Any] = [None] * len(calls)
        for name, numbers in nodes.items():
            try:
                some = _execute(client.get_redis_connection(by_name[name]), command, [calls[n] for n in numbers])
            except _library().RedisError as error:
                some = [error] * len(numbers)
            for n, result in zip(numbers, some, strict=True):
                results[n] = result
        if any(isinstance(result, _library().exceptions.MovedError) for result in results):
            client.nodes_manager.initialize()
        return _done(results)

    def _ask(self, call: Callable[[], _T]) -> tuple[_T | None, str | None]:
        """Makes a call in a thread of its own: a socket's timeout is for each piece of a reply, not for all of it."""

        def within(deadline: Deadline) -> _T:
            future = self._calls.submit(call)
            try:
                return future.result(deadline.left_s())
            except TimeoutError:
                if not future.cancel():
                    # It wakes up by that, and its connection is of no use any more.
                    _disconnect(self._connected)
                raise

        return self._guard.call(within)

    def _client(self) -> Any:  # noqa: ANN401 - of one node, or of a cluster
        # A cluster is asked for its nodes at once, so that this is a call like any other.
        if self._connected is None:
            self._connected = _connect(self.config)
        return self._connected

    def _found(self, blocks: int) -> int:
        self._count(found_blocks=blocks)
        return blocks

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number


class Feeder:
    """Writes blocks behind their puts: what RAM got since the last look, in a thread of its own."""

    def __init__(
        self,
        tier: Dragonfly,
        events: Callable[[int | None], tuple[bool, list[tuple[str, bytes, bytes | None, str, bool]], int]],
        models: Callable[[], Mapping[str, Exports]],
        *,
        interval_s: float = 0.02,
    ) -> None:
        """Starts the thread.

        Args:
            tier: what is written to.
            events: of the store, as `CacheManager.events`; what is too old there is looked for in all of RAM.
            models: those registered now, by name.
            interval_s: seconds between two looks.
        """
        self._tier, self._events, self._models, self._interval_s = tier, events, models, interval_s
        self._since: int | None = None
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stratakv-feeder", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Writes what RAM got up to now."""
        with self._looking:
            _, rows, self._since = self._events(self._since)
            fresh = [(model, name) for model, name, _, tier, stored in rows if tier == "ram" and stored]
            models = self._models()
            for model, of_model in itertools.groupby(fresh, lambda row: row[0]):
                if model in models:
                    self._tier.write(models[model], [name for _, name in of_model])

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.look()
            except ClosedError:
                # The store is; there is nothing more to write.
                return
            except Exception:
                _log.exception("blocks are written to dragonfly no more")
                return

    def close(self) -> None:
        """Writes what is left, if the server takes it, and ends."""
        self._stop.set()
        self._thread.join()
        # The store may be closed.
        with contextlib.suppress(ClosedError):
            self.look()


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import redis
    except ImportError as error:
        raise ConfigError("dragonfly.url needs a library: pip install 'stratakv[dragonfly]'") from error
    return redis


def _connect(config: DragonflyConfig) -> Any:  # noqa: ANN401 - of one node, or of a cluster
    redis = _library()
    options: dict[str, Any] = {
        "socket_timeout": config.deadline_s,
        "socket_connect_timeout": config.deadline_s,
        "username": config.username,
        "password": config.password,
        "ssl_ca_certs": None if config.ca_file is None else str(config.ca_file),
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }
    kept = {name: value for name, value in options.items() if value is not None}
    if config.cluster:
        return redis.RedisCluster.from_url(config.url, require_full_coverage=False, **kept)
    return redis.Redis.from_url(str(config.url), **kept)


def _execute(client: Any, command: str, calls: list[tuple[Any, ...]]) -> list[Any]:  # noqa: ANN401 - of one node
    with client.pipeline(transaction=False) as pipeline:
        for arguments in calls:
            pipeline.execute_command(command, *arguments)
        results: list[Any] = pipeline.execute(raise_on_error=False)
        return results


def _done(results: list[Any]) -> list[Any]:
    """Results without errors; raises one where there is nothing else."""
    failed = [result for result in results if isinstance(result, Exception)]
    if failed and len(failed) == len(results):
        raise failed[0]
    return [None if isinstance(result, Exception) else result for result in results]


def _disconnect(client: Any) -> None:  # noqa: ANN401 - see there
    if client is None:
        return
    if hasattr(client, "connection_pool"):
        client.connection_pool.disconnect(inuse_connections=True)
    else:
        client.disconnect_connection_pools()


def _keys(model: bytes, names: list[bytes]) -> list[str]:
    prefix = f"stratakv:{model.hex()}:"
    return [prefix + name.hex() for name in names]


def _some(items: Iterable[_T], most: int) -> Iterator[list[_T]]:
    remaining = iter(items)
    while some := list(itertools.islice(remaining, most)):
        yield some
