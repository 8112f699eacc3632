"""Dropping what is cached for an adapter or a tenant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import config, geometry, kv_of, tokens_of


def put(cache: stratakv.ModelCache, tokens: np.ndarray, **namespace: str) -> int:
    return cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND", **namespace)


NAMESPACES = ({}, {"tenant": "a"}, {"adapter": "a"}, {"adapter": "a", "tenant": "a"}, {"tenant": "b"})


@pytest.mark.parametrize("dropped", NAMESPACES)
def test_a_drop_forgets_one_namespace_for_good_and_no_other(tmp_path: Path, dropped: dict[str, str]) -> None:
    tokens = tokens_of(1, 13)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", geometry())
        for namespace in NAMESPACES:
            assert put(cache, tokens, **namespace) == 12
        store.flush()
        assert cache.drop(**dropped) == 3
        assert cache.drop(**dropped) == 0
        assert [cache.match(tokens, **n).tokens for n in NAMESPACES] == [12 * (n != dropped) for n in NAMESPACES]
        assert cache.stats().tiers["ram"].blocks == cache.stats().tiers["ssd"].blocks == 12
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", geometry())
        assert [cache.match(tokens, **n).tokens for n in NAMESPACES] == [12 * (n != dropped) for n in NAMESPACES]
        assert put(cache, tokens, **dropped) == 12
        assert cache.match(tokens, **dropped).tokens == 12
    with stratakv.open(config(tmp_path)) as store:
        assert store.register("m", geometry()).match(tokens, **dropped).tokens == 12, "what came after the drop stays"


def test_names_that_an_engine_gave_are_dropped_too(caches: stratakv.CacheManager) -> None:
    cache, tokens = caches.register("m", geometry()), tokens_of(1, 8)
    names = [b"0" * 32, b"1" * 32]
    before = cache.sequence(tokens, block_hashes=names, tenant="t")
    assert cache.put(before, kv_of(tokens, cache.geometry), layout="LKHND") == 8
    held = cache.match(before)
    assert cache.drop(tenant="t") == 2
    assert held.load(np.zeros((3, 2, 2, 8, 8), np.float32), layout="LKHND") == 0
    assert held.explain().reason == "dropped"
    late = cache.match(before)
    assert (late.tokens, late.explain().reason) == (0, "dropped")
    assert cache.put(before, kv_of(tokens, cache.geometry), layout="LKHND") == 0
    after = cache.sequence(tokens, block_hashes=names, tenant="t")
    assert (cache.match(after).tokens, cache.match(after).explain().reason) == (0, "never_stored")
    assert cache.put(after, kv_of(tokens, cache.geometry), layout="LKHND") == 8
    assert cache.match(after).tokens == 8


def test_a_drop_that_cannot_be_noted_is_an_error_and_drops_nothing(tmp_path: Path) -> None:
    tokens = tokens_of(1, 8)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", geometry())
        put(cache, tokens)
        (tmp_path / "epochs.new").mkdir()
        with pytest.raises(stratakv.StoreError, match="nothing was dropped"):
            cache.drop()
        assert cache.match(tokens).tokens == 8
        (tmp_path / "epochs.new").rmdir()
        assert cache.drop() == 2


def test_half_of_the_epochs_is_enough_and_none_is_refused(tmp_path: Path) -> None:
    tokens = tokens_of(1, 8)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", geometry())
        put(cache, tokens)
        store.flush()
        cache.drop()
    path = tmp_path / "epochs"
    sound = path.read_bytes()
    path.write_bytes(b"?" * 4096 + sound[4096:])
    with stratakv.open(config(tmp_path)) as store:
        assert store.register("m", geometry()).match(tokens).tokens == 0
    path.write_bytes(b"?" * 4096 + sound[4096:-1] + b"?")
    with pytest.raises(stratakv.StoreFormatError, match="what was dropped is not known"):
        stratakv.open(config(tmp_path))


def test_a_drop_needs_a_registered_model_and_an_open_store(caches: stratakv.CacheManager) -> None:
    cache = caches.register("m", geometry())
    caches.unregister("m")
    with pytest.raises(stratakv.ModelNotFoundError, match='"m"'):
        cache.drop()
    cache = caches.register("m", geometry())
    caches.close()
    with pytest.raises(stratakv.ClosedError, match="closed"):
        cache.drop()
