"""Codecs on keys and values of a real model, and on such as no model has.

The fixture holds, of SmolLM2-135M-Instruct (Apache-2.0), the first, the middle and the last layer: keys and values of
128 tokens, and the queries of the 32 tokens after them; `make accuracy ARGS=extract` writes it. What the codecs cost
the whole model is measured by `make accuracy`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import NUMPY, config, loaded

FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm2.npz"
# Relative errors of keys, values and attention's output in the worst layer, and the least cosine of a token's keys or
# values; each about a quarter beyond what was measured when the codec was written.
BOUNDS = {
    "none": (0, 0, 0, 1),
    "int8_asym": (0.0042, 0.011, 0.013, 0.9999),
    "int8_sym": (0.0062, 0.015, 0.02, 0.9998),
    "k8v4": (0.0062, 0.18, 0.12, 0.976),
    "int4": (0.067, 0.18, 0.095, 0.976),
}


def attended(queries: np.ndarray, kv: np.ndarray) -> np.ndarray:
    """Attention's output, by the definition: softmax(q k^T / sqrt(d)) v, three query heads for each head of keys."""
    grouped = queries.reshape(*kv.shape[:1], kv.shape[2], -1, kv.shape[-1])
    logits = grouped @ kv[:, 0].swapaxes(-1, -2) / np.sqrt(kv.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ kv[:, 1]


def error(right: np.ndarray, got: np.ndarray) -> float:
    """Relative in the L2 norm, of the worst layer."""
    flat, off = right.reshape(len(right), -1), (got - right).reshape(len(right), -1)
    return float((np.linalg.norm(off, axis=1) / np.linalg.norm(flat, axis=1)).max())


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("codec", BOUNDS)
def test_a_real_model_hardly_notices(tmp_path: Path, codec: str, dtype: str) -> None:
    assert FIXTURE.stat().st_size < 1_000_000
    with np.load(FIXTURE) as fixture:
        kv, queries = fixture["kv"].astype(NUMPY[dtype]), fixture["queries"].astype(np.float32)
    layers, planes, heads, tokens, dim = kv.shape
    g = stratakv.Geometry(layers=layers, kv_heads=heads, head_dim=dim, dtype=dtype, block_tokens=64, planes=planes)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("smollm2", g, ram_codec=codec)
        cache.put(np.arange(tokens), kv, layout="LKHND")
        got = loaded(cache, np.arange(tokens))[0].astype(np.float32)
        assert cache.stats().not_encodable_blocks == 0
    exact = kv.astype(np.float32)
    cosine = (exact * got).sum(-1) / (np.linalg.norm(exact, axis=-1) * np.linalg.norm(got, axis=-1))
    found = error(exact[:, 0], got[:, 0]), error(exact[:, 1], got[:, 1])
    found += error(attended(queries, exact), attended(queries, got)), float(cosine.min())
    *most, least = BOUNDS[codec]
    assert all(value <= bound for value, bound in zip(found, most, strict=False)), found
    assert found[-1] >= least - 1e-6, found


def outliers(rng: np.random.Generator, x: np.ndarray) -> None:
    """A few channels a thousand times the others, as some models have them."""
    x[..., rng.integers(0, x.shape[-1], 3)] *= 1000


def subnormal(rng: np.random.Generator, x: np.ndarray) -> None:
    """Values that have no leading one, beside zeros."""
    x *= np.float32(2**-24) if rng.integers(2) else np.float32(1e-41)


def wide(rng: np.random.Generator, x: np.ndarray) -> None:
    """Each channel of another size, from 1e-30 to 1e+30."""
    x *= (10.0 ** rng.uniform(-30, 30, x.shape[-1])).astype(np.float32)


def mixed(rng: np.random.Generator, x: np.ndarray) -> None:
    """Each value of another size: no scale fits two of them."""
    x *= (10.0 ** rng.uniform(-30, 30, x.shape)).astype(np.float32)


def constant(_: np.random.Generator, x: np.ndarray) -> None:
    """Groups without any span."""
    x[...] = x[..., :1, :1]


@pytest.mark.parametrize("codec", [each for each in BOUNDS if each != "none"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", [outliers, subnormal, wide, mixed, constant], ids=lambda kind: kind.__name__)
def test_hostile_values_are_within_half_a_step_or_kept(tmp_path: Path, kind: object, dtype: str, codec: str) -> None:
    rng = np.random.default_rng(5)
    g = stratakv.Geometry(layers=2, kv_heads=2, head_dim=64, dtype=dtype, block_tokens=32)
    x = rng.standard_normal((2, 2, 2, 32, 64), np.float32)
    kind(rng, x)
    with np.errstate(over="ignore", under="ignore"):
        kv = x.astype(NUMPY[dtype])
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", g, ram_codec=stratakv.Codec(codec))
        cache.put(np.arange(32), kv, layout="LKHND")
        got, explanation = loaded(cache, np.arange(32))
        encoded = cache.stats().encoded_blocks
    assert explanation.reason is None
    if not encoded:
        assert np.array_equal(got.view(np.uint8), kv.view(np.uint8)), "kept as it is, to the bit"
        assert kind is not outliers
        return
    exact, back = kv.astype(np.float64), got.astype(np.float64)
    if codec == "int4":
        assert np.array_equal(got[:, :, :, :4], kv[:, :, :, :4])
        exact[:, :, :, :4] = back[:, :, :, :4] = exact[:, :, :, 4:5]
    for plane, axis in ((0, -2), (1, -1)):
        part, error = exact[:, plane], np.abs(back - exact)[:, plane]
        four = codec == "int4" or (codec == "k8v4" and plane == 1)
        signed = codec == "int8_sym" or (codec == "k8v4" and plane == 0)
        span = np.ptp(part, axis, keepdims=True)
        step = np.abs(part).max(axis, keepdims=True) / 127 if signed else span / (15 if four else 255)
        # Scales are rounded up to bfloat16, results to the dtype.
        digits = {"fp32": 23, "fp16": 10, "bf16": 7}[dtype]
        least = {"fp32": 2.0**-149, "fp16": 2.0**-24, "bf16": 2.0**-133}[dtype]
        rounding = np.abs(part).max(axis, keepdims=True) * 2.0**-digits + 2 * least
        assert (error <= step / 2 * (1 + 2**-7) + rounding).all()
