"""Blocks under an engine's own keys, and what engines' options and versions say."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import config, geometry
from stratakv.integrations.engine import EngineVersionError, KeyedBlocks, leading, open_caches, require


def content(seed: int, shape: stratakv.Geometry) -> np.ndarray:
    size = (shape.layers, shape.planes, shape.kv_heads, shape.block_tokens, shape.head_dim)
    return np.random.default_rng(seed).random(size, np.float32)


@pytest.mark.parametrize("block_tokens", [1, 4, 32])
def test_what_is_put_under_a_key_is_found_by_that_key_alone(caches: stratakv.CacheManager, block_tokens: int) -> None:
    shape = geometry(block_tokens=block_tokens)
    blocks = KeyedBlocks(caches.register("keyed", shape), "LKHND")
    keys = [b"key-%d" % n for n in range(20)]
    for seed, key in enumerate(keys[:10]):
        assert blocks.put(key, content(seed, shape))
    assert [blocks.has(key) for key in keys] == [True] * 10 + [False] * 10
    assert blocks.leading(keys) == 10
    assert blocks.leading([keys[15], keys[0]]) == 0
    for seed, key in enumerate(keys[:10]):
        out = np.zeros_like(content(0, shape))
        assert blocks.load(key, out)
        assert np.array_equal(out, content(seed, shape))
    assert not blocks.load(b"key", np.zeros_like(content(0, shape)))


def test_leading_keys_are_counted_whatever_lies_behind_a_hole_and_used_last_to_first() -> None:
    chance = np.random.default_rng(5)
    for length in range(40):
        for there in (length, int(chance.integers(0, length + 1))):
            keys = [b"%d" % n for n in range(length)]
            cached = set(keys[:there]) | {key for key in keys if chance.random() < 0.3}
            expected = next((n for n, key in enumerate(keys) if key not in cached), length)
            used: list[bytes] = []
            assert leading(keys, lambda key, used=used, cached=cached: (used.append(key), key in cached)[1]) == expected
            # What is leading was last used from its end to its head.
            last = {key: n for n, key in enumerate(used)}
            order = [last[key] for key in keys[:expected]]
            assert order == sorted(order, reverse=True)
    # A prompt of which nothing is cached costs one question.
    used = []
    assert leading([b"a", b"b", b"c"], lambda key: bool(used.append(key))) == 0
    assert used == [b"a"]


def test_a_key_is_named_as_events_name_its_block_and_is_held_as_long_as_it_is_matched(tmp_path: Path) -> None:
    shape = geometry()
    with stratakv.open(config(None, ram="2MiB")) as caches:
        blocks = KeyedBlocks(caches.register("keyed", shape), "LKHND")
        since = caches.events(None)[2]
        assert blocks.put(b"one", content(1, shape))
        anew, rows, _ = caches.events(since)
        assert not anew
        assert [(name, tier, stored) for _, name, _, tier, stored in rows] == [(blocks.name(b"one"), "ram", True)]
        names = [blocks.name(b"none"), blocks.name(b"one"), blocks.name(b"two")]
        assert blocks.cache.held(names) == [False, True, False]
        assert blocks.lease(b"none") is None
        lease = blocks.lease(b"one")
        assert lease is not None
        with lease as one:
            for number in range(5000):
                blocks.put(b"%d" % number, content(2, shape))
            assert one.load(np.zeros_like(content(1, shape)), layout=blocks.layout) == shape.block_tokens
        for number in range(5000):
            blocks.put(b"again %d" % number, content(2, shape))
        assert not blocks.has(b"one")


def test_options_are_sections_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text('[ram]\ncapacity_bytes = "8MiB"\neviction = "lru"\n')
    options = {
        "config": str(file),
        "ram": {"capacity_bytes": "16MiB"},
        "ssd": {"path": str(tmp_path / "store"), "capacity_bytes": "64MiB", "segment_bytes": "1MiB"},
    }
    with open_caches(options, "engine", "rank0") as caches:
        assert caches.config.ram.capacity_bytes == 16 << 20
        assert caches.config.ram.eviction == "lru"
        assert caches.config.ssd.path == tmp_path / "store" / "engine" / "rank0"
    with pytest.raises(stratakv.ConfigError, match="rams"):
        open_caches({"rams": {}})
    with pytest.raises(stratakv.ConfigError, match=r"ram is 7, expected a table \[ram\]"):
        open_caches({"ram": 7})


def test_an_engine_of_another_version_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"engine-cpu": "0.32.1+cpu"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert require("engine", "0.32", "0.34", ["engine", "engine-cpu"]) == "0.32.1+cpu"
    for wrong in ("0.31.9", "0.34.0", "1.0", "0.34.0rc1"):
        found["engine-cpu"] = wrong
        with pytest.raises(EngineVersionError, match=r"pip install 'engine-cpu>=0\.32,<0\.34'"):
            require("engine", "0.32", "0.34", ["engine", "engine-cpu"])
    with pytest.raises(EngineVersionError, match=r"other is not installed: pip install 'other>=1,<2'"):
        require("other", "1", "2")
