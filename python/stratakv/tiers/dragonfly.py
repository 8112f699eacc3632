"""The tier that nodes share: records in DragonflyDB, Valkey or Redis, one key for a block.

    put ─▶ RAM ─ ─(events, behind)─ ─▶ which are not there yet? ─▶ SET in batches
    match ─▶ which of the blocks behind the local ones are there? ─▶ load ─▶ GET in batches ─▶ checked ─▶ RAM

Keys are ``stratakv:<model>:<namespace>:{<head>}:<block>``, in hex and of no use without the store's secret; a value is
a record with a keyed digest, see docs/formats.md. What comes from here is hostile until the native half has checked it.
No call takes longer than its deadline, and none raises: what cannot be had is a miss with a reason.

A cluster puts keys with the same head on one node, and the head is the block that begins a run of 64: a node that is
lost takes whole runs along, not some blocks of each prefix. Where prefixes part, the rest of that run stays on one
node; longer runs would survive better and spread worse.

The library connects, authenticates and says which node has which key. Commands and replies are written and read here:
it copies what passes through it, and a value goes out from, and comes into, memory of its own.
"""

from __future__ import annotations

import functools
import itertools
import socket
import threading
import time
from binascii import hexlify
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar

from stratakv import log
from stratakv.errors import ConfigError, StoreError
from stratakv.guard import Deadline, Guard, GuardStats
from stratakv.sections import DragonflyConfig
from stratakv.tiers.behind import BehindStats, WriteBehind
from stratakv.tiers.cost import Cost

_log = log.of(__name__)

# Bytes of values in one batch: longer replies are slower for each byte.
_BATCH_BYTES = 16 << 20
# Keys that are asked for at once.
_BATCH_KEYS = 256
# Blocks of a run.
_RUN_BLOCKS = 64
# Bytes of values that are asked for before the first has come: what a server has to hold ready makes it slower.
_AHEAD_BYTES = 8 << 20
# Bytes of a value, at most: what servers take.
_MOST_BYTES = 512 << 20
# Bytes from which on something is sent without being copied, and is read so.
_LARGE_BYTES = 1 << 16
# Seconds for which a node of a cluster is not asked after it did not answer.
_REST_S = 1.0
# Calls under way at once.
_CALLS = 8
# Seconds that flushing and closing wait for what is to be written.
_DRAIN_S = 2.0

_T = TypeVar("_T")


_COUNTS = (
    *("asked_blocks", "hit_blocks", "miss_blocks", "found_blocks", "read_bytes"),
    *("written_blocks", "written_bytes", "known_blocks", "dropped_blocks", "not_worth_it_loads"),
)


class Exports(Protocol):
    """A model whose blocks can be written here; a native model is one."""

    @property
    def fingerprint(self) -> bytes:
        """Names it here."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, at most."""

    def heads(self, names: list[bytes], run_blocks: int) -> list[tuple[bytes, bytes] | None]:
        """Of each block the one that begins its run, and its namespace; ``None``: it is gone."""

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
        not_worth_it_loads: loads that were not made, since computing takes less.
        latency_s: seconds that a load takes before its first byte, as learned; ``None``: nothing is known yet.
        bytes_per_s: how fast it comes then.
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
    not_worth_it_loads: int
    latency_s: float | None
    bytes_per_s: float | None
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
        _keep_memory()
        self._connected: Any = None
        # Nodes of a cluster that did not answer, and until when they are not asked.
        self._resting: dict[str, float] = {}
        # What is to be unlinked, and could not be yet.
        self._forgotten: set[bytes] = set()
        self._clock = clock
        self._guard = Guard("dragonfly", deadline_s=config.deadline_s, clock=clock)
        # What loads from here take.
        self.cost = Cost()
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="stratakv-dragonfly")
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(_COUNTS, 0)
        if self._ask(lambda: self._client().ping())[1] is not None:
            kind = self._guard.stats().last_error
            if config.required:
                self.close()
                raise StoreError(f"dragonfly.url does not answer ({kind}); start the server, or do not require it")
            _log.warning(
                "dragonfly_absent",
                "dragonfly does not answer (%s): the store runs without it until it does",
                kind,
                error=kind,
            )

    def leading(self, space: bytes, names: list[bytes], first: int = 0) -> tuple[int, str | None]:
        """How many blocks of a sequence are there, from block `first` up to one that is not; and why, if unknown.

        Args:
            space: fingerprint of the model and name of the namespace, 32 bytes.
            names: of its blocks, from the start on.
            first: number of the first that is asked for.
        """
        found = 0
        if self._is_forgotten(space):
            return 0, "dropped"
        # However long the sequence is.
        limit = Deadline(self.config.deadline_s)
        for keys in _some(_keys(space, names, first), _BATCH_KEYS):
            there, reason = self._ask(functools.partial(self._exist, keys), probes=False, limit=limit)
            if there is None:
                return self._found(found), reason
            leading = next((n for n, here in enumerate(there) if here != 1), len(there))
            found += leading
            if leading < len(keys):
                return self._found(found), "error" if isinstance(there[leading], Exception) else None
        return self._found(found), None

    def fetch(
        self, space: bytes, names: list[bytes], record_bytes: int, first: int = 0
    ) -> tuple[list[bytes], str | None]:
        """The records of a sequence's blocks, from block `first` up to one that cannot be had; and why not all.

        Args:
            space: as of `leading`.
            names: as of `leading`.
            record_bytes: bytes of a record, at most.
            first: as of `leading`.
        """
        records: list[bytes] = []
        if self._is_forgotten(space):
            return records, "dropped"
        ahead = max(_AHEAD_BYTES // record_bytes, 1)
        for keys in _some(_keys(space, names, first), max(_BATCH_BYTES // record_bytes, 1)):
            begun = time.perf_counter()
            get = functools.partial(self._pipeline, [("GET", key) for key in keys], ahead)
            values, reason = self._ask(get, probes=False)
            if values is None:
                return records, reason
            self.cost.note(sum(len(value) for value in values if isinstance(value, bytes)), time.perf_counter() - begun)
            for value in values:
                if not isinstance(value, bytes):
                    return records, "error" if isinstance(value, Exception) else "evicted"
                records.append(value)
        # It may have been dropped meanwhile.
        return ([], "dropped") if self._is_forgotten(space) else (records, None)

    def booked(self, asked: int, hit: int, read_bytes: int) -> None:
        """Counts what became of a load: of so many blocks so many were right."""
        self._count(asked_blocks=asked, hit_blocks=hit, miss_blocks=asked - hit, read_bytes=read_bytes)

    def probe(self) -> None:
        """Asks the server whether it is back, if it is time to; no request waits for that."""
        if self._guard.state == "half_open":
            self._ask(lambda: self._client().ping())

    def passed_over(self) -> None:
        """Counts a load that was not made, since computing takes less."""
        self._count(not_worth_it_loads=1)

    def write(self, model: Exports, names: list[bytes]) -> list[bytes]:
        """Writes those of these blocks that are not there yet; returns those to be tried again, as nobody answered."""
        left: list[bytes] = []
        for some in _some(names, max(min(_BATCH_BYTES // model.record_bytes, _BATCH_KEYS), 1)):
            runs = zip(some, model.heads(some, _RUN_BLOCKS), strict=True)
            held = {
                _run(model.fingerprint + run[1], run[0]) + hexlify(name): name for name, run in runs if run is not None
            }
            there, _ = self._ask(functools.partial(self._exist, list(held)))
            if there is None:
                left += some
                continue
            new = [key for key, here in zip(held, there, strict=True) if here == 0]
            records = [(key, record) for key in new if (record := model.export(held[key])) is not None]
            done: list[Any] | None = []
            if records:
                done, _ = self._ask(functools.partial(self._set, records))
            again = [held[key] for key, _ in records] if done is None else []
            sizes = [
                len(record) for (_, record), one in zip(records, done or [], strict=False) if isinstance(one, bytes)
            ]
            known = there.count(1)
            left += again
            self._count(
                known_blocks=known,
                written_blocks=len(sizes),
                written_bytes=sum(sizes),
                dropped_blocks=len(some) - known - len(sizes) - len(again),
            )
        return left

    def dropped(self, blocks: int) -> None:
        """Counts blocks that were given up."""
        self._count(dropped_blocks=blocks)

    def forget(self, space: bytes) -> bool:
        """Unlinks what is there of a model, or of one of its namespaces; what comes meanwhile may stay.

        Until that is done, nothing of it is found; `forget_again` goes on with it.

        Args:
            space: fingerprint of the model, 16 bytes; and the name of the namespace, if it is one, 32 bytes in all.

        Returns:
            Whether it is done.
        """
        with self._lock:
            self._forgotten.add(space)
        return self.forget_again()

    def forget_again(self) -> bool:
        """Unlinks what could not be before; whether nothing is left to be."""
        with self._lock:
            waiting = list(self._forgotten)
        for space in waiting:
            if not self._unlink(
                b"stratakv:%b:*" % b":".join(hexlify(space[n : n + 16]) for n in range(0, len(space), 16))
            ):
                return False
            with self._lock:
                self._forgotten.discard(space)
        return True

    def _is_forgotten(self, space: bytes) -> bool:
        return bool(self._forgotten) and not self._forgotten.isdisjoint((space, space[:16]))

    def _unlink(self, pattern: bytes) -> bool:
        # Of a cluster each node is asked for its own.
        nodes, _ = self._ask(lambda: self._client().get_primaries() if self.config.cluster else [None])
        for node in nodes or ():
            cursor: int | None = None
            while cursor != 0:
                scan = functools.partial(self._scan, node, cursor or 0, pattern)
                found, _ = self._ask(scan)
                if found is None:
                    return False
                cursor, keys = found
                if keys and self._ask(functools.partial(self._pipeline, [("UNLINK", key) for key in keys]))[0] is None:
                    return False
        return nodes is not None

    def _scan(self, node: Any, cursor: int, pattern: bytes) -> tuple[int, list[bytes]]:  # noqa: ANN401 - of a cluster
        of = {} if node is None else {"target_nodes": node}
        cursors, keys = self._client().scan(cursor, match=pattern, count=1000, **of)
        return (next(iter(cursors.values())) if isinstance(cursors, dict) else cursors), keys

    def stats(self) -> DragonflyStats:
        """What was asked of it."""
        latency_s, byte_s = self.cost.terms() or (None, None)
        bytes_per_s = 1 / byte_s if byte_s else None
        with self._lock:
            known = {"latency_s": latency_s, "bytes_per_s": bytes_per_s, "guard": self._guard.stats()}
            return DragonflyStats(**self._counts, **known)  # type: ignore[arg-type]

    def close(self) -> None:
        """Disconnects; calls that are under way fail."""
        self._calls.shutdown(wait=False, cancel_futures=True)
        if self._connected is not None:
            self._connected.close()

    def _exist(self, keys: list[bytes]) -> list[Any]:
        """Of each key 1, 0 or an error."""
        runs = [list(run) for _, run in itertools.groupby(keys, lambda key: key[:-32])]
        there: list[Any] = []
        for run, count in zip(runs, self._pipeline([("EXISTS", *run) for run in runs]), strict=True):
            # How many of a run costs less than which, and mostly says as much.
            if isinstance(count, int) and 0 < count < len(run):
                there += self._pipeline([("EXISTS", key) for key in run])
            else:
                there += [min(count, 1) if isinstance(count, int) else count] * len(run)
        return there

    def _set(self, records: list[tuple[bytes, bytes]]) -> list[Any]:
        life = [] if self.config.ttl_s is None else ["PX", int(1000 * self.config.ttl_s)]
        return self._pipeline([("SET", key, record, *life) for key, record in records])

    def _pipeline(self, commands: list[tuple[Any, ...]], ahead: int = _BATCH_KEYS) -> list[Any]:
        """The results of some commands, of those that failed the errors; raises where the server as a whole fails."""
        client, errors = self._client(), _library().exceptions
        if not self.config.cluster:
            results = _execute(client, commands, ahead)
            failed = [result for result in results if isinstance(result, Exception)]
            # One that is full still has what is there.
            if failed and len(failed) == len(results) and not isinstance(failed[0], errors.OutOfMemoryError):
                raise failed[0]
            return results
        # Node by node: one that is gone takes no others along.
        nodes: dict[str, list[int]] = {}
        by_name = {}
        for n, (_, key, *_) in enumerate(commands):
            node = client.get_node_from_key(key)
            by_name[node.name] = node
            nodes.setdefault(node.name, []).append(n)
        results = [None] * len(commands)
        for name, numbers in nodes.items():
            some = self._of_node(client, by_name[name], [commands[n] for n in numbers], ahead)
            for n, result in zip(numbers, some, strict=True):
                results[n] = result
        if any(isinstance(result, errors.MovedError) for result in results):
            client.nodes_manager.initialize()
        return results

    def _of_node(self, client: Any, node: Any, commands: list[tuple[Any, ...]], ahead: int) -> list[Any]:  # noqa: ANN401
        if self._clock() < self._resting.get(node.name, 0.0):
            return [ConnectionError("it did not answer")] * len(commands)
        try:
            return _execute(client.get_redis_connection(node), commands, ahead)
        except Exception as error:
            self._resting[node.name] = self._clock() + _REST_S
            # Another may have taken its place. If none is left, this raises.
            client.nodes_manager.initialize()
            return [error] * len(commands)

    def _ask(
        self, call: Callable[[], _T], *, probes: bool = True, limit: Deadline | None = None
    ) -> tuple[_T | None, str | None]:
        """What a call gives, and why nothing; in a thread, as a socket's timeout is for each piece of a reply."""

        def within(deadline: Deadline) -> _T:
            future = self._calls.submit(call)
            try:
                return future.result(deadline.left_s() if limit is None else limit.left_s())
            except TimeoutError:
                if not future.cancel():
                    # It wakes up by that, and its connection is of no use any more.
                    _disconnect(self._connected)
                raise

        result, reason = self._guard.call(within, probes=probes)
        # It is not asked because it did not answer in time, or not at all.
        return result, "timeout" if reason == "open" else reason

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
        self._tier, self._events, self._models = tier, events, models
        self._since: int | None = None
        self._behind = WriteBehind(
            "stratakv-feeder",
            self._take,
            self._write,
            interval_s=interval_s,
            # For some 20 seconds.
            tries=12,
            dropped=lambda blocks: tier.dropped(len(blocks)),
        )

    def flush(self) -> bool:
        """Writes what RAM got up to now; whether the server took it."""
        return self._behind.flush(_DRAIN_S)

    def stats(self) -> BehindStats:
        """What became of what was to be written."""
        return self._behind.stats()

    def close(self) -> None:
        """Writes what is left, if the server takes it, and ends."""
        self._behind.close(_DRAIN_S)

    def _take(self) -> list[tuple[str, bytes]]:
        _, rows, self._since = self._events(self._since)
        self._tier.probe()
        self._tier.forget_again()
        return [(model, name) for model, name, _, tier, stored in rows if tier == "ram" and stored]

    def _write(self, blocks: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        left: list[tuple[str, bytes]] = []
        models = self._models()
        for model, of_model in itertools.groupby(blocks, lambda block: block[0]):
            names = [name for _, name in of_model]
            if model in models:
                left += ((model, name) for name in self._tier.write(models[model], names))
        return left


def _keep_memory() -> None:
    """Has the C library keep the memory of values, to be used again without being touched page by page.

    Pieces that are larger than any that was freed before go back to the system at once (mallopt(3),
    ``M_MMAP_THRESHOLD``), and what lies free behind the others does beyond twice that size. Where the C library is
    another, nothing comes of it.
    """
    spare = bytes(2 * _BATCH_BYTES - (1 << 16))
    del spare


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
        # Replies are read here; this is what servers speak from the start.
        "protocol": 2,
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }
    kept = {name: value for name, value in options.items() if value is not None}
    if config.cluster:
        return redis.RedisCluster.from_url(config.url, require_full_coverage=False, **kept)
    return redis.Redis.from_url(str(config.url), **kept)


def _execute(client: Any, commands: list[tuple[Any, ...]], ahead: int) -> list[Any]:  # noqa: ANN401 - of one node
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        return _exchange(connection, commands, ahead)
    except BaseException:
        # Nobody knows what would be read next.
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _exchange(connection: Any, commands: list[tuple[Any, ...]], ahead: int) -> list[Any]:  # noqa: ANN401 - the library's
    """Sends commands, so many ahead of their replies, and reads those; a reply may be an error."""
    results: list[Any] = []
    # Of the library's own: its public way to a reply goes through its parser.
    link, parser = connection._sock, connection._parser
    with link.makefile("rb", _LARGE_BYTES) as replies:
        _send(link, commands[:ahead])
        while len(results) < len(commands):
            line = replies.readline(_LARGE_BYTES)
            kind, said = line[:1], line[1:-2]
            if not line.endswith(b"\r\n") or kind not in (b"$", b":", b"+", b"-"):
                raise ConnectionError("the reply ends, or is none")
            # While this one is read, the server gets another ready.
            following = ahead + len(results)
            _send(link, commands[following : following + 1])
            if kind == b"$":
                results.append(_value(replies, int(said)))
            elif kind == b"-":
                results.append(parser.parse_error(said.decode(errors="replace")))
            else:
                results.append(int(said) if kind == b":" else said)
    return results


def _value(replies: BinaryIO, length: int) -> bytes | None:
    if length < 0:
        return None
    if length > _MOST_BYTES:
        raise ConnectionError(f"a value of {length} bytes")
    value = replies.read(length)
    if len(value) < length or replies.read(2) != b"\r\n":
        raise ConnectionError("the reply ends")
    return value


def _send(link: socket.socket, commands: list[tuple[Any, ...]]) -> None:
    small: list[bytes] = []
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for argument in command:
            content = argument if isinstance(argument, bytes) else str(argument).encode()
            if len(content) < _LARGE_BYTES:
                small.append(b"$%d\r\n%b\r\n" % (len(content), content))
            else:
                link.sendall(b"%b$%d\r\n" % (b"".join(small), len(content)))
                link.sendall(content)
                small = [b"\r\n"]
    if small:
        link.sendall(b"".join(small))


def _disconnect(client: Any) -> None:  # noqa: ANN401 - see there
    if client is None:
        return
    if hasattr(client, "connection_pool"):
        client.connection_pool.disconnect(inuse_connections=True)
    else:
        client.disconnect_connection_pools()


def _keys(space: bytes, names: list[bytes], first: int) -> list[bytes]:
    """Of a sequence's blocks from `first` on."""
    runs = [_run(space, head) for head in names[::_RUN_BLOCKS]]
    return [runs[n // _RUN_BLOCKS] + hexlify(names[n]) for n in range(first, len(names))]


def _run(space: bytes, head: bytes) -> bytes:
    """What keys of a run begin with; the rest is 32 digits."""
    return b"stratakv:%b:%b:{%b}:" % (hexlify(space[:16]), hexlify(space[16:]), hexlify(head))


def _some(items: Iterable[_T], most: int) -> Iterator[list[_T]]:
    remaining = iter(items)
    while some := list(itertools.islice(remaining, most)):
        yield some
