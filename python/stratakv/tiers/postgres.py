"""The catalog in PostgreSQL: what is cached where, for whom, since when; and which versions of weights are retired.

    store's log ─(behind)─▶ rows in batches ─▶ blocks, prefixes, events
    retire(model, version) ─▶ one transaction ─▶ NOTIFY ─▶ every node drops its blocks; who missed it looks now and then

No request waits for it. What cannot be written is written later, or told anew as a whole. The schema is in ``sql/``:
numbered, applied forward under a lock, with the checksum of each kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar
from uuid import UUID

import numpy as np

from stratakv import log
from stratakv.config import Geometry
from stratakv.errors import ConfigError, StoreError
from stratakv.guard import Deadline, Guard, GuardStats
from stratakv.sections import PostgresConfig
from stratakv.tiers.schema import SchemaError, migrate, missing

_log = log.of(__name__)

# Connections that are kept open, and calls under way at once.
_CALLS = 4
# Rows that are written in one transaction; a node that tells all it has writes as many as these are.
_ROWS = 4096
# A transaction of so many rows may take a multiple of the deadline.
_ALL_FACTOR = 12
# The signature, flags and extension of a binary COPY; and what ends one.
_COPY_HEAD, _COPY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_TIERS = {"ram": 0, "ssd": 1}
_CHANNEL = "stratakv"
# Bytes of a tenant's or an adapter's name that is kept: an index has to take it.
_NAME_BYTES = 1000

_T = TypeVar("_T")
# Model, block, block before it, tier, whether it was stored: a row of the store's log.
Row = tuple[str, bytes, bytes | None, str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRow:
    """A cached prefix, as the catalog has it.

    Attributes:
        model: number of its model in the catalog.
        space: names its namespace, 16 bytes.
        adapter: name of the adapter; ``None``: not known.
        tenant: name of the tenant; ``None``: not known.
        tokens: its length.
        chain: the names of its blocks, 16 bytes each.
        since: when its last block came, in seconds since 1970.
        used: when it was used last.
        uses: by how many matches since the row before.
    """

    model: int
    space: bytes
    adapter: str | None
    tenant: str | None
    tokens: int
    chain: bytes
    since: float
    used: float
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What one node holds of a prefix.

    Attributes:
        node: its name.
        blocks: leading blocks.
        in_ram: those of them that are in RAM there.
        seen_s_ago: seconds since the node was seen last.
    """

    node: str
    blocks: int
    in_ram: int
    seen_s_ago: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresStats:
    """What was asked of the catalog.

    Attributes:
        node: what this process is called there; ``None`` before it was reached.
        written_rows: rows of blocks that came or went.
        written_prefixes: prefixes told, anew or once more.
        refused: why it is not used at all, as a schema that is newer than this version; ``None``: it is.
        guard: of its calls.
    """

    node: str | None
    written_rows: int
    written_prefixes: int
    refused: str | None
    guard: GuardStats


class Postgres:
    """The catalog of all nodes. Any thread may use it."""

    def __init__(self, config: PostgresConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Connects, and applies what is missing of the schema; without an answer, when it is first asked again.

        Args:
            config: where, and for how long.
            clock: seconds, for the breaker.

        Raises:
            ConfigError: the library is not installed.
            StoreError: the database is required, and does not answer or cannot be used.
        """
        self.config = config
        _library()
        self._guard = Guard("postgres", deadline_s=config.deadline_s, clock=clock)
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="stratakv-postgres")
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._closed = False
        # Set up once, by whoever reaches it first: the schema, and what this node is called.
        self._setting_up, self._watching = threading.Lock(), threading.Lock()
        self._name: Any = None
        self.node: str | None = None
        # Raised with each set-up: what was told before one may be another's, or gone.
        self.generation = 0
        self._taken: set[Any] = set()
        self._node_id = 0
        self._refused: str | None = None
        self._counts = {"written_rows": 0, "written_prefixes": 0}
        self.ask(lambda connection: connection.execute("SELECT 1"))
        kind = self._refused or self._guard.stats().last_error
        if kind is not None:
            if config.required:
                self.close()
                why = self._refused or f"it does not answer ({kind})"
                raise StoreError(f"postgres.url cannot be used: {why}; mend that, or do not require it")
            _log.warning("postgres_absent", "postgres is not used for now: %s", kind, error=kind)

    # What nodes tell.

    def register(
        self, fingerprint: bytes, name: str, weights_version: str, geometry: Geometry
    ) -> tuple[int, bool] | None:
        """Enters a model; its number, and whether its version is retired. ``None``: there was no answer."""
        shape = json.dumps(asdict(geometry))
        return self.ask(
            lambda connection: connection.execute(
                "SELECT id, retired FROM stratakv.add_model(%s, %s, %s, %s, %s, %s)",
                (UUID(bytes=fingerprint), name, weights_version, shape, geometry.block_tokens, geometry.block_bytes),
            ).fetchone()
        )

    def write(self, rows: Sequence[Row], models: Mapping[str, int]) -> bool:
        """Writes which blocks this node's tiers got and lost, in their order; whether that was done."""
        for n in range(0, len(rows), _ROWS):
            # Of one block in one tier what was last counts.
            last = {
                (model, name, tier): stored for model, name, _, tier, stored in rows[n : n + _ROWS] if model in models
            }
            came = [(models[model], name, _TIERS[tier]) for (model, name, tier), stored in last.items() if stored]
            left = [(models[model], name, _TIERS[tier]) for (model, name, tier), stored in last.items() if not stored]
            if self.ask(functools.partial(self._write, came, left)) is None:
                return False
            self._count(written_rows=len(last))
        return True

    def write_all(self, rows: Sequence[Row], models: Mapping[str, int]) -> bool:
        """Writes all that this node's tiers hold, in place of what is known of it; whether that was done."""
        blocks = [(models[model], name, _TIERS[tier]) for model, name, _, tier, _ in rows if model in models]
        seconds = self.config.deadline_s * (1 + _ALL_FACTOR * (1 + len(blocks) // 100_000))
        if self.ask(functools.partial(self._write_all, blocks), deadline_s=seconds) is None:
            return False
        self._count(written_rows=len(blocks))
        return True

    def write_prefixes(self, prefixes: Sequence[PrefixRow]) -> bool:
        """Tells prefixes where a put or a match ended; whether that was done."""
        rows = sorted({(row.chain[-16:], row.model): row for row in prefixes}.items())
        if rows and self.ask(functools.partial(self._write_prefixes, [row for _, row in rows])) is None:
            return False
        self._count(written_prefixes=len(rows))
        return True

    def write_events(self, events: Sequence[tuple[str, int | None, str | None, Sequence[int]]]) -> bool:
        """Notes events of this node; whether that was done.

        Args:
            events: kind, model, tenant, and blocks asked for, blocks found, tokens loaded, blocks put and bytes put.
        """
        query = (
            "INSERT INTO stratakv.events"
            " (kind, node, model, tenant, asked_blocks, hit_blocks, loaded_tokens, put_blocks, put_bytes)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
        )

        def write(connection: Any) -> bool:  # noqa: ANN401 - of the library
            rows = [(kind, self._node_id, model, _text(tenant), *counts) for kind, model, tenant, counts in events]
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(query, rows)
            return True

        return bool(self.ask(write))

    def beat(self, *, upkeep: bool = False, closing: bool = False) -> bool:
        """Says that this node lives, or closes; whether that was done.

        Args:
            upkeep: also makes room for the days to come, and drops what is too old.
            closing: what it has in RAM is nobody's any more, and on SSD when it is back.
        """

        def work(connection: Any) -> bool:  # noqa: ANN401 - of the library
            closed = "now()" if closing else "NULL"
            query = f"UPDATE stratakv.nodes SET seen_at = now(), closed_at = {closed} WHERE id = %s"
            connection.execute(query, (self._node_id,))
            return True

        return bool(self.ask(work)) and (not upkeep or self._upkeep())

    def _upkeep(self) -> bool:
        # Each by itself: what one of them waits for keeps no other waiting.
        days = self.config.keep_days
        calls = (("add_days", (2,)), ("drop_days", (days,)), ("clean", (days,)), ("clean_retired", ()))
        seconds = self.config.deadline_s * _ALL_FACTOR

        def call(name: str, values: tuple[int, ...], connection: Any) -> bool:  # noqa: ANN401 - of the library
            connection.execute(f"SELECT stratakv.{name}({', '.join(['%s'] * len(values))})", values)
            return True

        done = [bool(self.ask(functools.partial(call, *each), deadline_s=seconds)) for each in calls]
        return all(done)

    # What nodes and operators ask.

    def retired(self) -> set[bytes] | None:
        """Fingerprints of models whose version is retired; ``None``: there was no answer."""
        rows = self.ask(
            lambda connection: connection.execute(
                "SELECT fingerprint FROM stratakv.models WHERE retired_at IS NOT NULL"
            ).fetchall()
        )
        return None if rows is None else {fingerprint.bytes for (fingerprint,) in rows}

    def retire(self, name: str, weights_version: str, *, back: bool = False) -> int | None:
        """Retires a version of a model's weights, or takes that back; how many shapes of it. ``None``: no answer."""
        query = f"SELECT stratakv.{'restore' if back else 'retire'}(%s, %s)"
        seconds = self.config.deadline_s * _ALL_FACTOR
        row = self.ask(
            lambda connection: connection.execute(query, (name, weights_version)).fetchone(), deadline_s=seconds
        )
        if row is not None and not back:
            # If that does not work now, upkeep does it.
            self.ask(lambda connection: bool(connection.execute("SELECT stratakv.clean_retired()")), deadline_s=seconds)
        return None if row is None else int(row[0])

    def holders(self, model: int, names: Sequence[bytes]) -> list[Holder] | None:
        """Which nodes hold how much of a prefix, most first; ``None``: there was no answer."""
        blocks = [UUID(bytes=name) for name in names]
        rows = self.ask(
            lambda connection: connection.execute(
                "SELECT node, blocks, in_ram, extract(epoch FROM now() - seen_at) FROM stratakv.holders(%s, %s)",
                (model, blocks),
            ).fetchall()
        )
        if rows is None:
            return None
        found = [Holder(node=node, blocks=n, in_ram=ram, seen_s_ago=float(ago)) for node, n, ram, ago in rows]
        return sorted(found, key=lambda holder: (-holder.blocks, -holder.in_ram, holder.node))

    def hottest(self, model: int, limit: int) -> list[tuple[str | None, str | None, list[bytes]]] | None:
        """Adapter, tenant and blocks' names of the prefixes that are worth most; ``None``: there was no answer."""
        rows = self.ask(
            lambda connection: connection.execute(
                "SELECT adapter, tenant, chain FROM stratakv.prefixes WHERE model = %s"
                " ORDER BY heat DESC, name LIMIT %s",
                (model, limit),
            ).fetchall()
        )
        return None if rows is None else [(adapter, tenant, split(chain)) for adapter, tenant, chain in rows]

    def numbers(self, name: str | None) -> list[int] | None:
        """Numbers of the models of a name, or of all, that are not retired; ``None``: there was no answer."""
        query = (
            "SELECT id FROM stratakv.models WHERE retired_at IS NULL AND (%(name)s::text IS NULL OR name = %(name)s)"
        )
        rows = self.ask(lambda connection: connection.execute(query, {"name": name}).fetchall())
        return None if rows is None else [number for (number,) in rows]

    def find(
        self, where: str, values: Mapping[str, object], limit: int, *, order: str = "p.heat DESC, p.name"
    ) -> list[tuple[Any, ...]] | None:
        """Prefixes: model, version, adapter, tenant, tokens, chain, places, since, used, uses, heat, model's number.

        Args:
            where: a condition over ``p``, a prefix, and ``m``, its model, with named parameters.
            values: of the parameters.
            limit: so many at most.
            order: which of them.
        """
        query = (
            "SELECT m.name, m.weights_version, p.adapter, p.tenant, p.tokens, p.chain,"
            " stratakv.places(p.model, p.chain),"
            " extract(epoch FROM p.since), extract(epoch FROM p.used), p.uses, stratakv.uses_now(p.heat), p.model"
            " FROM (SELECT p.* FROM stratakv.prefixes p JOIN stratakv.models m ON m.id = p.model"
            f" WHERE m.retired_at IS NULL AND {where} ORDER BY {order} LIMIT %(limit)s) AS p"
            f" JOIN stratakv.models m ON m.id = p.model ORDER BY {order}"
        )
        return self.ask(lambda connection: connection.execute(query, {**values, "limit": limit}).fetchall())

    def usage(self, where: str, values: Mapping[str, object]) -> list[tuple[Any, ...]] | None:
        """Usage by hour, model and tenant, oldest first: as the view ``stratakv.usage``."""
        query = (
            "SELECT extract(epoch FROM hour), model, weights_version, tenant, asked_blocks, hit_blocks, loaded_tokens,"
            f" put_blocks, put_bytes FROM stratakv.usage WHERE {where} ORDER BY hour, model, tenant"
        )
        return self.ask(lambda connection: connection.execute(query, values).fetchall())

    def watch(self, timeout_s: float) -> bool:
        """Waits until something is retired or restored, so long at most; whether it was heard of. Of one thread."""
        name = self._name
        if name is None or self._refused is not None:
            time.sleep(min(timeout_s, 1.0))
            return False
        try:
            with self._watching:
                if any(True for _ in name.notifies(timeout=timeout_s, stop_after=1)):
                    return True
                # Where nobody answers, the name is not ours any more.
                _limit(name, Deadline(self.config.deadline_s))
                name.execute("SET statement_timeout = 0")
                return False
        except Exception as error:
            # The next call makes a new one; the name may be another's by then.
            if not self._closed:
                _log.warning(
                    "notices_lost",
                    "postgres tells of retired versions no more (%s): they are looked for",
                    type(error).__name__,
                    error=type(error).__name__,
                )
            with self._setting_up:
                self._name = None
            with contextlib.suppress(Exception):
                name.close()
            return False

    @staticmethod
    def check(config: PostgresConfig) -> str | None:
        """Why a catalog cannot be used, without using it; ``None``: it can."""
        try:
            connection = _connect(config, Deadline(config.deadline_s))
        except Exception as error:
            return type(error).__name__
        try:
            _limit(connection, Deadline(config.deadline_s))
            if connection.execute("SELECT to_regclass('stratakv.migrations')").fetchone() == (None,):
                return None
            missing(connection)
        except SchemaError as error:
            return str(error)
        except Exception as error:
            return type(error).__name__
        finally:
            connection.close()
        return None

    def stats(self) -> PostgresStats:
        """What was asked of it."""
        with self._lock:
            return PostgresStats(node=self.node, refused=self._refused, guard=self._guard.stats(), **self._counts)

    def close(self) -> None:
        """Disconnects; calls that are under way fail."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self._calls.shutdown(wait=False, cancel_futures=True)
        for connection in idle:
            connection.close()
        if (name := self._name) is not None:
            # A thread may wait for what it tells.
            _cut(name)
            with self._watching:
                name.close()

    def ask(self, work: Callable[[Any], _T], *, deadline_s: float | None = None) -> _T | None:
        """What some work with a connection gives; ``None``: it failed, took too long, or was not tried."""
        if self._refused is not None:
            return None
        errors = _library().errors

        def within(deadline: Deadline) -> _T | None:
            limit = Deadline(deadline_s) if deadline_s is not None else deadline
            taken: list[Any] = []
            future = self._calls.submit(self._with_connection, work, limit, taken)
            try:
                return future.result(limit.left_s())
            except TimeoutError:
                if not future.cancel():
                    for connection in taken:
                        _cut(connection)
                raise
            except (errors.UndefinedTable, errors.UndefinedFunction, errors.InvalidSchemaName):
                # Somebody emptied the database: it is made anew by whoever asks next.
                self._begin_anew()
                raise
            except (errors.DataError, errors.ProgramLimitExceeded) as error:
                # The server is well: it is what was asked that is not.
                kind = type(error).__name__
                _log.warning("postgres_refused", "postgres refused what was asked (%s)", kind, key=kind, error=kind)
                return None

        return self._guard.call(within)[0]

    def interrupt(self) -> None:
        """Ends calls that are under way."""
        with self._lock:
            taken = list(self._taken)
        for connection in taken:
            _cut(connection)

    def _begin_anew(self) -> None:
        name = self._name
        if name is not None:
            _cut(name)
            with self._setting_up:
                if self._name is name:
                    self._name = None

    def _with_connection(self, work: Callable[[Any], _T], deadline: Deadline, taken: list[Any]) -> _T:
        self._set_up(deadline, taken)
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = _connect(self.config, deadline)
        taken.append(connection)
        with self._lock:
            self._taken.add(connection)
        try:
            _limit(connection, deadline)
            result = work(connection)
        except BaseException:
            # Whatever state it is in, nobody uses it again.
            connection.close()
            raise
        finally:
            with self._lock:
                self._taken.discard(connection)
        taken.clear()
        with self._lock:
            keep = not self._closed and len(self._idle) < _CALLS
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()
        return result

    def _set_up(self, deadline: Deadline, taken: list[Any]) -> None:
        if not self._setting_up.acquire(timeout=deadline.left_s()):
            raise TimeoutError
        try:
            if self._closed:
                raise StoreError("the store is closed")
            if self._name is not None and not self._name.closed:
                return
            name = _connect(self.config, deadline)
            taken.append(name)
            try:
                _limit(name, deadline)
                migrate(name)
                self.node, self._node_id = _claim(name, self.config.node or socket.gethostname())
                # It waits for what it is told, without a limit.
                name.execute("SET statement_timeout = 0")
                name.execute(f"LISTEN {_CHANNEL}")
            except SchemaError as error:
                name.close()
                self._refused = str(error)
                raise
            except BaseException:
                name.close()
                raise
            taken.clear()
            self._name = name
            self.generation += 1
        finally:
            self._setting_up.release()

    def _write(self, came: list[tuple[int, bytes, int]], left: list[tuple[int, bytes, int]], connection: Any) -> bool:  # noqa: ANN401 - of the library
        with connection.transaction():
            live = _live(connection, {model for model, _, _ in came})
            kept = [row for row in came if row[0] in live]
            if kept:
                _stage(connection, kept, self._node_id)
                connection.execute(
                    "INSERT INTO stratakv.blocks (model, name, node, tier) SELECT model, name, node, tier FROM stage"
                    " ON CONFLICT DO NOTHING"
                )
            if left:
                models, names, tiers = (list(column) for column in zip(*left, strict=True))
                connection.execute(
                    "DELETE FROM stratakv.blocks b"
                    " USING unnest(%s::int[], %s::uuid[], %s::int[]) AS gone (model, name, tier)"
                    " WHERE b.model = gone.model AND b.name = gone.name AND b.tier = gone.tier AND b.node = %s",
                    (models, [UUID(bytes=name) for name in names], tiers, self._node_id),
                )
        return True

    def _write_all(self, blocks: list[tuple[int, bytes, int]], connection: Any) -> bool:  # noqa: ANN401 - of the library
        with connection.transaction():
            live = _live(connection, {model for model, _, _ in blocks})
            _stage(connection, [row for row in blocks if row[0] in live], self._node_id)
            connection.execute("ANALYZE stage")
            connection.execute(
                "DELETE FROM stratakv.blocks b WHERE b.node = %s AND NOT EXISTS ("
                " SELECT FROM stage s WHERE s.model = b.model AND s.name = b.name AND s.tier = b.tier)",
                (self._node_id,),
            )
            connection.execute(
                "INSERT INTO stratakv.blocks (model, name, node, tier) SELECT model, name, node, tier FROM stage"
                " ON CONFLICT DO NOTHING"
            )
        return True

    def _write_prefixes(self, rows: list[PrefixRow], connection: Any) -> bool:  # noqa: ANN401 - of the library
        with connection.transaction():
            live = _live(connection, {row.model for row in rows})
            kept = [row for row in rows if row.model in live]
            columns = (
                [row.model for row in kept],
                [UUID(bytes=row.chain[-16:]) for row in kept],
                [UUID(bytes=row.space) for row in kept],
                [_text(row.adapter) for row in kept],
                [_text(row.tenant) for row in kept],
                [row.tokens for row in kept],
                [row.chain for row in kept],
                [row.since for row in kept],
                [row.used for row in kept],
                [row.uses for row in kept],
            )
            connection.execute(
                "INSERT INTO stratakv.prefixes AS p"
                " (model, name, space, adapter, tenant, tokens, chain, since, used, uses, heat)"
                " SELECT model, name, space, adapter, tenant, tokens, chain, to_timestamp(since), to_timestamp(used),"
                " uses,"
                " stratakv.heated(used / 86400, uses, to_timestamp(used))"
                # A node's clock that is ahead would keep what it saw hottest for ever.
                " FROM (SELECT model, name, space, adapter, tenant, tokens, chain, uses, least(since, at) AS since,"
                " least(used, at) AS used FROM (SELECT extract(epoch FROM now())::float8) AS clock (at),"
                " unnest(%s::int[], %s::uuid[], %s::uuid[], %s::text[], %s::text[], %s::int[], %s::bytea[],"
                " %s::float8[], %s::float8[], %s::bigint[])"
                " AS r (model, name, space, adapter, tenant, tokens, chain, since, used, uses)) AS r"
                " ON CONFLICT (name, model) DO UPDATE SET used = greatest(p.used, excluded.used),"
                " uses = p.uses + excluded.uses,"
                " adapter = coalesce(p.adapter, excluded.adapter), tenant = coalesce(p.tenant, excluded.tenant),"
                " heat = stratakv.heated(p.heat, excluded.uses, excluded.used)",
                columns,
            )
        return True

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number


def _text(name: str | None) -> str | None:
    """A name, if the database takes it; else it is not known there."""
    return name if name is not None and "\0" not in name and len(name.encode()) <= _NAME_BYTES else None


def split(chain: bytes) -> list[bytes]:
    """The names in a chain of them."""
    return [chain[at : at + 16] for at in range(0, len(chain), 16)]


def _library() -> Any:  # noqa: ANN401 - a module
    try:
        import psycopg
    except ImportError as error:
        raise ConfigError("postgres.url needs a library: pip install 'stratakv[postgres]'") from error
    return psycopg


def _connect(config: PostgresConfig, deadline: Deadline) -> Any:  # noqa: ANN401 - of the library
    url = str(config.url)
    options: dict[str, Any] = {
        "autocommit": True,
        # Whole seconds, 2 at least: libpq's.
        "connect_timeout": max(math.ceil(deadline.left_s()), 2),
        "application_name": "stratakv",
        "options": "-c lock_timeout=5s -c timezone=UTC -c search_path=pg_catalog,pg_temp",
        # Seconds, and milliseconds: a connection that nobody answers on is one no more.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
    if config.password is not None:
        options["password"] = config.password
    said = _library().conninfo.conninfo_to_dict(url)
    hosts = [said.get(key) or os.environ.get(f"PG{key.upper()}") or "" for key in ("host", "hostaddr")]
    here = all(host in ("", "localhost", "127.0.0.1", "::1") or host.startswith(("/", "@")) for host in hosts)
    if "service" in said or "PGSERVICE" in os.environ:
        # Where that leads, its file says.
        here = False
    if "sslmode" not in said and "PGSSLMODE" not in os.environ and not here:
        options |= {"sslmode": "verify-full", "sslrootcert": str(config.ca_file or "system")}
    elif config.ca_file is not None:
        options["sslrootcert"] = str(config.ca_file)
    return _library().connect(url, **options)


def _limit(connection: Any, deadline: Deadline) -> None:  # noqa: ANN401 - of the library
    connection.execute(f"SET statement_timeout = {max(int(1000 * deadline.left_s()), 1)}")


def _claim(connection: Any, wanted: str) -> tuple[str, int]:  # noqa: ANN401 - of the library
    """A name that no other process has, as long as the connection lives; and its number."""
    name = wanted
    for n in range(2, 10_000):
        (free,) = connection.execute(
            "SELECT pg_try_advisory_lock(hashtext('stratakv.nodes'), hashtext(%s))", (name,)
        ).fetchone()
        if free:
            break
        name = f"{wanted}#{n}"
    (number,) = connection.execute(
        "INSERT INTO stratakv.nodes AS n (name) VALUES (%s)"
        " ON CONFLICT (name) DO UPDATE SET opened_at = now(), seen_at = now(), closed_at = NULL RETURNING n.id",
        (name,),
    ).fetchone()
    return name, int(number)


def _live(connection: Any, models: set[int]) -> set[int]:  # noqa: ANN401 - of the library
    """Those of these models that are not retired; none of them is before the transaction ends."""
    if not models:
        return set()
    query = "SELECT id FROM stratakv.models WHERE id = ANY(%s) AND retired_at IS NULL ORDER BY id FOR SHARE"
    return {model for (model,) in connection.execute(query, (sorted(models),)).fetchall()}


def _stage(connection: Any, rows: list[tuple[int, bytes, int]], node: int) -> None:  # noqa: ANN401 - of the library
    """Copies rows into the temporary table ``stage``, by name: locks that are taken in one order block nobody."""
    connection.execute(
        "CREATE TEMP TABLE IF NOT EXISTS stage (model int, name uuid, node int, tier smallint) ON COMMIT DELETE ROWS"
    )
    fields = [
        *(("count", ">i2"), ("model_bytes", ">i4"), ("model", ">i4"), ("name_bytes", ">i4"), ("name", "V16")),
        *(("node_bytes", ">i4"), ("node", ">i4"), ("tier_bytes", ">i4"), ("tier", ">i2")),
    ]
    packed = np.zeros(len(rows), fields)
    models, names, tiers = zip(*sorted(rows, key=lambda row: row[1]), strict=True) if rows else ((), (), ())
    packed["count"], packed["model_bytes"], packed["name_bytes"] = 4, 4, 16
    packed["node_bytes"], packed["tier_bytes"], packed["node"] = 4, 2, node
    packed["model"], packed["tier"] = models, tiers
    packed["name"] = np.frombuffer(b"".join(names), "V16")
    with connection.cursor().copy("COPY stage FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(_COPY_HEAD + packed.tobytes() + _COPY_END)


def _cut(connection: Any) -> None:  # noqa: ANN401 - of the library
    """Ends a connection that another thread waits on."""
    with contextlib.suppress(Exception), socket.socket(fileno=socket.dup(connection.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)
