"""What tests share: small stores, and keys and values that tell where they belong."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

import stratakv

NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "uint8": np.uint8}


def geometry(**changes: object) -> stratakv.Geometry:
    return stratakv.Geometry(
        **{"layers": 3, "kv_heads": 2, "head_dim": 8, "dtype": "fp32", "block_tokens": 4} | changes
    )


def tokens_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, count)


def kv_of(tokens: np.ndarray, shape: stratakv.Geometry) -> np.ndarray:
    """Keys and values [L, K, H, N, D] that depend on every token of the prefix, as those of a model do."""
    prefix = np.cumsum(tokens.astype(np.uint64) * np.uint64(2654435761) + np.uint64(12345))
    axes = np.indices((shape.layers, shape.planes, shape.kv_heads, len(tokens), shape.head_dim), dtype=np.uint64)
    layer, plane, head, token, dim = axes
    mixed = (
        prefix[token.astype(np.int64)] * np.uint64(31) + layer * 7919 + plane * 104729 + head * 1299709 + dim * 15485863
    )
    bits = (mixed ^ (mixed >> np.uint64(17))) & np.uint64(0xFF)
    return bits.astype(NUMPY[shape.dtype])


def config(path: Path | None, **changes: object) -> stratakv.Config:
    """A small store; without a path it has no SSD tier."""
    ram = {"capacity_bytes": changes.pop("ram", "4MiB")}
    store = {"secret": changes.pop("secret", None), "threads": changes.pop("threads", 2)}
    ssd = {"enabled": path is not None, "path": path, "capacity_bytes": "64MiB", "segment_bytes": "1MiB"} | changes
    return stratakv.Config(
        ram=stratakv.RamConfig(**ram), ssd=stratakv.SsdConfig(**ssd), store=stratakv.StoreConfig(**store)
    )


def loaded(cache: stratakv.ModelCache, tokens: np.ndarray, **more: str) -> tuple[np.ndarray, stratakv.Explanation]:
    """Matches and loads; returns the valid tokens and the explanation."""
    shape = cache.geometry
    out = np.zeros((shape.layers, shape.planes, shape.kv_heads, len(tokens), shape.head_dim), NUMPY[shape.dtype])
    with cache.match(tokens, **more) as hit:
        count = hit.load(out, layout="LKHND")
        return out[:, :, :, :count], hit.explain()


def assert_sums(stats: stratakv.Stats) -> None:
    """What holds of all counters, at any instant."""
    assert stats.asked_blocks == stats.hit_blocks + stats.miss_blocks
    assert sum(stats.missed.values()) == stats.miss_blocks
    for tier in stats.tiers.values():
        assert tier.asked_blocks == tier.hit_blocks + tier.miss_blocks
        assert tier.in_bytes == tier.out_bytes + tier.used_bytes


def assert_right(cache: stratakv.ModelCache, tokens: np.ndarray, **more: str) -> stratakv.Explanation:
    """Whatever is loaded is exactly what was put."""
    got, explanation = loaded(cache, tokens, **more)
    assert np.array_equal(got, kv_of(tokens, cache.geometry)[:, :, :, : got.shape[3]]), str(explanation)
    return explanation
