"""What a suggestion costs: 100,000 prefixes in Qdrant's engine behind its protocol, and the engine called directly."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

import numpy as np
from rows import ROOT, Row, finish, paired, row, skipped

POINTS, OF_ONE_KIND, DIMENSION, CALLS = 100_000, 100, 512, 400
MODEL, SPACE, SALT = b"m" * 16, b"s" * 16, b"bench"


def prompt(kind: int, number: int) -> np.ndarray:
    """A system prompt that its kind shares, 512 tokens, and a question of its own, as long again at most."""
    own = np.random.default_rng((kind, number))
    shared = np.random.default_rng(kind).integers(0, 50_000, 512)
    return np.concatenate((shared, own.integers(0, 50_000, own.integers(64, 513))))


def suggest_rows() -> list[Row]:
    """A suggestion through the tier, its transport and the engine; what writing a point and embedding a prompt cost."""
    if missing := skipped("suggest", "qdrant_client", "qdrant_edge"):
        return missing
    sys.path.insert(0, str(ROOT / "tests"))
    import qdrant_edge as engine

    from qdrant_server import qdrant
    from stratakv.config import QdrantConfig
    from stratakv.embedding import token_embedding
    from stratakv.tiers.qdrant import Point, Qdrant

    def vector(kind: int, number: int) -> np.ndarray:
        return token_embedding(prompt(kind, number), DIMENSION, SALT)

    def name(kind: int, number: int) -> bytes:
        return kind.to_bytes(8, "big") + number.to_bytes(8, "big")

    def points(kind: int) -> list[Point]:
        chain = tuple(kind.to_bytes(16, "big") for _ in range(64))
        rest = {"model": MODEL, "space": SPACE, "chain": chain, "tokens": 1024, "stored_at": time.time()}
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
        before = [timed(lambda asked=asked: tier.suggest(MODEL, SPACE, asked)) for asked in early]
        optimize = urllib.request.Request(f"{server.url}/collections/stratakv/optimize", method="POST")
        urllib.request.urlopen(optimize).read()
        server.kill()
        # One folder has one owner.
        shutil.copytree(Path(folder) / "server", Path(folder) / "copy")
        server.start()
        direct = engine.EdgeShard.load(str(Path(folder) / "copy" / "stratakv" / "shard"))
        conditions = [("model", MODEL), ("space", SPACE)]
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
            mine = timed(lambda asked=asked, found=found: found.extend(tier.suggest(MODEL, SPACE, asked)[0]))
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


if __name__ == "__main__":
    finish("service_qdrant", suggest_rows())
