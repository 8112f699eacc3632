"""A load that takes longer than computing is not made, and that is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import stratakv
from stores import assert_right, config, geometry, kv_of, tokens_of


def filled(path: Path) -> None:
    with stratakv.open(config(path)) as caches:
        cache = caches.register("model", geometry())
        for seed in range(40):
            tokens = tokens_of(seed, 16)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")


def test_an_engine_faster_than_the_disk_computes_and_one_that_is_slower_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    with stratakv.open(config(tmp_path)) as caches, caplog.at_level(logging.WARNING, "stratakv"):
        cache = caches.register("model", geometry())
        cache.set_prefill_rate(1e12)
        # How fast the disk is, is not known before the first load.
        assert assert_right(cache, tokens_of(0, 16)).blocks == ("ssd",) * 4
        explanation = assert_right(cache, tokens_of(1, 16))
        assert (explanation.loaded_tokens, explanation.reason) == (0, "not_worth_it")
        assert "not_worth_it" in str(explanation)
        # What is in RAM is loaded in any case.
        tokens = tokens_of(100, 16)
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        assert assert_right(cache, tokens).blocks == ("ram",) * 4
        # It is still there, and one of sixteen is tried.
        tried = [assert_right(cache, tokens_of(seed, 16)).loaded_tokens for seed in range(2, 34)]
        assert (tried.count(16), tried.count(0)) == (2, 30)
        stats = caches.stats()
        assert stats.not_worth_it_loads == 31
        assert stats.tiers["ssd"].asked_blocks == stats.tiers["ssd"].hit_blocks + stats.tiers["ssd"].miss_blocks
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
            "model 'model' is computed where the SSD takes longer"
        ]
        for rate in (1e-3, None):
            cache.set_prefill_rate(rate)
            assert assert_right(cache, tokens_of(35, 16)).loaded_tokens == 16


def test_a_load_goes_through_the_disk_where_ram_behind_it_makes_it_worthwhile(tmp_path: Path) -> None:
    """The first two blocks are on SSD alone, sixty behind them are in RAM."""
    tokens = tokens_of(0, 248)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        cache.put(tokens[:8], kv_of(tokens[:8], cache.geometry), layout="LKHND")
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        assert assert_right(cache, tokens[:8]).blocks == ("ssd",) * 2
        ssd = caches.stats().tiers["ssd"]
        block_s = ssd.read_s / 2
        # Computing a block takes a tenth of reading one: two are not worth it, sixty-two are.
        cache.set_prefill_rate(4 / (block_s / 10))
        assert assert_right(cache, tokens[:8]).reason == "not_worth_it"
        assert assert_right(cache, tokens).loaded_tokens == 248


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_makes_no_sense_is_refused(rate: float) -> None:
    with stratakv.open(config(None)) as caches:
        cache = caches.register("model", geometry())
        with pytest.raises(stratakv.InputError, match="tokens/s, expected a number above zero"):
            cache.set_prefill_rate(rate)
