"""Hints of a put: what is dear stays longer, what is over leaves first, and nothing is locked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest

import stratakv
from stores import config, geometry, kv_of, tokens_of
from stratakv.config import Eviction

# A record is 4 KiB, so that 512 blocks fill the smallest arena.
SLOTS = 512


@pytest.fixture(params=["lru"])
def cache(request: pytest.FixtureRequest) -> Iterator[stratakv.ModelCache]:
    settings = config(None)
    ram = stratakv.RamConfig(capacity_bytes="2MiB", eviction=request.param)
    with stratakv.open(dataclasses.replace(settings, ram=ram)) as caches:
        yield caches.register("m", geometry())


def put(cache: stratakv.ModelCache, seed: int, blocks: int, **hints: object) -> np.ndarray:
    tokens = tokens_of(seed, blocks * cache.geometry.block_tokens)
    assert cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND", **hints) == len(tokens)
    return tokens


def blocks_of(cache: stratakv.ModelCache, tokens: np.ndarray) -> int:
    return cache.match(tokens).tokens // cache.geometry.block_tokens


def test_what_is_dear_outlives_what_is_used_as_often(cache: stratakv.ModelCache) -> None:
    dear, plain = put(cache, 1, 50, priority=3), put(cache, 2, 50)
    # Three times all of RAM comes and goes.
    for seed in range(10, 10 + 3 * SLOTS // 64):
        put(cache, seed, 64)
    assert (blocks_of(cache, dear), blocks_of(cache, plain)) == (50, 0)
    for seed in range(100, 100 + 2 * SLOTS // 64):
        put(cache, seed, 64)
    assert blocks_of(cache, dear) == 50, "the match above was a use"
    for seed in range(200, 200 + 6 * SLOTS // 64):
        put(cache, seed, 64)
    assert blocks_of(cache, dear) < 50


def test_what_is_over_leaves_first_though_it_was_used_last(cache: stratakv.ModelCache) -> None:
    kept = [put(cache, seed, 64) for seed in range(6)]
    over = put(cache, 7, 64, ttl_s=0)
    assert blocks_of(cache, over) == 64, "found until it leaves"
    put(cache, 8, SLOTS - 7 * 64 + 40)
    assert [blocks_of(cache, tokens) for tokens in kept] == [64] * 6
    assert blocks_of(cache, over) == 24
    with cache.match(over) as hit:
        assert hit.explain().reason == "expired"
    put(cache, 9, SLOTS)
    with cache.match(kept[0]) as hit:
        assert hit.explain().reason == "evicted"
    assert {why: blocks for why, blocks in cache.stats().missed.items() if blocks} == {"expired": 80, "evicted": 64}


@pytest.mark.parametrize("cache", get_args(Eviction), indirect=True)
def test_hints_lock_nothing(cache: stratakv.ModelCache) -> None:
    for seed in range(3 * SLOTS // 64):
        put(cache, seed, 64, priority=10, ttl_s=1e9)
    assert cache.stats().put_refused_blocks == 0
    assert cache.stats().tiers["ram"].evicted_blocks == 2 * SLOTS


def test_a_later_put_with_hints_replaces_them_and_one_without_does_not(cache: stratakv.ModelCache) -> None:
    first, second = put(cache, 1, 50, ttl_s=0), put(cache, 2, 50, ttl_s=0)
    put(cache, 1, 50, priority=1)
    put(cache, 2, 50)
    put(cache, 3, SLOTS - 60)
    assert (blocks_of(cache, first), blocks_of(cache, second)) == (50, 10)


@pytest.mark.parametrize("hints", [{"priority": p} for p in (-1, 11, 1.5, True, None, "high")])
def test_a_priority_out_of_range_is_refused(cache: stratakv.ModelCache, hints: dict[str, object]) -> None:
    with pytest.raises(stratakv.InputError, match=r"priority is .*, expected an integer from 0 to 10"):
        put(cache, 1, 1, **hints)
    assert cache.stats().put_blocks == 0


@pytest.mark.parametrize("ttl_s", [-1, -0.001, math.nan, "1h"])
def test_a_time_to_live_out_of_range_is_refused(cache: stratakv.ModelCache, ttl_s: object) -> None:
    with pytest.raises(stratakv.InputError, match=r"ttl_s is .*, expected seconds from 0 up, or None"):
        put(cache, 1, 1, ttl_s=ttl_s)
    assert cache.stats().put_blocks == 0


def test_a_time_to_live_without_end_is_one(cache: stratakv.ModelCache) -> None:
    endless = put(cache, 1, 10, ttl_s=math.inf)
    put(cache, 2, 100)
    assert blocks_of(cache, endless) == 10
