"""The stand-in for the CUDA driver, from Python: memory that only its device can read, and arrays there."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stratakv
from stores import config, geometry

ROOT = Path(__file__).parents[1]
SHAPE = geometry(dtype="fp16", head_dim=8)
Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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


class Older(Exported):
    """As torch's before it knew versions."""

    def __dlpack__(self, *, stream: int) -> object:  # type: ignore[override]
        return super().__dlpack__(stream=stream)


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


def hot(cache: stratakv.ModelCache, driver: Driver, tokens: np.ndarray, kv: np.ndarray) -> None:
    """Has blocks in the GPU tier."""
    cache.put(tokens, kv, layout="LKHND")
    for _ in range(3):
        with cache.match(tokens) as hit:
            hit.load(Array(driver, np.zeros_like(kv)), layout="LKHND")
