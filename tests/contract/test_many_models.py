"""What a cache of many models promises, in ten sentences."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import assert_right, config, geometry, kv_of, tokens_of

MIB = 1 << 20
# Two shapes, so that models share neither sizes nor slots.
SMALL, LARGE = geometry(block_tokens=8, head_dim=32), geometry(layers=6, block_tokens=8, head_dim=32)


def put(cache: stratakv.ModelCache, seed: int, count: int = 64, **more: object) -> int:
    tokens = tokens_of(seed, count)
    return cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND", **more)


def found(cache: stratakv.ModelCache, seed: int, count: int = 64, **more: object) -> int:
    with cache.match(tokens_of(seed, count), **more) as hit:
        return hit.tokens


def fill(cache: stratakv.ModelCache, seeds: range) -> None:
    for seed in seeds:
        put(cache, seed)


def test_1_a_registered_model_is_got_by_its_name_and_listed() -> None:
    with stratakv.open(config(None)) as caches:
        a, b = caches.register("a", SMALL), caches.register("b", LARGE)
        assert (caches["a"], caches["b"], list(caches), len(caches), "a" in caches) == (a, b, ["a", "b"], 2, True)
        with pytest.raises(stratakv.ModelNotFoundError, match="registered: a, b"):
            caches["c"]
        with pytest.raises(stratakv.ModelExistsError):
            caches.register("a", LARGE)


def test_2_models_never_see_each_others_blocks_and_versions_never_each_others(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        a, b = caches.register("a", SMALL, weights_version="1"), caches.register("b", SMALL, weights_version="1")
        fill(a, range(10))
        assert [found(b, seed) for seed in range(10)] == [0] * 10
        assert all(assert_right(a, tokens_of(seed, 64)).loaded_tokens == 64 for seed in range(10))
        caches.unregister("b")
        caches.flush()
    with stratakv.open(config(tmp_path)) as caches:
        assert found(caches.register("a", SMALL, weights_version="2"), 1) == 0


def test_3_unregistering_frees_everything_and_its_matches_stay_safe(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        a, b = caches.register("a", SMALL), caches.register("b", LARGE)
        fill(a, range(20))
        fill(b, range(5))
        caches.flush()
        hit = a.match(tokens_of(3, 64))
        before = caches.status().ssd_file_bytes
        caches.unregister("a")
        out = np.zeros((3, 2, 2, 64, 32), np.float32)
        assert (hit.load(out, layout="LKHND"), hit.explain().reason) == (0, "closed")
        hit.release()
        status = caches.status()
        assert status.ssd_file_bytes < before
        assert set(status.ram_held) == {"b"}
        assert found(caches.register("a", SMALL), 3) == 0
        assert found(b, 3) == 64
        with pytest.raises(stratakv.ModelNotFoundError):
            caches.unregister("c")


def test_4_each_strategy_divides_the_tiers_by_its_rule_and_changes_while_serving() -> None:
    # Long blocks, of which many are sampled, in records of one page; with a secret, these are the same each time.
    shape = geometry(layers=1, kv_heads=1, head_dim=1, block_tokens=256)
    with stratakv.open(config(None, ram="32MiB", secret="x")) as caches:
        for name, priority, weights in (("a", 1, 100), ("b", 3, 300)):
            caches.register(name, shape, priority=priority, weights_bytes=weights)
        caches.set_models(strategy="fair")
        assert caches.status().ram_shares == {"a": 16 * MIB, "b": 16 * MIB}
        caches.set_models(strategy="priority", floor=0.0)
        assert caches.status().ram_shares == {"a": 8 * MIB, "b": 24 * MIB}
        caches.set_models(strategy="proportional", demand="weights")
        assert caches.status().ram_shares == {"a": 8 * MIB, "b": 24 * MIB}
        # A loop of 20 MiB, that a larger share would hit.
        for _, seed in itertools.product(range(4), range(1280)):
            if found(caches["a"], seed, 1024) < 1024:
                put(caches["a"], seed, 1024)
        caches.set_models(strategy="dynamic", idle_s=0)
        for _ in range(8):
            caches.rebalance()
        shares = caches.status().ram_shares
        assert shares["a"] > shares["b"]
        with pytest.raises(stratakv.ConfigError, match="expected one of fair, proportional, priority, dynamic"):
            caches.set_models(strategy="random")


def test_5_no_model_comes_below_its_share_for_another() -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        a, b = caches.register("a", SMALL), caches.register("b", LARGE)
        caches.set_models(strategy="fair")
        fill(a, range(60))
        kept = caches.status().ram_held["a"]
        share = caches.status().ram_shares["a"]
        for seed in range(300):
            put(b, seed)
            assert caches.status().ram_held["a"] >= min(kept, share)
        assert sum(found(a, seed) for seed in range(60)) > 0


@pytest.mark.parametrize("victims", ["lru", "lfu", "smallest", "round_robin", "utility"])
def test_6_when_the_box_is_full_room_is_made_by_the_rule_that_was_chosen(victims: str) -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        caches.set_models(strategy="fair", victims=victims)
        models = [caches.register(name, SMALL) for name in "abc"]
        for seed in range(200):
            for cache in models:
                assert put(cache, seed) == 64, "a full box takes what is new"
        assert caches.stats().tiers["ram"].evicted_blocks > 0
        assert all(found(cache, 199) == 64 for cache in models)


def test_7_a_quota_is_never_passed_and_one_that_is_lowered_is_met() -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        a = caches.register("a", SMALL)
        caches.set_quota({"ram": {"hard_bytes": "1MiB"}}, model="a")
        caches.set_quota({"ram": {"hard_bytes": "256KiB"}}, tenant="t")
        for seed in range(100):
            put(a, seed, tenant="t" if seed % 2 else "")
            status = caches.status()
            assert status.model_usage["a"].ram_bytes <= MIB
            assert status.tenant_usage.get("t", stratakv.Usage()).ram_bytes <= MIB // 4


def test_8_the_numbers_of_the_models_sum_up_to_those_of_all_at_every_instant() -> None:
    with stratakv.open(config(None)) as caches:
        models = [caches.register(name, shape) for name, shape in (("a", SMALL), ("b", LARGE))]
        for seed in range(40):
            put(models[seed % 2], seed, tenant="xyz"[seed % 3])
            found(models[seed % 2], seed, tenant="xyz"[seed % 3])
            snapshot = caches.snapshot()
            for field in ("asked_blocks", "hit_blocks", "miss_blocks", "put_blocks", "loaded_bytes"):
                of = [
                    sum(getattr(each, field) for each in part.values()) for part in (snapshot.models, snapshot.tenants)
                ]
                assert of == [getattr(snapshot.total, field)] * 2
            assert snapshot.total.asked_blocks == snapshot.total.hit_blocks + snapshot.total.miss_blocks
        assert caches.model_stats("a") == snapshot.models["a"] == models[0].stats()
        assert caches.stats() == snapshot.total


def test_9_what_every_model_had_is_there_again_after_a_restart(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, ram="16MiB")) as caches:
        for name, shape in (("a", SMALL), ("b", LARGE)):
            fill(caches.register(name, shape), range(12))
    with stratakv.open(config(tmp_path)) as caches:
        for name, shape in (("a", SMALL), ("b", LARGE)):
            cache = caches.register(name, shape)
            assert all(assert_right(cache, tokens_of(seed, 64)).loaded_tokens == 64 for seed in range(12))


def test_10_a_model_that_comes_to_a_full_box_gets_its_share() -> None:
    with stratakv.open(config(None, ram="16MiB")) as caches:
        caches.set_models(strategy="fair")
        a = caches.register("a", SMALL)
        fill(a, range(200))
        assert caches.status().ram_held["a"] == 16 * MIB
        b = caches.register("b", SMALL)
        for seed in range(300):
            assert put(b, seed) == 64
        for _ in range(1000):
            if caches.status().ram_held["b"] >= 8 * MIB:
                break
            put(b, 1000 + _)
        assert caches.status().ram_held["b"] >= 8 * MIB
