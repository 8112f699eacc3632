"""What reads and writes on SSD: chosen once, said once, and the same to whoever uses it."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import stores
import stratakv
from stores import assert_right, config, geometry, kv_of, loaded, tokens_of


def without_io_uring() -> None:
    """Has the kernel refuse `io_uring_setup` to this process from now on, as containers do."""
    # Load the number of the call; is it 425? Then EPERM, else allowed.
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x0005_0001), (0x06, 0, 0, 0x7FFF_0000)]
    program = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, filter_mode, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def fallen_back(path: Path) -> None:
    without_io_uring()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stratakv").addHandler(handler)
    fill_and_read(path, "auto")
    assert len(said) == 2, said
    assert all("io_uring is refused here" in line and "permitted" in line for line in said)
    with pytest.raises(stratakv.StoreError, match=r"set ssd\.engine to auto or pread"):
        stratakv.open(config(path, engine="io_uring"))


def fill_and_read(path: Path, engine: str) -> None:
    with stratakv.open(config(path, engine=engine)) as caches:
        cache = caches.register("model", geometry())
        for seed in range(20):
            tokens = tokens_of(seed, 16)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    with stratakv.open(config(path, engine=engine)) as caches:
        cache = caches.register("model", geometry())
        assert caches.status().ssd_engine in ("pread", "io_uring")
        assert engine in ("auto", caches.status().ssd_engine)
        # The first load reads, the second promotes, the third finds all in RAM.
        for place in ("ssd", "ssd", "ram"):
            for seed in range(20):
                assert assert_right(cache, tokens_of(seed, 16)).blocks == (place,) * 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_where_io_uring_is_forbidden_threads_do_the_same_and_it_is_said_once_for_each_store(tmp_path: Path) -> None:
    # The filter stays with its process.
    folders = os.pathsep.join([str(Path(stores.__file__).parent), str(Path(__file__).parent), *sys.path])
    program = f"import pathlib, test_engine; test_engine.fallen_back(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": folders}, check=True, timeout=60)


def test_the_engine_that_is_set_is_used(tmp_path: Path) -> None:
    fill_and_read(tmp_path, "pread")
    with stratakv.open(config(tmp_path, ram="1MiB", enabled=False)) as caches:
        assert caches.status().ssd_engine == "off"


def test_an_unknown_engine_is_refused_with_those_that_exist() -> None:
    with pytest.raises(stratakv.ConfigError, match="expected one of auto, io_uring, pread"):
        stratakv.SsdConfig(engine="libaio")  # type: ignore[arg-type]


def test_with_second_touch_what_was_matched_is_found_again_and_the_rest_is_not(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, policy="write_through_second_touch")) as caches:
        cache = caches.register("model", geometry())
        for seed in range(6):
            tokens = tokens_of(seed, 16)
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        for seed in (1, 4):
            assert_right(cache, tokens_of(seed, 16))
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        found = [loaded(cache, tokens_of(seed, 16))[1].loaded_tokens for seed in range(6)]
        assert found == [0, 16, 0, 0, 16, 0]
