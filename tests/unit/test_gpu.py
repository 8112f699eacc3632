"""The GPU tier from Python, over the stand-in for the driver: tensors in memory that only its device can read."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import assert_sums, config, geometry, kv_of, loaded, tokens_of
from stratakv import _native, gpu
from stratakv.cli import main

ROOT = Path(__file__).parents[2]
SHAPE = geometry(dtype="fp16", head_dim=8)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("standin") / "standin.so"
    flags = [
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run(["g++", *flags, str(ROOT / "cuda/tests/standin.cpp"), "-o", str(out)], check=True)
    return out


class Driver:
    """The stand-in, and memory of its device."""

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.standin_reset()
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.context = context

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def set(self, what: str, value: int) -> None:
        assert self.library.standin_set(what.encode(), ctypes.c_uint64(value)) == 0

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuCtxPushCurrent_v2", self.context)
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        return address.value

    def drain(self) -> None:
        self.call("cuCtxPushCurrent_v2", self.context)
        for stream in (1, 2):
            self.call("cuStreamSynchronize", ctypes.c_void_p(stream))
        self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def report(self) -> str:
        text = ctypes.create_string_buffer(4096)
        self.library.standin_report.restype = ctypes.c_size_t
        return text.value.decode() if self.library.standin_report(text, ctypes.c_size_t(4096)) else ""


@pytest.fixture(params=[0, 1, 2], ids=["eager", "lazy", "random"])
def driver(library: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    opened = Driver(library)
    opened.set("schedule", request.param)
    yield opened
    # What a test has opened is given back when nothing refers to it.
    gc.collect()
    assert opened.report() == ""
    opened.library.standin_reset()


class Array:
    """An array on the device, as CuPy's: it has the interface of CUDA arrays alone."""

    def __init__(self, driver: Driver, content: np.ndarray, stream: int | None = 1) -> None:
        self.driver, self.shape, self.dtype = driver, content.shape, content.dtype
        self.size = content.nbytes
        self.address = driver.allocate(self.size)
        self.stream = stream
        self.strides: tuple[int, ...] | None = None
        self.read_only = False
        self.code = 2
        self.write(content)

    def write(self, content: np.ndarray) -> None:
        whole = np.ascontiguousarray(content)
        self.driver.call(
            "standin_write",
            ctypes.c_uint64(self.address),
            whole.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(self.size),
        )

    def read(self) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.driver.call(
            "standin_read",
            ctypes.c_uint64(self.address),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(self.size),
        )
        return out

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        kind = {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, self.read_only)}
        return {**kind, "strides": self.strides, "stream": self.stream}


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int * 2),
        ("ndim", ctypes.c_int),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Legacy(ctypes.Structure):
    """What a capsule of before DLPack 1 holds."""

    _fields_ = (("tensor", DlTensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Managed(ctypes.Structure):
    """And one of DLPack 1."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", DlTensor),
    )


class Exported(Array):
    """The same, as torch's: by DLPack, of before version 1."""

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        raise AttributeError("__cuda_array_interface__")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: int, max_version: object = None) -> object:
        assert stream == 1
        self.dims = (ctypes.c_int64 * len(self.shape))(*self.shape)
        tensor = DlTensor(
            data=self.address,
            device=(ctypes.c_int * 2)(2, 0),
            ndim=len(self.shape),
            dtype=(ctypes.c_uint8 * 4)(self.code, 8 * self.dtype.itemsize, 1, 0),
            shape=ctypes.addressof(self.dims),
        )
        self.tensor = Legacy(tensor=tensor)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self.tensor), b"dltensor", None)


class Imported:
    """What a consumer makes of a capsule: it renames it, and calls the deleter when it is done."""

    def __init__(self, driver: Driver, block: object, stream: int | None, version: tuple[int, int] | None) -> None:
        name = b"dltensor_versioned" if version else b"dltensor"
        capsule = block.__dlpack__(stream=stream, max_version=version)  # type: ignore[attr-defined]
        get, rename = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_SetName
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
        self.driver, self.address = driver, get(capsule, name)
        assert rename(capsule, b"used_" + name) == 0
        self.managed = (Managed if version else Legacy).from_address(self.address)
        self.tensor = self.managed.tensor

    def read(self) -> np.ndarray:
        """Its bytes as 16-bit integers, in its shape."""
        shape = tuple((ctypes.c_int64 * self.tensor.ndim).from_address(self.tensor.shape))
        strides = tuple((ctypes.c_int64 * self.tensor.ndim).from_address(self.tensor.strides))
        assert strides == tuple(int(np.prod(shape[n + 1 :])) for n in range(len(shape)))
        out = np.empty(shape, np.uint16)
        to = out.ctypes.data_as(ctypes.c_void_p)
        self.driver.call("standin_read", ctypes.c_uint64(self.tensor.data), to, ctypes.c_size_t(out.nbytes))
        return out

    def close(self) -> None:
        self.managed.deleter(self.address)


def opened(
    driver: Driver, path: Path | None = None, *, gpu_memory: object = None, **changes: object
) -> stratakv.CacheManager:
    plain = config(path)
    tier = stratakv.GpuConfig(**{"capacity_bytes": "8MiB", "driver": driver.path} | changes)
    return stratakv.open(
        stratakv.Config(ram=plain.ram, ssd=plain.ssd, store=plain.store, gpu=tier), gpu_memory=gpu_memory
    )


@pytest.mark.parametrize("kind", [Array, Exported])
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


def test_the_status_of_a_device(driver: Driver, tmp_path: Path) -> None:
    found = gpu.status(driver=driver.path)
    assert (found.backend, found.reason, found.arch, found.image) == ("cuda", None, 90, "sm 90")
    driver.set("capability", 130)
    assert gpu.status(driver=driver.path).image == "PTX for 80"
    driver.set("capability", 75)
    old = gpu.status(driver=driver.path)
    assert (old.backend, "architecture 75" in str(old.reason)) == ("host", True)
    driver.set("capability", 90)
    assert "device is 3, expected a number from 0, below 1" in str(gpu.status(3, driver.path).reason)
    assert "cannot open shared object" in str(gpu.status(driver=tmp_path / "none.so").reason)


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


@pytest.mark.parametrize("driver", [1], indirect=True, ids=["lazy"])
def test_the_check_compares_bytes_and_times_no_stand_in(
    driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_ROUNDS", 2)
    out = tmp_path / "report.json"
    check = ["gpu", "check", "--driver", str(driver.path), "--out", str(out)]
    driver.set("seed", 3)
    assert main([*check, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == {"payloads": 288, "differs": None}
    assert (report["room"], report["real"], "copies" in report, out.exists()) == (None, False, False, False)
    driver.library.standin_fail(b"cuLaunchKernel", ctypes.c_uint64(9), 1)
    assert main(check) == 1
    said = capsys.readouterr().out
    assert "cuLaunchKernel" in said
    assert "speed: unmeasured, this is not a GPU" in said
    assert main(["gpu", "check", "--driver", str(tmp_path / "none.so")]) == 2
    assert main(["gpu", "status", "--driver", str(driver.path)]) == 0
    assert "stand-in (CPU, not a GPU)" in capsys.readouterr().out
    assert main(["gpu", "status", "--json", "--driver", str(tmp_path / "none.so")]) == 2
    assert json.loads(capsys.readouterr().out)["backend"] == "host"


@pytest.mark.parametrize("driver", [2], indirect=True, ids=["random"])
def test_everything_that_would_be_timed_is_done(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_PIECES", (4 << 10, 64 << 10))
    monkeypatch.setattr(gpu, "_LARGE", 1 << 20)
    monkeypatch.setattr(gpu, "_REPEATS", 2)
    monkeypatch.setattr(gpu, "_LATENCIES", 500)
    said: list[str] = []
    device = _native.Gpu(0, driver.path)
    with pytest.raises(stratakv.InputError, match='path is "dma", expected engine, batch or kernel'):
        device.copies(True, "dma", 4096, 1)
    speed = gpu._speed(device, said.append)
    assert len(speed["copies"]) == 2 * 2 * 3
    assert all(row["bytes_per_s"] > 0 for row in speed["copies"])
    assert set(speed["ceiling"]) == {"up", "down"}
    coded = [(row["way"], row["staged"]) for row in speed["coded"]]
    assert coded == [("down", False), ("down", True), ("up", False), ("up", True)]
    assert all(row["bytes_per_s"] > row["link_bytes_per_s"] > 0 for row in speed["coded"])
    assert set(speed["latency_ns"]) == {"place", "evict"}
    assert len(speed["engines_from"]) == 2
    assert len(said) == 19


def test_the_document_says_what_the_report_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    told = page.partition("<!-- measured -->\n")[2].partition("\n<!-- end -->")[0]
    assert told == gpu.table(ROOT / "gpu_report.json")
    copies = [
        {"way": "up", "piece_bytes": 65536, "path": path, "bytes_per_s": speed * 1e9}
        for path, speed in (("engine", 40.0), ("batch", 48.0), ("kernel", 30.0))
    ]
    coded = [{"way": "down", "staged": True, "bytes_per_s": 90e9, "link_bytes_per_s": 45e9}]
    report = {
        "device": {"device": "A", "driver": 12090},
        "ceiling": {"up": 50e9, "down": 50e9},
        "copies": copies,
        "coded": coded,
        "latency_ns": {"place": (90.4, 180.6)},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    table = gpu.table(tmp_path / "report.json")
    assert "| up | 64 KiB | batch | 48.0 | 0.96 | 0.9 |" in table
    assert "| encoded, staged | 90.0 | 0.90 |" in table
    assert "| place | 90 ns | 181 ns |" in table
    assert "unmeasured" in gpu.table(tmp_path / "none.json")


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


def hot(cache: stratakv.ModelCache, driver: Driver, tokens: np.ndarray, kv: np.ndarray) -> None:
    """Has blocks in the GPU tier."""
    cache.put(tokens, kv, layout="LKHND")
    for _ in range(3):
        with cache.match(tokens) as hit:
            hit.load(Array(driver, np.zeros_like(kv)), layout="LKHND")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_blocks_are_handed_out_where_they_are(driver: Driver, dtype: stratakv.Dtype) -> None:
    shape = geometry(dtype=dtype, head_dim=8)
    tokens = tokens_of(7, 32)
    kv = kv_of(tokens, SHAPE)
    bits = kv.view(np.uint16)
    if dtype == "bf16":
        kv = bits
    with opened(driver) as caches:
        cache = caches.register("model", shape)
        array = Exported(driver, kv)
        if dtype == "bf16":
            array.code = 4
        cache.put(tokens, array, layout="LKHND")
        with cache.match(tokens) as hit:
            assert hit.device_view(0) is None, "it is in RAM alone"
        for _ in range(3):
            with cache.match(tokens) as hit:
                assert hit.load(array, layout="LKHND") == 32
        with cache.match(tokens) as hit:
            with pytest.raises(stratakv.InputError, match="block is 8, expected an integer from 0, below 8"):
                hit.device_view(8)
            blocks = [hit.device_view(n) for n in range(8)]
        size = shape.block_tokens
        for n, block in enumerate(blocks):
            assert block is not None
            right = bits[..., n * size : (n + 1) * size, :]
            assert (block.__dlpack_device__(), block.shape) == ((2, 0), right.shape)
            for stream in (None, 1, 2, -1):
                tensor = Imported(driver, block, stream, (1, 0))
                assert (list(tensor.managed.version), tensor.managed.flags) == ([1, 0], 1), "it is read-only"
                assert list(tensor.tensor.device) == [2, 0]
                assert list(tensor.tensor.dtype) == [4 if dtype == "bf16" else 2, 16, 1, 0]
                # Whoever reads it waits for the stream; here for all.
                driver.drain()
                assert np.array_equal(tensor.read(), right)
                tensor.close()
            interface = block.__cuda_array_interface__
            assert (interface["shape"], interface["strides"], interface["stream"]) == (right.shape, None, None)
            assert (interface["typestr"], interface["version"]) == ("<u2" if dtype == "bf16" else "<f2", 3)
            address, read_only = interface["data"]
            assert read_only
            out = np.empty(right.shape, np.uint16)
            to = out.ctypes.data_as(ctypes.c_void_p)
            driver.call("standin_read", ctypes.c_uint64(address), to, ctypes.c_size_t(out.nbytes))
            assert np.array_equal(out, right), "its bytes are there without a wait"
        # A capsule that nobody takes lets go by itself; and one that is taken is its consumer's to end.
        capsule = blocks[0].__dlpack__(max_version=(1, 0))  # type: ignore[union-attr]
        held = Imported(driver, blocks[1], 1, (1, 0))
        del capsule, block, blocks
        status = caches.status()
        assert status.gpu is not None
        assert status.gpu.held_blocks == 1
        held.close()
        status = caches.status()
        assert status.gpu is not None
        assert status.gpu.held_blocks == 0
        assert_sums(caches.stats())


def test_a_consumer_of_before_dlpack_1_has_the_block_for_itself(driver: Driver) -> None:
    tokens = tokens_of(8, 16)
    kv = kv_of(tokens, SHAPE)
    with opened(driver) as caches:
        cache = caches.register("model", SHAPE)
        hot(cache, driver, tokens, kv)
        with cache.match(tokens) as hit:
            one, other = hit.device_view(0), hit.device_view(0)
            assert one is not None
            with pytest.raises(BufferError, match="others read the block"):
                one.__dlpack__(stream=1)
            del other
            tensor = Imported(driver, one, 1, None)
            driver.drain()
            assert np.array_equal(tensor.read(), kv[..., : SHAPE.block_tokens, :].view(np.uint16))
            assert hit.device_view(0) is None
            for call in (lambda: one.__dlpack__(max_version=(1, 0)), lambda: one.__cuda_array_interface__):
                with pytest.raises(BufferError, match="given away to be written; ask for it anew"):
                    call()
            left = hit.device_view(1)
            assert left is not None
            for wrong, says in (
                ({"copy": True}, "handed out where it is"),
                ({"dl_device": (1, 0)}, "handed out where it is"),
                ({"stream": 0}, "stream is 0, expected 1, 2 or the handle of one"),
                ({"stream": -2}, "stream is -2"),
            ):
                with pytest.raises(BufferError, match=says):
                    left.__dlpack__(max_version=(1, 0), **wrong)
            driver.library.standin_foreign_stream.restype = ctypes.c_uint64
            with pytest.raises(BufferError, match="another context"):
                left.__dlpack__(max_version=(1, 0), stream=driver.library.standin_foreign_stream(0))
            tensor.close()


def test_a_tensor_is_the_tiers_memory_until_the_store_is_closed(driver: Driver, tmp_path: Path) -> None:
    tokens = tokens_of(9, 32)
    kv = kv_of(tokens, SHAPE)
    memory = Array(driver, np.zeros((6, 1 << 20), np.uint8))
    alive = weakref.ref(memory)
    address = memory.address
    with opened(driver, gpu_memory=memory, capacity_bytes=0) as caches:
        del memory
        status = caches.status()
        assert status.gpu is not None
        assert ((5 << 20) < status.gpu.capacity_bytes <= (6 << 20), status.gpu.reservations) == (True, 0)
        cache = caches.register("model", SHAPE)
        hot(cache, driver, tokens, kv)
        with cache.match(tokens) as hit:
            block = hit.device_view(3)
        assert block is not None
        assert address <= block.__cuda_array_interface__["data"][0] < address + (6 << 20)
        del block, hit
    gc.collect()
    assert alive() is None, "its owner has it back"
    small, flat = Array(driver, np.zeros(4096, np.uint8)), Array(driver, np.zeros((8 << 20), np.uint8))
    strided, frozen = Array(driver, np.zeros(8 << 20, np.uint8)), Array(driver, np.zeros(8 << 20, np.uint8))
    strided.strides, frozen.read_only = (2,), True
    strided.shape = (4 << 20,)
    for wrong, says in (
        (small, "4096 bytes at .*, expected at least 4194304"),
        (np.zeros(8 << 20, np.uint8), "in the process's memory, expected a tensor on the device"),
        (strided, "not contiguous"),
        (frozen, "read-only"),
        ("memory", "gpu_memory: str is no tensor"),
    ):
        with pytest.raises(stratakv.InputError, match=says):
            opened(driver, gpu_memory=wrong)
    elsewhere = Array(driver, np.zeros(8 << 20, np.uint8))
    elsewhere.address = kv.ctypes.data
    with pytest.raises(
        stratakv.InputError, match=r"gpu_memory: not on the tier's device, stand-in .*; set gpu\.device"
    ):
        opened(driver, gpu_memory=elsewhere)
    with pytest.raises(stratakv.InputError, match="gpu_memory: no driver"):
        stratakv.open(stratakv.Config(gpu=stratakv.GpuConfig(driver=tmp_path / "none.so")), gpu_memory=flat)


class Standing:
    """A library of arrays over the stand-in, as torch and CuPy are for the check."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.current = driver, 0

    @contextmanager
    def stream(self) -> Iterator[int]:
        handle = ctypes.c_void_p()
        self.within("cuStreamCreateWithPriority", ctypes.byref(handle), 1, 0)
        self.current = handle.value or 0
        yield self.current
        self.within("cuStreamDestroy_v2", handle)

    def within(self, name: str, *arguments: object) -> None:
        self.driver.call("cuCtxPushCurrent_v2", self.driver.context)
        self.driver.call(name, *arguments)
        self.driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def late(self, array: np.ndarray) -> Array:
        source, out = Array(self.driver, array), Array(self.driver, np.full_like(array, 7), stream=self.current)
        addresses = ctypes.c_uint64(out.address), ctypes.c_uint64(source.address)
        self.within("cuMemcpyAsync", *addresses, ctypes.c_size_t(array.nbytes), ctypes.c_void_p(self.current))
        return out

    def memory(self, size: int) -> Array:
        return Array(self.driver, np.zeros(size, np.uint8))

    def imported(self, block: _native.DeviceBlock) -> Imported:
        return Imported(self.driver, block, self.current, (1, 0))

    def host(self, array: Array | Imported) -> np.ndarray:
        self.within("cuStreamSynchronize", ctypes.c_void_p(self.current))
        content = array.read()
        if isinstance(array, Imported):
            array.close()
        return content.view(np.float16)


def test_the_check_hands_blocks_to_a_library_and_takes_its_tensors(driver: Driver) -> None:
    assert gpu.hand_over(Standing(driver), 0, driver.path) is None

    class Wrong(Standing):
        def host(self, array: Array | Imported) -> np.ndarray:
            content = super().host(array)
            if isinstance(array, Imported):
                content[0, 0, 0, 0, 0] += 1
            return content

    assert gpu.hand_over(Wrong(driver), 0, driver.path) == "block 0 was handed out with other bytes than were put"
