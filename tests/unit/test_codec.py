"""Codecs on the way to SSD: fewer bytes, values near enough, and never the wrong ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import NUMPY, config, geometry, loaded

CODECS = ["fp16", "int8_sym", "int8_asym", "k8v4", "int4"]


def shape(dtype: str = "fp16") -> stratakv.Geometry:
    return geometry(dtype=dtype, head_dim=64, block_tokens=16)


def values(dtype: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Keys and values of a small model."""
    return values_of(shape(dtype), tokens, seed)


def values_of(g: stratakv.Geometry, tokens: int, seed: int) -> np.ndarray:
    """Keys and values [L, K, H, N, D] like those of a model: keys have outlier channels."""
    out = np.random.default_rng(seed).standard_normal((g.layers, g.planes, g.kv_heads, tokens, g.head_dim), np.float32)
    out[:, 0, :, :, ::16] *= 8
    return out.astype(NUMPY[g.dtype])


def steps(kv: np.ndarray, codec: str, block: int = 16) -> np.ndarray:
    """Half a step of each value's scale, by the definition of the codec."""
    x = kv.astype(np.float64)
    if codec == "int4":
        # The first four tokens are exact, and widen no scale.
        x[:, :, :, :4] = x[:, :, :, 4:5]
    tiles = x.reshape(*x.shape[:3], -1, block, x.shape[-1])
    bound = np.empty_like(tiles)
    for plane, axis in ((0, 4), (1, 5)):
        part = tiles[:, plane]
        of, axis = np.abs(part), axis - 1
        spread = part.max(axis, keepdims=True) - part.min(axis, keepdims=True)
        four = codec == "int4" or (codec == "k8v4" and plane == 1)
        signed = codec == "int8_sym" or (codec == "k8v4" and plane == 0)
        step = of.max(axis, keepdims=True) / 127 if signed else spread / (15 if four else 255)
        bound[:, plane] = np.broadcast_to(step, part.shape) / 2
    # Scales are rounded up to bfloat16, values to their dtype.
    return bound.reshape(x.shape) * (1 + 2**-7) + np.abs(x).max() * 2**-8


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_was_encoded_is_near_and_smaller_and_found_after_a_restart(tmp_path: Path, codec: str, dtype: str) -> None:
    if codec == "fp16" and dtype != "fp32":
        pytest.skip("nothing to save")
    tokens, kv = np.arange(64), values(dtype, 64)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape(dtype))
        cache.set_cold_codec(codec)
        assert cache.put(tokens, kv, layout="LKHND") == 64
        store.flush()
        stats = cache.stats()
        assert (stats.demoted_blocks, stats.encoded_blocks, stats.not_encodable_blocks) == (4, 4, 0)
        sides = stats.tiers["ssd"].used_bytes, stats.tiers["ram"].used_bytes
        assert (
            sides[0] <= sides[1] * {"fp16": 0.6, "int8_sym": 0.7, "int8_asym": 0.75, "k8v4": 0.6, "int4": 0.55}[codec]
        )
        assert np.array_equal(loaded(cache, tokens)[0], kv), "what is in RAM is as it was put"
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape(dtype))
        assert cache.stats().tiers["ssd"].used_bytes == sides[0]
        first, explanation = loaded(cache, tokens)
        assert explanation.blocks == ("ssd",) * 4
        assert first.shape == kv.shape
        error = np.abs(first.astype(np.float64) - kv.astype(np.float64))
        if codec == "int4":
            assert not error[:, :, :, :4].any()
        bound = np.abs(kv) * 2**-10 if codec == "fp16" else steps(kv, codec)
        assert (error <= bound).all()
        # The second read brings the blocks to RAM, the third is from there.
        second, third = loaded(cache, tokens), loaded(cache, tokens)
        assert third[1].blocks == ("ram",) * 4
        assert np.array_equal(second[0], first)
        assert np.array_equal(third[0], first)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("codec", CODECS)
def test_ram_holds_more_and_what_it_holds_is_never_encoded_again(tmp_path: Path, codec: str, dtype: str) -> None:
    if codec == "fp16" and dtype != "fp32":
        pytest.skip("nothing to save")
    tokens, kv = np.arange(64), values(dtype, 64)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape(dtype))
        cache.set_ram_codec(codec)
        cache.set_cold_codec("int8_asym" if codec != "int8_asym" else "k8v4")
        assert cache.put(tokens, kv, layout="LKHND") == 64
        first, explanation = loaded(cache, tokens)
        assert explanation.blocks == ("ram",) * 4
        error = np.abs(first.astype(np.float64) - kv.astype(np.float64))
        assert (error <= (np.abs(kv) * 2**-10 if codec == "fp16" else steps(kv, codec))).all()
        store.flush()
        stats = cache.stats()
        assert (stats.demoted_blocks, stats.encoded_blocks, stats.not_encodable_blocks) == (4, 4, 0)
        ram, ssd = stats.tiers["ram"], stats.tiers["ssd"]
        # With int4 the first of a sequence is longer, and takes the slot of a plain one.
        assert ssd.used_bytes <= ram.used_bytes < 0.8 * ram.plain_bytes
        assert ram.used_bytes == ssd.used_bytes or codec == "int4"
        assert ram.ratio == ram.plain_bytes / ram.used_bytes
        assert (ram.encoded_bytes, ram.decoded_bytes, ssd.encoded_bytes) == (kv.nbytes, kv.nbytes, 0)
        assert ram.encode_s > 0
        assert ram.decode_s > 0
        with cache.match(tokens) as match:
            assert match.view(0) is None
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape(dtype))
        for places in ("ssd", "ssd", "ram"):
            again, explanation = loaded(cache, tokens)
            assert explanation.blocks == (places,) * 4
            assert np.array_equal(again, first)
        ram, ssd = cache.stats().tiers["ram"], cache.stats().tiers["ssd"]
        assert ram.used_bytes == ssd.used_bytes, "promotion keeps the form"
        assert ssd.read_bytes == 2 * ssd.used_bytes
        assert ssd.read_s > 0


def test_any_layout_is_encoded_as_it_is_read_and_decoded_as_it_is_written(caches: stratakv.CacheManager) -> None:
    g = geometry(dtype="bf16", head_dim=64, block_tokens=16, layers=4, kv_heads=4)
    cache = caches.register("m", g)
    tokens = 3 * 4096 // 16
    kv = np.random.default_rng(1).standard_normal((4, 2, 4, tokens, 64), np.float32).astype(NUMPY["bf16"])
    cache.set_ram_codec("k8v4")
    cache.put(np.arange(tokens), kv, layout="LKHND")
    expected, _ = loaded(cache, np.arange(tokens))
    # Pages of 24 tokens, so that blocks begin in the midst of them, in any order.
    count = tokens // 24
    order = np.random.default_rng(2).permutation(count)
    paged = np.zeros((4, 2, count, 24, 4, 64), kv.dtype)
    paged[:, :, order] = kv.reshape(4, 2, 4, count, 24, 64).transpose(0, 1, 3, 4, 2, 5)
    assert cache.put(np.arange(tokens) + 9, paged, layout="LKPNHD", pages=order) == tokens
    got, _ = loaded(cache, np.arange(tokens) + 9)
    assert np.array_equal(got, expected)
    out = np.zeros_like(paged)
    with cache.match(np.arange(tokens)) as match:
        assert match.load(out, layout="LKPNHD", pages=order) == tokens
    flat = out[:, :, order].transpose(0, 1, 4, 2, 3, 5).reshape(kv.shape)
    assert np.array_equal(flat, expected)


def test_a_load_that_would_write_one_row_over_another_is_refused(caches: stratakv.CacheManager) -> None:
    cache = caches.register("m", shape())
    cache.put(np.arange(32), values("fp16", 32), layout="LKHND")
    g = shape()
    with cache.match(np.arange(32)) as match:
        paged = np.zeros((g.layers, 2, 4, 16, g.kv_heads, g.head_dim), np.float16)
        with pytest.raises(stratakv.InputError, match="pages: page 3 is named twice"):
            match.load(paged, layout="LKPNHD", pages=[3, 3])
        assert match.load(paged, layout="LKPNHD", pages=[3, 1, 1]) == 32
        one = np.zeros((g.layers, 2, g.kv_heads, 1, g.head_dim), np.float16)
        wide = np.lib.stride_tricks.as_strided(one, (*one.shape[:3], 32, g.head_dim), (*one.strides[:3], 0, 2))
        with pytest.raises(stratakv.InputError, match="0 bytes apart along N"):
            match.load(wide, layout="LKHND")


def test_blocks_that_cannot_be_encoded_stand_beside_those_that_are(tmp_path: Path) -> None:
    tokens, kv = np.arange(96), values("fp16", 96)
    kv[1, 0, 1, 20, 7] = np.nan
    kv[0, 1, 0, 90, 7] = 65_504
    plain = [slice(16, 32), slice(80, 96)]
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape())
        cache.set_ram_codec("int4")
        assert cache.put(tokens, kv, layout="LKHND") == 96
        store.flush()
        got, explanation = loaded(cache, tokens)
        assert explanation.blocks == ("ram",) * 6
        stats = cache.stats()
        assert (stats.encoded_blocks, stats.not_encodable_blocks, stats.put_blocks) == (4, 2, 6)
        with cache.match(tokens) as match:
            assert [match.view(n) is None for n in range(6)] == [True, False, True, True, True, False]
    for part in plain:
        assert np.array_equal(got[:, :, :, part], kv[:, :, :, part], equal_nan=True)
    with stratakv.open(config(tmp_path)) as store:
        again, _ = loaded(store.register("m", shape()), tokens)
    assert np.array_equal(again, got, equal_nan=True)


@pytest.mark.parametrize("ssd", [False, True])
def test_a_full_tier_takes_slots_of_every_size_while_codecs_change(tmp_path: Path, ssd: bool) -> None:
    # Sixteen chunks of 2 MiB: each holds three plain blocks, or more encoded ones.
    g = geometry(dtype="fp16", head_dim=64, block_tokens=64, layers=4, kv_heads=8)
    base = np.random.default_rng(1).standard_normal((4, 2, 8, 256, 64), np.float32).astype(np.float16)
    with stratakv.open(config(tmp_path if ssd else None, ram="32MiB", segment_bytes="4MiB")) as store:
        cache = store.register("m", g)
        most = {}
        for n, codec in enumerate(["none", "int8_sym", "int4", "none", "k8v4", "int8_asym"]):
            cache.set_ram_codec(codec)
            for i in range(40):
                tokens = np.arange(256) + 1000 * (100 * n + i)
                kv = np.roll(base, 7 * n + i, (0, 3))
                if i % 10 == 3:
                    kv[3, 1, 2, 100, 5] = np.inf
                assert cache.put(tokens, kv, layout="LKHND") == 256
                got, explanation = loaded(cache, tokens)
                assert explanation.reason is None
                good = np.isfinite(kv)
                error = np.abs(got[good] - kv[good])
                assert (error <= (0 if codec == "none" else 0.6)).all()
                assert np.array_equal(got[~good], kv[~good])
            ram = cache.stats().tiers["ram"]
            assert ram.used_bytes <= 32 << 20
            most[codec] = ram.blocks
        assert most["int4"] > 1.6 * most["none"]
        assert most["int8_sym"] > 1.5 * most["none"]


def test_threads_put_and_load_what_moves_between_tiers_encoded(tmp_path: Path) -> None:
    g = geometry(dtype="bf16", head_dim=64, block_tokens=16, layers=4, kv_heads=4)
    kv = {n: values_of(g, 64, n) for n in range(48)}
    with stratakv.open(config(tmp_path, ram="4MiB", capacity_bytes="8MiB")) as store:
        cache = store.register("m", g)
        cache.set_ram_codec("int8_sym")
        cache.set_cold_codec("int4")

        def work(seed: int) -> int:
            rng, loads = np.random.default_rng(seed), 0
            for step in range(150):
                n = int(rng.integers(len(kv)))
                tokens = np.arange(64) + 1000 * n
                got, _ = loaded(cache, tokens)
                error = np.abs(got.astype(np.float32) - kv[n][:, :, :, : got.shape[3]].astype(np.float32))
                assert (error <= steps(kv[n], "int8_sym")[:, :, :, : got.shape[3]]).all()
                loads += got.shape[3]
                if got.shape[3] < 64:
                    cache.put(tokens, kv[n], layout="LKHND")
                if step % 40 == 20:
                    cache.set_ram_codec(("int8_sym", "int8_asym")[step // 40 % 2])
            return loads

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) > 0
        tiers = cache.stats().tiers
        assert min(tiers["ram"].decoded_bytes, tiers["ssd"].decoded_bytes, tiers["ram"].evicted_blocks) > 0


def test_a_codec_can_be_changed_at_any_time_and_old_records_stay_readable(tmp_path: Path) -> None:
    kept = {}
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape())
        for n, codec in enumerate(["none", *CODECS[1:], "none"]):
            cache.set_cold_codec(codec)
            tokens, kv = np.arange(32) + 1000 * n, values("fp16", 32, n)
            cache.put(tokens, kv, layout="LKHND")
            store.flush()
            kept[codec, n] = tokens, kv
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape())
        for (codec, _), (tokens, kv) in kept.items():
            got, explanation = loaded(cache, tokens)
            assert explanation.reason is None
            if codec == "none":
                assert np.array_equal(got, kv)
            else:
                assert (np.abs(got.astype(np.float64) - kv.astype(np.float64)) <= steps(kv, codec)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65_504.0])
def test_a_block_with_values_that_fit_no_scale_is_kept_as_it_is(tmp_path: Path, bad: float) -> None:
    tokens, kv = np.arange(48), values("fp16", 48)
    kv[1, 0, 1, 20, 7] = bad
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape())
        cache.set_cold_codec("int8_sym")
        cache.put(tokens, kv, layout="LKHND")
        store.flush()
        assert (cache.stats().encoded_blocks, cache.stats().not_encodable_blocks) == (2, 1)
    with stratakv.open(config(tmp_path)) as store:
        got, _ = loaded(store.register("m", shape()), tokens)
        assert got.shape == kv.shape
        assert np.array_equal(got[:, :, :, 16:32], kv[:, :, :, 16:32], equal_nan=True)
        assert np.isfinite(got[:, :, :, :16]).all()


def test_the_path_can_be_forced_and_gives_the_same_bits(tmp_path: Path) -> None:
    script = """
import sys, numpy as np, stratakv, test_codec as t
with stratakv.open(t.config(sys.argv[1])) as store:
    cache = store.register("m", t.shape("bf16"))
    cache.set_cold_codec("k8v4")
    cache.put(np.arange(64), t.values("bf16", 64), layout="LKHND")
with stratakv.open(t.config(sys.argv[1])) as store:
    sys.stdout.buffer.write(t.loaded(store.register("m", t.shape("bf16")), np.arange(64))[0].tobytes())
"""

    def run(path: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
        known = [str(Path(__file__).parent), *sys.path]
        here = {**os.environ, "STRATAKV_CODEC_ISA": path, "PYTHONPATH": os.pathsep.join(known)}
        return subprocess.run([sys.executable, "-c", script, str(folder)], env=here, capture_output=True, check=False)

    refused = run("mmx", tmp_path / "refused")
    assert b"ConfigError" in refused.stderr
    valid = re.search(rb'is "mmx", expected one of ([a-z0-9, ]+)', refused.stderr)
    assert valid, refused.stderr
    paths = valid[1].decode().split(", ")
    assert paths[0] == "scalar"
    results = {path: run(path, tmp_path / path) for path in paths}
    assert all(result.returncode == 0 for result in results.values()), results
    assert len({result.stdout for result in results.values()}) == 1
    assert len(results["scalar"].stdout) == values("bf16", 64).nbytes


def test_encoded_records_survive_a_lost_footer(tmp_path: Path) -> None:
    tokens, kv = np.arange(320), values("fp16", 320)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", shape())
        cache.set_cold_codec("k8v4")
        cache.put(tokens, kv, layout="LKHND")
        store.flush()
    (file,) = tmp_path.glob("*.kv")
    data = file.read_bytes().replace(b"SKVF", b"????")
    file.write_bytes(data)
    with stratakv.open(config(tmp_path)) as store:
        got, explanation = loaded(store.register("m", shape()), tokens)
        assert (got.shape[3], explanation.reason) == (320, None)
        assert (np.abs(got.astype(np.float64) - kv.astype(np.float64)) <= steps(kv, "k8v4")).all()


def test_a_codec_that_makes_no_sense_is_refused_with_what_to_do(caches: stratakv.CacheManager) -> None:
    cache = caches.register("m", shape())
    with pytest.raises(stratakv.InputError, match=r"'zip': expected one of none, fp16, int8_sym"):
        cache.set_cold_codec("zip")
    with pytest.raises(stratakv.InputError, match="nothing is saved; use int8_sym"):
        cache.set_cold_codec("fp16")
    with pytest.raises(stratakv.InputError, match="eight bits already"):
        caches.register("eight", shape("uint8")).set_cold_codec("int8_sym")
    with pytest.raises(stratakv.InputError, match="nothing is saved; use none, or larger blocks"):
        caches.register("small", geometry()).set_cold_codec("int8_sym")
    caches.unregister("m")
    with pytest.raises(stratakv.ModelNotFoundError, match='"m"'):
        cache.set_cold_codec("int8_sym")


def test_granularity_clip_and_raw_layers_can_be_asked_for(caches: stratakv.CacheManager) -> None:
    g = shape("fp32")
    kv = values("fp32", 16)
    kv[:, :, :, 9, 5] = 100

    def error(name: str, codec: stratakv.Codec) -> np.ndarray:
        cache = caches.register(name, g, ram_codec=codec)
        cache.put(np.arange(16), kv, layout="LKHND")
        return np.abs(loaded(cache, np.arange(16))[0] - kv)

    plain = error("default", stratakv.Codec("int8_sym"))
    # One value of 100 in each head: by tensor it coarsens every other one, by channel only those of its channel.
    tensor = error("tensor", stratakv.Codec("int8_sym", keys="tensor", values="tensor"))
    assert np.median(tensor[:, 0]) > 5 * np.median(plain[:, 0])
    assert 0.2 < tensor.max() < 0.41
    fine = error("groups", stratakv.Codec("int8_sym", keys="channel:4", values="token:16"))
    assert np.median(fine) < np.median(plain)
    raw = error("raw", stratakv.Codec("int8_sym", raw_layers=(1, 1)))
    assert not raw[[0, -1]].any()
    assert np.array_equal(raw[1:-1], plain[1:-1])
    # Of 2,048 values a plane, the two greatest are beyond 99.9 %.
    clipped = error("clip", stratakv.Codec("int8_sym", clip=99.9))
    assert (clipped[:, :, :, 9, 5] > 50).all()
    assert np.median(clipped[:, 1, :, 9]) < np.median(plain[:, 1, :, 9])
    caches.unregister("clip")


def test_a_codec_of_wrong_terms_is_refused(caches: stratakv.CacheManager) -> None:
    for terms, words in [
        ({"keys": "row"}, 'granularity "row": expected tensor, head, token or channel'),
        ({"keys": "token:x"}, 'granularity "token:x"'),
        ({"keys": "head:2"}, 'granularity "head:2"'),
        ({"keys": "channel:5"}, "groups of 5 do not divide 16 tokens of a block; give a divisor, or 0 for all"),
        ({"values": "token:48"}, "groups of 48 do not divide 64 channels of a head"),
        ({"values": 3}, "values is 3, expected text"),
        ({"clip": 0}, "clip is 0, expected a percentile above 0, up to 100"),
        ({"clip": 100.5}, "clip is 100.5"),
        ({"clip": "often"}, "clip is 'often'"),
        ({"clip": float("nan")}, "clip is nan"),
        ({"raw_layers": (1,)}, "raw_layers is (1,), expected two numbers"),
        ({"raw_layers": (0, -1)}, "raw_layers is (0, -1)"),
        ({"rows": 1}, "unknown key 'rows'; did you mean 'raw_layers'"),
        ({"raw_layers": (3, 0)}, "so nothing is saved"),
        ({"clip": "calibrated"}, 'model "m" was not calibrated; calibrate it, or clip by a percentile'),
    ]:
        with pytest.raises(stratakv.InputError, match=re.escape(words)):
            caches.register("m", shape("fp32"), ram_codec={"name": "int8_sym", **terms})
        if terms.get("clip") != "calibrated":
            assert "m" not in list(caches), "what is refused registers nothing"
    with pytest.raises(stratakv.InputError, match="expected a name, a table with a name"):
        caches["m"].set_ram_codec(8)


def test_codecs_come_from_the_configuration_too(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text(
        f"""
[ram]
capacity_bytes = "4MiB"
codec = {{ name = "int8_asym", keys = "channel:8", raw_layers = [1, 0] }}
[ssd]
path = "{tmp_path / "store"}"
capacity_bytes = "64MiB"
"""
    )
    loaded_config = stratakv.Config.load(file, {"STRATAKV_SSD_CODEC": "int4"})
    assert loaded_config.ram.codec == stratakv.Codec("int8_asym", keys="channel:8", raw_layers=(1, 0))
    assert loaded_config.ssd.codec == stratakv.Codec("int4")
    with stratakv.open(loaded_config) as store:
        one, two = store.register("one", shape()), store.register("two", shape(), ram_codec="none")
        three = store.register("three", shape("uint8"), ram_codec="none", cold_codec="none")
        for cache in (one, two):
            cache.put(np.arange(64), values("fp16", 64), layout="LKHND")
        store.flush()
        assert [cache.stats().encoded_blocks for cache in (one, two, three)] == [4, 4, 0]
        assert [cache.stats().tiers["ram"].ratio > 1 for cache in (one, two)] == [True, False]
        assert one.stats().tiers["ssd"].ratio < two.stats().tiers["ssd"].ratio
        # Registered again, it is the same with another codec.
        assert store.register("two", shape(), ram_codec="int8_sym") is two
        two.put(np.arange(64) + 9, values("fp16", 64), layout="LKHND")
        assert two.stats().tiers["ram"].ratio > 1
    with pytest.raises(stratakv.ConfigError, match=r"ram\.codec: codec 'int9'"):
        stratakv.RamConfig(codec="int9")


def test_a_calibration_is_measured_once_kept_and_used(tmp_path: Path) -> None:
    g = shape("bf16")
    sample, kv = values("bf16", 500, 1), values("bf16", 64, 2)
    kv[2, 1, 1, 20, 3] = 50
    magnitudes = np.sort(np.abs(sample.astype(np.float32)).reshape(g.layers, 2, -1), -1)
    rank = int(magnitudes.shape[-1] * 0.001) + 1
    tokens = np.arange(64)
    with stratakv.open(config(tmp_path)) as store:
        cache = store.register("m", g, weights_version="1")
        bounds = cache.calibrate(sample, percentile=99.9, layout="LKHND")
        assert np.array_equal(bounds, magnitudes[:, :, -rank])
        cache.set_ram_codec(stratakv.Codec("int8_sym", clip="calibrated"))
        cache.put(tokens, kv, layout="LKHND")
        got = loaded(cache, tokens)[0].astype(np.float32)
        limit = np.asarray(bounds)[:, :, None, None, None]
        cut = np.clip(kv.astype(np.float32), -limit, limit)
        assert (np.abs(got - cut) <= steps(cut, "int8_sym") + limit * 2**-7).all()
        assert got[2, 1, 1, 20, 3] < 10
        bad = sample.copy()
        bad[1, 1, 0, 499, 7] = np.inf
        with pytest.raises(stratakv.InputError, match="layer 1, plane 1 has the value inf"):
            cache.calibrate(bad, layout="LKHND")
        with pytest.raises(stratakv.InputError, match="percentile is 0, expected a number above 0, up to 100"):
            cache.calibrate(sample, percentile=0, layout="LKHND")
        with pytest.raises(stratakv.InputError, match="kv has 0 tokens"):
            cache.calibrate(sample[:, :, :, :0], layout="LKHND")
        # What is infinite is not clipped, but kept.
        bad = kv.copy()
        bad[0, 0, 0, 5, 5] = -np.inf
        cache.put(tokens + 1, bad, layout="LKHND")
        assert loaded(cache, tokens + 1)[0][0, 0, 0, 5, 5] == -np.inf
    with stratakv.open(config(tmp_path)) as store:
        calibrated = stratakv.Codec("int8_sym", clip="calibrated")
        again = store.register("m", g, weights_version="1", ram_codec=calibrated)
        again.put(tokens + 9, kv, layout="LKHND")
        assert np.array_equal(loaded(again, tokens + 9)[0], got)
        store.unregister("m")
        with pytest.raises(stratakv.InputError, match="was not calibrated"):
            store.register("m", g, weights_version="2", ram_codec=calibrated)
    # A damaged calibration is none: both its copies.
    (file,) = tmp_path.glob("*.kv")
    with stratakv.open(config(tmp_path)) as store:
        store.register("m", g, weights_version="2").calibrate(sample, layout="LKHND")
    for offset, found in ((8192, True), (12288, False)):
        with file.open("r+b") as raw:
            raw.seek(offset + 100)
            raw.write(b"x")
        with stratakv.open(config(tmp_path)) as store:
            cache = store.register("m", g, weights_version="2")
            if found:
                cache.set_cold_codec(calibrated)
            else:
                with pytest.raises(stratakv.InputError, match="was not calibrated"):
                    cache.set_cold_codec(calibrated)


def test_stats_say_where_decoding_costs_more_than_it_saves(caches: stratakv.CacheManager) -> None:
    stats = caches.register("m", shape()).stats()
    gib = 1 << 30

    def advice(ram: dict[str, float], ssd: dict[str, float]) -> tuple[str, ...]:
        tiers = {"ram": replace(stats.tiers["ram"], **ram), "ssd": replace(stats.tiers["ssd"], **ssd)}
        return replace(stats, tiers=tiers).advice

    # A disk of 1 GiB/s, and halves of 1 GiB: reading the other half would have taken half a second.
    disk = {"decoded_bytes": gib, "read_bytes": gib // 2, "saved_bytes": gib // 2, "read_s": 0.5}
    assert advice({}, {**disk, "decode_s": 0.4}) == ()
    (told,) = advice({}, {**disk, "decode_s": 0.6})
    assert told.startswith("decoding from ssd took 0.6 s and saved 0.5 s of reading: set_cold_codec('none')")
    assert advice({}, {**disk, "decoded_bytes": 1 << 20, "decode_s": 0.6}) == ()
    # Half of what RAM holds it holds because it is encoded; the disk would deliver that in half a second.
    ram = {"decoded_bytes": gib, "used_bytes": gib // 2, "plain_bytes": gib}
    slow = {"read_bytes": gib, "read_s": 1.0}
    assert advice({**ram, "decode_s": 0.4}, slow) == ()
    (told,) = advice({**ram, "decode_s": 0.6}, slow)
    assert told.startswith("decoding from ram took 0.6 s and saved 0.5 s of ssd: set_ram_codec('none')")
    assert advice({**ram, "decode_s": 0.6}, {}) == ()
