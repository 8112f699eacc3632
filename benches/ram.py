"""What one call from Python costs beside the bytes it moves: matching, small puts and loads, a block by reference."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from rows import Row, finish, row

import stratakv
from stratakv import Config, Geometry, RamConfig, SsdConfig

ROUNDS = 2000
SMALL = Geometry(layers=2, kv_heads=2, head_dim=32, dtype="fp16", block_tokens=16)
# 32 tensors, as a model of 16 layers has them; of 64 bytes each, since it is not the bytes that is measured.
LAYERED = Geometry(layers=16, kv_heads=1, head_dim=2, dtype="fp16", block_tokens=16)


def spent(call: Callable[[], object]) -> float:
    """Microseconds of a call, the median; the clock's own share taken out."""
    clock = median(-(time.perf_counter_ns() - time.perf_counter_ns()) for _ in range(ROUNDS))
    # By then memory was touched, and is full: a put evicts.
    for _ in range(ROUNDS):
        call()
    each = []
    for _ in range(ROUNDS):
        started = time.perf_counter_ns()
        call()
        each.append(time.perf_counter_ns() - started - clock)
    return median(each) / 1000


def main() -> None:
    """Measures every call on a store without SSD."""
    config = Config(ram=RamConfig(capacity_bytes="64MiB"), ssd=SsdConfig(enabled=False))
    rows: list[Row] = []

    def add(name: str, call: Callable[[], object], must: float | None = None, goal: float | None = None) -> None:
        bounds = {
            "must": None if must is None else f"value < {must}",
            "goal": None if goal is None else f"value <= {goal}",
        }
        rows.append(row(name, spent(call), "us", n=ROUNDS, **bounds))

    with stratakv.open(config) as caches:
        cache, layered = caches.register("small", SMALL), caches.register("layered", LAYERED)
        tokens = np.arange(4096, dtype=np.uint32)
        cache.put(tokens, np.ones((2, 2, 2, 4096, 32), np.float16), layout="LKHND")
        add("match of 4,096 tokens, uint32", lambda: cache.match(tokens), 10, 5)
        wide = tokens.astype(np.int64)
        add("match of 4,096 tokens, int64", lambda: cache.match(wide), 10, 5)
        ids = list(range(4096))
        add("match of 4,096 tokens, list", lambda: cache.match(ids))

        few = tokens[:16]
        one = np.ones((2, 2, 2, 16, 32), np.float16)
        turn = itertools.count(1)
        add("put of one new block, one array", lambda: cache.put(few + next(turn) * 5000, one, layout="LKHND"), 15, 8)
        pairs = [(np.ones((1, 1, 16, 2), np.float16), np.ones((1, 1, 16, 2), np.float16)) for _ in range(16)]
        add("put of one new block, 32 arrays", lambda: layered.put(few + next(turn) * 5000, pairs), 15, 8)
        cache.put(few, one, layout="LKHND")
        with cache.match(few) as hit:
            add("load of one block, one array", lambda: hit.load(one, layout="LKHND"), 15, 8)
        layered.put(few, pairs)
        with layered.match(few) as hit:
            add("load of one block, 32 arrays", lambda: hit.load(pairs), 15, 8)

        cache.put(few, one, layout="LKHND")

        def by_reference() -> None:
            with cache.match(few) as hit:
                hit.view(0)

        add("match and view of one block", by_reference, 3, 1)
    finish("ram", rows)


if __name__ == "__main__":
    main()
