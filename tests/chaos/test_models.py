"""Many models come, serve, are divided and go at once, from many threads: no error, nothing wrong, nothing left.

`ROUNDS=` for more: `make chaos SUITE=models ROUNDS=100`.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import assert_right, assert_sums, geometry, kv_of, tokens_of

ROUNDS = int(os.environ.get("ROUNDS", "2"))
MODELS, THREADS = 64, 8
SHAPES = [
    geometry(),
    geometry(layers=2, head_dim=16, block_tokens=16),
    geometry(dtype="bf16", kv_heads=1, head_dim=64),
    geometry(planes=1, kv_heads=1, head_dim=100, dtype="fp16", block_tokens=8),
]


@pytest.mark.timeout(60 + 30 * ROUNDS)
@pytest.mark.parametrize("ssd", [False, True])
def test_models_come_serve_and_go_from_many_threads(ssd: bool, tmp_path: Path) -> None:
    config = stratakv.Config(
        ram=stratakv.RamConfig(capacity_bytes="192MiB"),
        ssd=stratakv.SsdConfig(enabled=ssd, path=tmp_path, capacity_bytes="96MiB", segment_bytes="256KiB"),
        models=stratakv.ModelsConfig(interval_s=0.05),
        store=stratakv.StoreConfig(threads=2),
    )
    failures: list[BaseException] = []
    served = itertools.count()
    with stratakv.open(config) as caches:
        shared = [caches.register(f"shared-{n}", SHAPES[n % len(SHAPES)]) for n in range(4)]

        def one(cache: stratakv.ModelCache, chance: random.Random) -> None:
            tokens = tokens_of(chance.randrange(12), chance.choice((32, 64, 128)))
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
            assert_right(cache, tokens_of(chance.randrange(12), 64))
            next(served)

        def work(thread: int) -> None:
            chance = random.Random(thread)
            mine: dict[str, stratakv.ModelCache] = {}
            try:
                for step in range(60 * ROUNDS):
                    name = f"model-{thread}-{chance.randrange(MODELS // THREADS)}"
                    if name not in mine:
                        shape = SHAPES[chance.randrange(len(SHAPES))]
                        mine[name] = caches.register(name, shape, priority=chance.randint(1, 10))
                    one(mine[name], chance)
                    one(shared[chance.randrange(len(shared))], chance)
                    if chance.random() < 0.15:
                        held = mine[name].match(tokens_of(chance.randrange(12), 64))
                        cache = mine.pop(name)
                        caches.unregister(name)
                        # Its matches and its handle stay safe, and give nothing any more.
                        shape = cache.geometry
                        out = np.zeros((shape.layers, shape.planes, shape.kv_heads, 64, shape.head_dim), np.float32)
                        with held:
                            if shape.dtype == "fp32":
                                assert held.load(out, layout="LKHND") == 0
                        assert cache.match(tokens_of(1, 64)).tokens == 0
                    if step % 20 == 0:
                        caches.set_models(strategy=chance.choice(("fair", "proportional", "priority", "dynamic")))
                        snapshot = caches.snapshot()
                        for stats in (snapshot.total, *snapshot.models.values(), *snapshot.tenants.values()):
                            assert_sums(stats)
                for name in mine:
                    caches.unregister(name)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert next(served) == THREADS * 60 * ROUNDS * 2
        assert sorted(caches) == [f"shared-{n}" for n in range(4)]
        for n in range(4):
            caches.unregister(f"shared-{n}")
        stats, status = caches.stats(), caches.status()
        assert_sums(stats)
        assert stats.asked_blocks > 0
        assert all((tier.used_bytes, tier.in_bytes) == (0, tier.out_bytes) for tier in stats.tiers.values())
        assert status.ram_free_bytes == status.ram_capacity_bytes
        assert stats.tiers["ram"].in_bytes > 0
        assert status.index_blocks == 0
        assert status.ram_held == {}
        assert not list(tmp_path.glob("*.kv"))
