"""What is counted, and how the tiers run, as Python sees it; `tests/store/counts.rs` has the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import assert_right, config, geometry, kv_of, loaded, tokens_of
from stratakv.stats import Histogram

REASONS = {"never_stored", "evicted", "corrupt", "io_error", "dropped", "closed", "not_worth_it", "quota"} | {
    *("expired", "timeout", "error")
}
BOUNDS = tuple(4.0**n for n in range(11))


def put(cache: stratakv.ModelCache, seed: int, count: int = 16, **more: str) -> int:
    tokens = tokens_of(seed, count)
    return cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND", **more)


def some(blocks: dict[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in blocks.items() if count}


def test_every_miss_has_the_reason_that_its_match_gives(caches: stratakv.CacheManager) -> None:
    cache, other = caches.register("model", geometry()), caches.register("other", geometry())
    expected = {}
    for asked, prompt, tenant in [(cache, 0, ""), (cache, 0, "t"), (other, 1, "t")]:
        asked.match(tokens_of(prompt, 16), tenant=tenant).release()
        put(asked, prompt, tenant=tenant)
    expected["never_stored"] = 12
    cache.drop(tenant="t")
    caches.unregister("other")
    other = caches.register("other", geometry())
    with other.match(tokens_of(1, 16), tenant="t") as hit:
        assert hit.explain().reason == "dropped"
    expected["dropped"] = 4
    caches.set_quota({"ram": {"hard_bytes": 0}}, tenant="none")
    assert put(cache, 2, tenant="none") == 0
    with cache.match(tokens_of(2, 16), tenant="none") as hit:
        assert hit.explain().reason == "quota"
    expected["quota"] = 4
    snapshot = caches.snapshot()
    assert some(snapshot.total.missed) == expected
    assert snapshot.total.dropped_blocks == 8
    assert some(snapshot.models["model"].missed) == {"never_stored": 8, "quota": 4}
    assert some(snapshot.tenants["t"].missed) == {"never_stored": 8, "dropped": 4}
    for stats in [snapshot.total, *snapshot.models.values(), *snapshot.tenants.values()]:
        assert set(stats.missed) == set(stats.unloaded) == REASONS
        assert sum(stats.missed.values()) == stats.miss_blocks


def test_what_a_load_does_not_deliver_is_counted_by_its_reason(caches: stratakv.CacheManager) -> None:
    cache = caches.register("model", geometry())
    put(cache, 0)
    out = np.zeros((3, 2, 2, 16, 8), np.float32)
    with cache.match(tokens_of(0, 16)) as hit:
        cache.drop()
        assert (hit.load(out, layout="LKHND"), hit.explain().reason) == (0, "dropped")
    assert some(caches.stats().unloaded) == {"dropped": 4}
    put(cache, 0)
    caches.set_quota({"loads": 0}, model="model")
    assert loaded(cache, tokens_of(0, 16))[1].reason == "quota"
    assert some(cache.stats().unloaded) == {"dropped": 4, "quota": 4}
    assert some(cache.stats().missed) == {}


def test_puts_and_loads_are_counted_with_their_seconds(cache: stratakv.ModelCache) -> None:
    assert (cache.stats().puts, cache.stats().put_s, cache.stats().loads, cache.stats().load_s) == (0, 0.0, 0, 0.0)
    for _ in range(3):
        put(cache, 0)
    assert_right(cache, tokens_of(0, 16))
    stats = cache.stats()
    assert (stats.puts, stats.loads) == (3, 1)
    assert 0 < stats.put_s < 60
    assert 0 < stats.load_s < 60
    with pytest.raises(stratakv.InputError):
        cache.put(tokens_of(0, 16), np.zeros((3, 2, 2, 4, 8), np.float32), layout="LKHND")
    assert cache.stats().puts == 3


def test_stays_and_gaps_are_histograms_that_outlive_their_model(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, secret="x")) as caches:
        cache = caches.register("model", geometry())
        put(cache, 0, 1200)
        for _ in range(3):
            cache.match(tokens_of(0, 1200)).release()
            caches.stats()
        ram = caches.stats().tiers["ram"]
        assert ram.residence == Histogram(BOUNDS, (0,) * 12, 0.0)
        assert isinstance(ram.reuse_gap.sum, float)
        # Of 300 blocks, about one in sixteen; the first match ends no gap.
        gaps = sum(ram.reuse_gap.counts)
        assert 2 * 5 <= gaps <= 2 * 50
        assert gaps % 2 == 0
        caches.unregister("model")
        left = caches.stats().tiers["ram"]
        assert sum(left.residence.counts) == gaps // 2
        assert left.reuse_gap == ram.reuse_gap


def test_the_status_tells_what_is_free_what_waits_and_what_could_be_hit(tmp_path: Path) -> None:
    # Long blocks, of which all are sampled.
    shape = geometry(layers=1, kv_heads=1, head_dim=1, block_tokens=4096)
    with stratakv.open(config(tmp_path, ram="8MiB", secret="x")) as caches:
        cache = caches.register("model", shape)
        caches.register("other", geometry())
        status = caches.status()
        assert status.ram_free_bytes == status.ram_largest_free_bytes == status.ram_capacity_bytes == 8 << 20
        assert (status.demotion_queue_blocks, status.hit_ceiling) == ({"model": 0, "other": 0}, {})
        for seed in range(30):
            put(cache, seed, 4096)
        status = caches.status()
        assert status.demotion_queue_blocks == {"model": 30, "other": 0}
        assert status.ram_free_bytes == (8 << 20) - cache.stats().tiers["ram"].used_bytes
        assert 0 < status.ram_largest_free_bytes < status.ram_free_bytes
        for seed in [*range(30)] * 3:
            cache.match(tokens_of(seed, 4096)).release()
        assert caches.status().hit_ceiling == {"model": pytest.approx(1, abs=0.01)}
        caches.flush()
        assert caches.status().demotion_queue_blocks == {"model": 0, "other": 0}
