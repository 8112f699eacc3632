"""Blocks that are on SSD are brought to RAM ahead of the load."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest

import stratakv
from stores import assert_right, config, geometry, kv_of, tokens_of


def filled(path: Path, **more: object) -> None:
    with stratakv.open(config(path, **more)) as caches:
        cache = caches.register("model", geometry())
        for seed in range(6):
            tokens = tokens_of(seed, 64)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")


def test_what_was_prefetched_is_loaded_from_ram(tmp_path: Path) -> None:
    filled(tmp_path)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        with cache.match(tokens_of(2, 64)) as hit:
            assert set(hit.explain().blocks) == {"ssd"}
            assert hit.prefetch().result(30) == 64
            assert set(hit.explain().blocks) == {"ram"}
            assert hit.prefetch().result(30) == 64
        stats = caches.stats()
        assert stats.promoted_blocks == 64 // cache.geometry.block_tokens
        assert stats.tiers["ssd"].asked_blocks == 0
        assert assert_right(cache, tokens_of(2, 64)).blocks == ("ram",) * stats.promoted_blocks
        assert set(assert_right(cache, tokens_of(3, 64)).blocks) == {"ssd"}


def test_a_release_does_not_stop_it_and_a_match_of_nothing_has_nothing(tmp_path: Path) -> None:
    filled(tmp_path)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        hit = cache.match(tokens_of(1, 64))
        done = hit.prefetch()
        hit.release()
        assert done.result(30) == 64
        with cache.match(tokens_of(99, 64)) as none:
            assert none.prefetch().result(30) == 0


def test_what_cannot_be_read_is_dropped_and_the_rest_is_right(tmp_path: Path) -> None:
    filled(tmp_path)
    file = next(tmp_path.glob("*.kv"))
    data = bytearray(file.read_bytes())
    for at in range(0, len(data), 4096):
        if data[at : at + 4] == b"SKVR":
            data[at + 330] ^= 1
    file.write_bytes(data)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        with cache.match(tokens_of(1, 64)) as hit:
            assert hit.prefetch().result(30) == 0
            assert hit.tokens == 64
        assert caches.stats().corrupt_blocks > 0
        assert caches.stats().promoted_blocks == 0
        assert assert_right(cache, tokens_of(1, 64)).loaded_tokens == 0


def test_it_takes_no_room_from_what_only_ram_has(tmp_path: Path) -> None:
    filled(tmp_path)
    with stratakv.open(config(tmp_path, ram="2MiB")) as caches:
        cache = caches.register("model", geometry())
        for seed in range(100, 400):
            tokens = tokens_of(seed, 64)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        before = caches.stats().demotions_dropped_blocks
        with cache.match(tokens_of(1, 64)) as hit:
            hit.prefetch().result(30)
        assert caches.stats().demotions_dropped_blocks == before
        assert assert_right(cache, tokens_of(1, 64)).loaded_tokens == 64


def test_more_than_can_wait_is_not_done(tmp_path: Path) -> None:
    filled(tmp_path)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        gate = threading.Event()
        first = caches._behind(lambda: int(gate.wait(30)))
        with cache.match(tokens_of(1, 64)) as hit:
            waiting = [hit.prefetch() for _ in range(63)]
            assert not any(each.done() for each in waiting)
            assert hit.prefetch().result(0) == 0
            gate.set()
            assert first.result(30) == 1
            assert [each.result(30) for each in waiting] == [64] * 63


def in_child(hit: stratakv.Match) -> None:
    try:
        hit.prefetch()
    except stratakv.ClosedError:
        return
    raise AssertionError


def test_a_closed_store_and_a_forked_process_say_so(tmp_path: Path) -> None:
    filled(tmp_path)
    caches = stratakv.open(config(tmp_path))
    hit = caches.register("model", geometry()).match(tokens_of(1, 64))
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(hit,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    caches.close()
    with pytest.raises(stratakv.ClosedError):
        hit.prefetch()
