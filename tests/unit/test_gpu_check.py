"""What says which GPU there is, and whether it does what it should: over the stand-in for the driver."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import stratakv
from devices import ROOT, Array, Driver, Imported, driver, library
from stratakv import _native, gpu
from stratakv.cli import main

__all__ = ["driver", "library"]


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
    assert report["kernels"] == {"payloads": 576, "differs": None}
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


def test_a_library_that_is_of_no_use_ends_no_check(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Standing):
        def imported(self, block: _native.DeviceBlock) -> Imported:
            raise BufferError("not in this world")

    def refuses(device: int) -> Standing:
        raise RuntimeError("no CUDA here")

    # Names of modules that are there, but for the last.
    libraries = {
        "json": lambda _: Standing(driver),
        "csv": lambda _: Broken(driver),
        "cmd": refuses,
        "no_such": refuses,
    }
    monkeypatch.setattr(gpu, "_LIBRARIES", libraries)
    said: list[str] = []
    assert gpu._handed(0, driver.path, said.append) == {"json": None, "csv": "BufferError: not in this world"}
    assert [each.partition(":")[0] for each in said] == list(libraries)
    assert "of no use with this driver" in said[2]
    assert "not installed" in said[3]


def test_the_status_of_a_configuration_has_the_device(
    driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "stratakv.toml"
    settings.write_text(
        f'[ssd]\nenabled = false\n[gpu]\ncapacity_bytes = "8MiB"\ndriver = "{driver.path}"\n', encoding="utf-8"
    )
    assert main(["status", "--config", str(settings), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiers"]["gpu"]["device"] == "stand-in (CPU, not a GPU)"
    settings.write_text(
        '[ssd]\nenabled = false\n[gpu]\ncapacity_bytes = "8MiB"\ndriver = "/none.so"\n', encoding="utf-8"
    )
    assert main(["status", "--config", str(settings), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["tiers"]["gpu"]["state"], answer["degraded"]) == ("fails", ["no_gpu"])
