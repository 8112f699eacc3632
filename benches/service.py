"""Servers that nodes share, against what they give when they are asked directly.

Sections: `dragonfly` (records written and read in batches, and which of 256 blocks are there, on a Redis or Valkey that
it starts; the limit is the same bytes through a socket of the same machine, by one call in each direction), `catalog`
(rows written behind and a prefix looked for, in PostgreSQL without fsync, against its own COPY and query), `vectors`
(what is near, of 100,000 points in Qdrant's engine behind its protocol, against the engine called directly), `behind`
(what catalog and vector index cost a put and a match) and `requests` (with all remote tiers well, and gone). Values and
limits take turns, and `ratio` is the median over neighbouring pairs. What is not installed is skipped by name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from uuid import UUID

import numpy as np
from rows import ROOT, Row, paired, row, run, skipped

import stratakv
from stratakv import CacheManager, DragonflyConfig, Geometry, PostgresConfig, QdrantConfig
from stratakv.tiers.dragonfly import Dragonfly

# Servers that tests start.
sys.path.insert(0, str(ROOT / "tests"))

MIB = 1 << 20
REPEATS = 21
# What is put, and got, in one measurement: one batch.
PASS_BYTES = 16 * MIB
ASKED = 256
MODEL = bytes(16)
SPACE = MODEL + bytes(16)


class Records:
    """A model of so many blocks, whose records are there at once: what is measured is how they travel."""

    fingerprint = MODEL

    def __init__(self, size: int, count: int) -> None:
        self.record_bytes = size
        self.records = {n.to_bytes(16, "big"): os.urandom(size) for n in range(count)}
        self.names = list(self.records)

    def heads(self, names: list[bytes], run_blocks: int) -> list[tuple[bytes, bytes] | None]:
        return [
            ((n - n % run_blocks).to_bytes(16, "big"), bytes(16))
            for n in (int.from_bytes(name, "big") for name in names)
        ]

    def export(self, name: bytes) -> bytes | None:
        return self.records.get(name)


class Wire:
    """A connection to a thread that takes bytes, or gives them; both have their memory beforehand."""

    def __init__(self) -> None:
        self.ours, self.theirs = (memoryview(bytearray(os.urandom(PASS_BYTES))) for _ in range(2))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.link = socket.create_connection(listener.getsockname())
            self.peer, _ = listener.accept()
        for end in (self.link, self.peer):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while verb := self.peer.recv(1):
            if verb == b"g":
                self.peer.sendall(self.theirs)
            else:
                self.peer.sendall(b"+")
                receive(self.peer, self.theirs)
                self.peer.sendall(b"+")

    def get(self) -> None:
        self.link.sendall(b"g")
        receive(self.link, self.ours)

    def put(self) -> None:
        self.link.sendall(b"p")
        self.link.recv(1)
        self.link.sendall(self.ours)
        self.link.recv(1)

    def close(self) -> None:
        self.link.close()


def receive(link: socket.socket, into: memoryview) -> None:
    while into:
        into = into[link.recv_into(into) :]


def spent(call: Callable[..., object], *arguments: object) -> tuple[float, object]:
    started = time.perf_counter()
    got = call(*arguments)
    return time.perf_counter() - started, got


@contextmanager
def server(binary: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                for _ in range(500):
                    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                        break
                    time.sleep(0.01)
                yield f"redis://127.0.0.1:{port}"
            finally:
                process.kill()


def dragonfly() -> list[Row]:
    """GB/s of records, and how long 256 blocks take to be looked for."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        return [row("records in Redis: skipped, redis-server is not installed", n=0)]
    if absent := skipped("records in Redis", "redis"):
        return absent
    rows: list[Row] = []
    with ExitStack() as stack:
        url, wire = stack.enter_context(server(binary)), Wire()
        stack.callback(wire.close)
        tier = Dragonfly(DragonflyConfig(url=url, deadline_s=10.0))
        stack.callback(tier.close)
        label = subprocess.run([binary, "--version"], capture_output=True, text=True).stdout.split(" sha")[0]
        for size in (MIB, 4 * MIB):
            model = Records(size, PASS_BYTES // size)
            pairs: dict[str, list[tuple[float, float]]] = {"put": [], "get": []}
            right = True
            for repeat in range(REPEATS + 1):
                assert tier.forget(MODEL)
                (put_limit, _), (put, _) = spent(wire.put), spent(tier.write, model, model.names)
                (get_limit, _), (get, got) = spent(wire.get), spent(tier.fetch, SPACE, model.names, size)
                right &= got == (list(model.records.values()), None)
                del got
                if repeat:  # The first warms up.
                    pairs["put"].append((PASS_BYTES / put / 1e9, PASS_BYTES / put_limit / 1e9))
                    pairs["get"].append((PASS_BYTES / get / 1e9, PASS_BYTES / get_limit / 1e9))
            more = {"must": "ratio >= 0.6", "goal": "ratio >= 0.9", "right": None if right else False}
            for verb, each in pairs.items():
                rows.append(paired(f"{verb}, {size // MIB} MiB, {label}", "GB/s", each, "a socket", **more))
        assert tier.forget(MODEL)
        model = Records(64, ASKED)
        tier.write(model, model.names)
        asked = [spent(tier.leading, SPACE, model.names) for _ in range(1000)]
        taken = [1000 * seconds for seconds, _ in asked]
        right = None if {found for _, found in asked} == {(ASKED, None)} else False
        more = {"must": "value < 1", "goal": "value < 0.4", "right": right, "n": len(taken)}
        rows.append(row(f"which of {ASKED} blocks are there, p50", median(taken), "ms", **more))
    return rows


# What is near: points, of so many kinds, and calls.
POINTS, OF_ONE_KIND, DIMENSION, CALLS = 100_000, 100, 512, 400
SALT = b"bench"


def prompt(kind: int, number: int) -> np.ndarray:
    """A system prompt that its kind shares, 512 tokens, and a question of its own, as long again at most."""
    own = np.random.default_rng((kind, number))
    shared = np.random.default_rng(kind).integers(0, 50_000, 512)
    return np.concatenate((shared, own.integers(0, 50_000, own.integers(64, 513))))


def vectors() -> list[Row]:
    """A suggestion through the tier, its transport and the engine; what writing a point and embedding a prompt cost."""
    if missing := skipped("suggest", "qdrant_client", "qdrant_edge"):
        return missing
    import qdrant_edge as engine

    from qdrant_server import qdrant
    from stratakv.embedding import token_embedding
    from stratakv.tiers.qdrant import Point, Qdrant

    def vector(kind: int, number: int) -> np.ndarray:
        return token_embedding(prompt(kind, number), DIMENSION, SALT)

    def name(kind: int, number: int) -> bytes:
        return kind.to_bytes(8, "big") + number.to_bytes(8, "big")

    def points(kind: int) -> list[Point]:
        chain = tuple(kind.to_bytes(16, "big") for _ in range(64))
        rest = {"model": MODEL, "space": SPACE[16:], "chain": chain, "tokens": 1024, "stored_at": time.time()}
        return [Point(name=name(kind, n), vector=vector(kind, n), **rest) for n in range(OF_ONE_KIND)]

    def timed(call: object) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    tokens = np.random.default_rng(0).integers(0, 50_000, 1024)
    embedded = [timed(lambda: token_embedding(tokens, DIMENSION, SALT)) for _ in range(1000)]
    writes: list[float] = []
    with tempfile.TemporaryDirectory() as folder, qdrant(Path(folder) / "server") as server:
        tier = Qdrant(QdrantConfig(url=server.url, deadline_s=5.0, required=True))
        for kind in range(POINTS // OF_ONE_KIND):
            some = points(kind)
            writes.append(timed(lambda some=some: tier.store(some)) / OF_ONE_KIND)
        complete = tier.count() == POINTS
        early = [vector(kind, 1000) for kind in range(CALLS // 4)]
        before = [timed(lambda asked=asked: tier.suggest(MODEL, SPACE[16:], asked)) for asked in early]
        optimize = urllib.request.Request(f"{server.url}/collections/stratakv/optimize", method="POST")
        urllib.request.urlopen(optimize).read()
        server.kill()
        # One folder has one owner.
        shutil.copytree(Path(folder) / "server", Path(folder) / "copy")
        server.start()
        direct = engine.EdgeShard.load(str(Path(folder) / "copy" / "stratakv" / "shard"))
        conditions = [("model", MODEL), ("space", SPACE[16:])]
        must = [engine.FieldCondition(key=key, match=engine.MatchValue(value.hex())) for key, value in conditions]

        def ask(numbers: list[float]) -> object:
            nearest, mine = engine.Query.Nearest(numbers), engine.Filter(must=must)
            wide = engine.SearchParams(hnsw_ef=48)
            return direct.query(
                engine.QueryRequest(3, None, nearest, with_payload=True, filter=mine, score_threshold=0.5, params=wide)
            )

        pairs, right = [], 0
        kinds = [n % (POINTS // OF_ONE_KIND) for n in range(-200, CALLS)]
        vectors = [vector(kind, 2000) for kind in kinds]
        for n, (kind, asked) in enumerate(zip(kinds, vectors, strict=True), -200):
            numbers = asked.tolist()
            found: list[object] = []
            mine = timed(lambda asked=asked, found=found: found.extend(tier.suggest(MODEL, SPACE[16:], asked)[0]))
            bound = timed(lambda numbers=numbers: ask(numbers))
            # The first warm both up.
            if n >= 0:
                pairs.append((1000 * mine, 1000 * bound))
                right += bool(found) and found[0].name[:8] == kind.to_bytes(8, "big")
        tier.close()
        direct.close()
    many = f"{POINTS:,} points × {DIMENSION}"
    slowest = sorted(mine for mine, _ in pairs)[int(0.99 * len(pairs))]
    return [
        paired(
            f"suggest, {many}, p50",
            "ms",
            pairs,
            "engine called directly",
            must="value < 8",
            goal="value < 2",
            right=complete and right >= 0.99 * CALLS,
        ),
        row(f"suggest, {many}, p99", slowest, "ms", n=CALLS),
        row(f"suggest, {many}, before the index is built, p50", 1000 * median(before), "ms", n=len(before)),
        row("suggest, the best is of the kind asked for", right / CALLS, "", n=CALLS),
        row("store, for each point", 1e6 * median(writes), "µs", n=len(writes)),
        row("embed 1,024 tokens", 1e6 * median(embedded), "µs", n=len(embedded)),
    ]


ROWS, NAMES = 1000, 128


def catalog() -> list[Row]:
    """Rows of blocks written behind a second, and how long a prefix of 128 blocks takes to be looked for."""
    if absent := skipped("the catalog", "psycopg"):
        return absent
    import psycopg

    from servers import postgres
    from stratakv.tiers.postgres import Postgres

    shape = geometry()
    written: list[tuple[float, float]] = []
    asked: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, postgres(Path(folder)) as server:
        tier = Postgres(PostgresConfig(url=server.url(), required=True))
        number, _ = tier.register(MODEL, "m", "", shape)
        names: list[bytes] = []
        with psycopg.connect(server.url(), autocommit=True) as direct:
            direct.execute("CREATE TABLE plain (name bytea, node int, tier smallint)")

            def copy(rows: list[tuple[str, bytes, None, str, bool]]) -> None:
                with direct.cursor().copy("COPY plain FROM STDIN (FORMAT BINARY)") as stream:
                    stream.set_types(["bytea", "int4", "int2"])
                    for _, name, *_ in rows:
                        stream.write_row((name, 1, 0))

            for repeat in range(-5, 101):
                names = [os.urandom(16) for _ in range(ROWS)]
                rows = [("m", name, None, "ram", True) for name in names]
                mine, done = spent(tier.write, rows, {"m": number})
                bound, _ = spent(copy, rows)
                assert done
                if repeat >= 0:
                    written.append((ROWS / mine / 1000, ROWS / bound / 1000))
            prefix = [UUID(bytes=name) for name in names[:NAMES]]
            query = "SELECT name, node, tier FROM stratakv.blocks WHERE model = %s AND name = ANY(%s)"
            for repeat in range(-20, 500):
                mine, held = spent(tier.holders, number, names[:NAMES])
                bound, _ = spent(lambda: direct.execute(query, (number, prefix)).fetchall())
                assert [holder.blocks for holder in held] == [NAMES]
                if repeat >= 0:
                    asked.append((1000 * mine, 1000 * bound))
        tier.close()
    return [
        paired(
            f"catalog: rows written, {ROWS:,} at a time",
            "k rows/s",
            written,
            "COPY alone",
            must="value >= 40",
            goal="value >= 65",
        ),
        paired(
            f"catalog: which nodes hold {NAMES} blocks, p50",
            "ms",
            asked,
            "a query of the rows",
            must="value < 2",
            goal="value < 1.2",
        ),
    ]


# Of one request, and pauses between two: what is done behind a request has to be done before the next.
REQUEST_TOKENS, PACE_S, REQUESTS = 512, 0.05, 150


def geometry() -> Geometry:
    """Of a model of about 1 B parameters."""
    return Geometry(layers=16, kv_heads=8, head_dim=64, dtype="fp16", block_tokens=16)


def keys_and_values() -> np.ndarray:
    shape = geometry()
    size = (shape.layers, 2, shape.kv_heads, REQUEST_TOKENS, shape.head_dim)
    return np.random.default_rng(0).standard_normal(size, np.float32).astype(np.float16)


def opened(**tiers: object) -> CacheManager:
    return stratakv.open(
        stratakv.Config(
            ram=stratakv.RamConfig(capacity_bytes="2GiB"),
            ssd=stratakv.SsdConfig(enabled=False),
            store=stratakv.StoreConfig(secret="bench"),
            **tiers,
        )
    )


def behind() -> list[Row]:
    """What catalog and vector index cost a put and a match: two stores in turns, one with both and one without."""
    if absent := skipped("the cost of what is done behind", "psycopg", "qdrant_client", "qdrant_edge"):
        return absent
    from qdrant_server import qdrant
    from servers import postgres

    taken: dict[str, list[tuple[float, float]]] = {"put": [], "match": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sql = stack.enter_context(postgres(folder))
        near = stack.enter_context(qdrant(folder / "qdrant"))
        both = stack.enter_context(
            opened(postgres=PostgresConfig(url=sql.url()), qdrant=QdrantConfig(url=near.url, deadline_s=2.0))
        )
        none = stack.enter_context(opened())
        caches = [manager.register("m", geometry()) for manager in (both, none)]
        kv, chance = keys_and_values(), np.random.default_rng(1)
        for repeat in range(-10, REQUESTS):
            tokens = chance.integers(0, 50_000, REQUEST_TOKENS)
            pairs: dict[str, list[float]] = {"put": [], "match": []}
            order = caches if repeat % 2 else caches[::-1]
            for cache in order:
                time.sleep(PACE_S)
                pairs["put"].append(spent(lambda cache=cache, tokens=tokens: cache.put(tokens, kv, layout="LKHND"))[0])
                time.sleep(PACE_S)
                # Half of it is found: what is near is asked for.
                longer = np.concatenate([tokens, tokens])
                pairs["match"].append(spent(lambda cache=cache, longer=longer: cache.match(longer).release())[0])
            if repeat >= 0:
                for verb, (first, second) in pairs.items():
                    with_, without = (first, second) if repeat % 2 else (second, first)
                    taken[verb].append((1e6 * with_, 1e6 * without))
        told = both.status()
        right = None if told.postgres.written_rows and told.qdrant.written_points else False
    return [
        paired(
            f"{verb} with catalog and vector index, p50",
            "µs",
            pairs,
            "without",
            must="ratio <= 1.03",
            goal="ratio <= 1.01",
            right=right,
        )
        for verb, pairs in taken.items()
    ]


def requests() -> list[Row]:
    """Requests while all that is remote is well, and while it is a hole in the network."""
    if absent := skipped("requests", "redis", "psycopg", "qdrant_client", "qdrant_edge"):
        return absent
    from qdrant_server import qdrant
    from servers import Proxy, postgres, redis

    deadline_s = 0.25
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("redis", "qdrant"):
            (folder / name).mkdir()
        urls = [
            stack.enter_context(redis(folder / "redis")).url,
            stack.enter_context(postgres(folder)).url(),
            stack.enter_context(qdrant(folder / "qdrant")).url,
        ]
        proxies = [Proxy(url) for url in urls]
        for proxy in proxies:
            stack.callback(proxy.close)
        caches = stack.enter_context(
            opened(
                dragonfly=DragonflyConfig(url=proxies[0].url, deadline_s=deadline_s),
                postgres=PostgresConfig(url=proxies[1].url, deadline_s=1.0),
                qdrant=QdrantConfig(url=proxies[2].url, deadline_s=deadline_s),
            )
        )
        cache, kv, chance = caches.register("m", geometry()), keys_and_values(), np.random.default_rng(2)
        out = np.empty_like(kv)

        def request() -> None:
            tokens = chance.integers(0, 50_000, REQUEST_TOKENS)
            cache.match(tokens).release()
            cache.put(tokens, kv, layout="LKHND")
            with cache.match(tokens) as hit:
                assert hit.load(out, layout="LKHND") == REQUEST_TOKENS

        def served(count: int) -> list[float]:
            taken = []
            for _ in range(count):
                time.sleep(PACE_S / 2)
                taken.append(1000 * spent(request)[0])
            return sorted(taken)

        served(20)
        well = served(2 * REQUESTS)
        for proxy in proxies:
            proxy.mode = "blackhole"
        first = served(10)[-1]
        for _ in range(200):
            if len(caches.status().degraded) == 4:
                break
            served(1)
        gone = served(2 * REQUESTS)
        for proxy in proxies:
            proxy.mode = "pass"
    p99 = int(0.99 * len(well))
    both = {"must": "ratio <= 1.2", "goal": "ratio <= 1.0"}
    limit = "all well"
    return [
        paired("request with all remote tiers gone, p99", "ms", [(gone[p99], well[p99])], limit, **both),
        paired("request with all remote tiers gone, p50", "ms", [(median(gone), median(well))], limit),
        # One question, and what goes on beside it.
        row("slowest request before breakers open", first, "ms", must=f"value <= {1000 * (deadline_s + 0.1):g}"),
    ]


if __name__ == "__main__":
    run("service", dragonfly, catalog, vectors, behind, requests)
