"""The GPU tier from Python, over the stand-in for the driver: tensors in memory that only its device can read."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

import stratakv
from devices import SHAPE, Array, Driver, Exported, Older, driver, hot, library, opened
from stores import assert_sums, config, kv_of, loaded, tokens_of
from stratakv.observe.report import report

__all__ = ["driver", "library"]


@pytest.mark.parametrize("kind", [Array, Exported, Older])
def test_what_is_put_from_a_device_is_loaded_to_it_and_stays_there(driver: Driver, kind: type[Array]) -> None:
    tokens = tokens_of(1, 32)
    kv = kv_of(tokens, SHAPE)
    with opened(driver) as caches:
        cache = caches.register("model", SHAPE)
        assert cache.put(tokens, kind(driver, kv), layout="LKHND") == 32
        assert np.array_equal(loaded(cache, tokens)[0], kv), "in memory of the process, too"
        for places in (("ram",), ("ram", "gpu"), ("gpu",)):
            out = kind(driver, np.zeros_like(kv))
            with cache.match(tokens) as hit:
                assert hit.load(out, layout="LKHND") == 32
                assert set(hit.explain().blocks) <= set(places)
                assert set(hit.phases) == set(hit.explain().blocks)
            assert np.array_equal(out.read(), kv)
        stats, status = caches.stats(), caches.status()
        assert_sums(stats)
        assert (stats.tiers["gpu"].blocks, stats.tiers["gpu"].evicted_blocks) == (8, 0)
        assert status.gpu is not None
        assert (status.gpu.device, status.gpu.failed) == ("stand-in (CPU, not a GPU)", None)
        assert (status.gpu.reservations, status.gpu_absent, status.degraded) == (1, None, ())


def test_pages_of_an_engine_on_the_device(driver: Driver) -> None:
    # One tensor for each layer: [plane][page][token][head][dim], pages of eight tokens in any order.
    tokens, pages = tokens_of(2, 24), [4, 0, 2]
    kv = kv_of(tokens, SHAPE)
    layers = [np.zeros((2, 6, 8, SHAPE.kv_heads, SHAPE.head_dim), np.float16) for _ in range(SHAPE.layers)]
    for layer, whole in zip(layers, kv, strict=True):
        for n, page in enumerate(pages):
            layer[:, page] = whole[:, :, 8 * n : 8 * n + 8].transpose(0, 2, 1, 3)
    with opened(driver) as caches:
        cache = caches.register("model", SHAPE)
        cached = [Array(driver, layer) for layer in layers]
        assert cache.put(tokens, cached, layout="KPNHD", pages=pages) == 24
        for _ in range(3):
            out = [Array(driver, np.zeros_like(layer)) for layer in layers]
            with cache.match(tokens) as hit:
                assert hit.load(out, layout="KPNHD", pages=pages) == 24
            for got, layer in zip(out, layers, strict=True):
                assert np.array_equal(got.read(), layer)


def test_what_comes_from_ssd_reaches_the_device(driver: Driver, tmp_path: Path) -> None:
    tokens = tokens_of(3, 32)
    kv = kv_of(tokens, SHAPE)
    with opened(driver, tmp_path) as caches:
        caches.register("model", SHAPE).put(tokens, Array(driver, kv), layout="LKHND")
    with opened(driver, tmp_path) as caches:
        cache = caches.register("model", SHAPE)
        out = Array(driver, np.zeros_like(kv))
        with cache.match(tokens) as hit:
            assert hit.load(out, layout="LKHND") == 32
            assert set(hit.explain().blocks) == {"ssd"}
        assert np.array_equal(out.read(), kv)


def test_what_makes_no_sense_says_what_to_do(driver: Driver) -> None:
    tokens = tokens_of(4, 8)
    kv = kv_of(tokens, SHAPE)
    with opened(driver) as caches:
        cache = caches.register("model", SHAPE)
        array = Array(driver, kv)
        with pytest.raises(stratakv.InputError, match="some tensors are on a device and others are not"):
            cache.put(tokens, [Array(driver, kv[0]), kv[1], kv[2]], layout="KHND")
        with pytest.raises(stratakv.InputError, match="on a device, expected in the process's memory"):
            cache.match(Array(driver, tokens))
        with pytest.raises(stratakv.InputError, match="on a device, expected in the process's memory to calibrate"):
            cache.calibrate(array, layout="LKHND")
        driver.library.standin_foreign_stream.restype = ctypes.c_uint64
        foreign = driver.library.standin_foreign_stream(0)
        with pytest.raises(stratakv.InputError, match=f"stream is {foreign}, expected one of stand-in"):
            cache.put(tokens, array, layout="LKHND", stream=foreign)
        with pytest.raises(stratakv.InputError, match="different streams; say which one to wait for"):
            cache.put(tokens, [Array(driver, kv[n], stream=1 + n // 2) for n in range(3)], layout="KHND")
        array.address = kv.ctypes.data
        with pytest.raises(stratakv.InputError, match=r"plane 0 is not on the store's device, stand-in"):
            cache.put(tokens, array, layout="LKHND")
        assert cache.stats().put_blocks == 0
    with stratakv.open(config(None)) as caches:
        cache = caches.register("model", SHAPE)
        with pytest.raises(stratakv.InputError, match=r"the store has no GPU tier: set gpu\.capacity_bytes"):
            cache.put(tokens, Array(driver, kv), layout="LKHND")


def test_without_a_gpu_the_store_serves_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = stratakv.GpuConfig(capacity_bytes="8MiB", driver=tmp_path / "libcuda.so")
    plain = config(None)
    with stratakv.open(stratakv.Config(ram=plain.ram, ssd=plain.ssd, gpu=nowhere)) as caches:
        cache = caches.register("model", SHAPE)
        tokens = tokens_of(1, 8)
        cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND")
        assert loaded(cache, tokens)[1].loaded_tokens == 8
        status = caches.status()
        assert (status.gpu, status.degraded) == (None, ("no_gpu",))
        assert "libcuda.so" in str(status.gpu_absent)
    assert [record.event for record in caplog.records if record.event == "gpu_absent"] == ["gpu_absent"]
    with pytest.raises(stratakv.ConfigError, match=r"gpu\.required is true, and there is no GPU tier: no driver"):
        stratakv.open(
            stratakv.Config(
                ram=plain.ram,
                ssd=plain.ssd,
                gpu=stratakv.GpuConfig(capacity_bytes="8MiB", driver=tmp_path / "libcuda.so", required=True),
            )
        )


def test_a_store_that_is_closed_gives_the_device_back_though_its_models_are_kept(driver: Driver) -> None:
    driver.library.standin_used.restype = ctypes.c_uint64
    tokens = tokens_of(6, 16)
    with opened(driver) as caches:
        cache = caches.register("model", SHAPE)
        array = Array(driver, kv_of(tokens, SHAPE))
        cache.put(tokens, array, layout="LKHND")
        assert driver.library.standin_used(0) > 8 << 20
    assert driver.library.standin_used(0) < 1 << 20
    assert cache.name == "model"


def test_memory_that_is_not_there_is_halved_and_a_device_that_is_lost_is_said(driver: Driver) -> None:
    driver.set("bytes", 40 << 20)
    tokens = tokens_of(5, 16)
    kv = kv_of(tokens, SHAPE)
    with opened(driver, capacity_bytes="256MiB") as caches:
        status = caches.status()
        assert status.gpu is not None
        assert (status.gpu.capacity_bytes, status.gpu.reservations) == (32 << 20, 4)
        cache = caches.register("model", SHAPE)
        out = Array(driver, kv)
        cache.put(tokens, out, layout="LKHND")
        driver.library.standin_fail(b"cuEventSynchronize", ctypes.c_uint64(1), 700)
        with cache.match(tokens) as hit:
            assert hit.load(out, layout="LKHND") == 0
            assert hit.explain().reason == "error"
        assert loaded(cache, tokens)[1].loaded_tokens == 16
        status = caches.status()
        assert status.gpu is not None
        assert "ILLEGAL_ADDRESS" in str(status.gpu.failed)
        assert status.degraded == ("no_gpu",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": -1}, "gpu.device is -1, expected an integer from 0"),
        ({"device": "0"}, "gpu.device is '0'"),
        ({"capacity_bytes": "much"}, "gpu.capacity_bytes is 'much'"),
        ({"required": 1}, "gpu.required is 1, expected true or false"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], said: str) -> None:
    with pytest.raises(stratakv.ConfigError) as caught:
        stratakv.GpuConfig(**changes)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_what_is_in_the_tier_is_told_to_whoever_asks(driver: Driver) -> None:
    tokens = tokens_of(10, 16)
    kv = kv_of(tokens, SHAPE)
    with opened(driver) as caches:
        cache = caches.register("model", SHAPE)
        caches.events(None)
        hot(cache, driver, tokens, kv)
        (stretch,) = caches.explain("model", tokens).stretches
        assert (stretch.blocks, stretch.places, stretch.decision) == (4, ("gpu", "ram"), "load")
        _, rows, following = caches.events(0)
        assert [(row[3], row[4]) for row in rows] == [("ram", True)] * 4 + [("gpu", True)] * 4
        anew, rows, _ = caches.events(None)
        assert (anew, sorted(row[3] for row in rows)) == (True, ["gpu"] * 4 + ["ram"] * 4)
        told = {tier["name"]: tier for tier in report(caches.view(), uptime_s=1.0)["tiers"]}["gpu"]
        assert (told["state"], told["blocks"], told["device"]) == ("ok", 4, "stand-in (CPU, not a GPU)")
        driver.library.standin_fail(b"cuEventSynchronize", ctypes.c_uint64(1), 700)
        with cache.match(tokens) as hit:
            hit.load(Array(driver, kv), layout="LKHND")
        _, rows, _ = caches.events(following)
        assert [(row[3], row[4]) for row in rows] == [("gpu", False)] * 4
        assert caches.explain("model", tokens).stretches[0].places == ("ram",)
        told = {tier["name"]: tier for tier in report(caches.view(), uptime_s=1.0)["tiers"]}["gpu"]
        assert (told["state"], "ILLEGAL_ADDRESS" in told["why"]) == ("fails", True)
