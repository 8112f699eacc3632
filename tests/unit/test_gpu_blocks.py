"""Blocks that the GPU tier hands out, and memory that it is given, over the stand-in for the driver."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

import stratakv
from devices import SHAPE, Array, Driver, Exported, Imported, driver, hot, library, opened
from stores import assert_sums, geometry, kv_of, tokens_of

__all__ = ["driver", "library"]


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
