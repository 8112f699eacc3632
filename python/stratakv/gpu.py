"""Which GPU there is to use, or why there is none; and `stratakv gpu`: whether it does what it should, and how fast.

The check compares bytes first: a device that is wrong is not timed. What stands in for a device in tests is not timed
either. Blocks are handed to CuPy and to torch, and taken from them, where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import numpy as np

from stratakv import _native
from stratakv.config import Config, Geometry, RamConfig, SsdConfig
from stratakv.errors import ConfigError, InputError
from stratakv.manager import CacheManager
from stratakv.sections import GpuConfig

__all__ = ["Device", "status"]

# Rounds of vectors through each kernel, each of 288 payloads.
_ROUNDS = 20
# What is left of the device's memory while it is full.
_LEFT = 200 << 20
_LARGE = 256 << 20
_REPEATS = 30
_PIECES = (4 << 10, 8 << 10, 16 << 10, 28 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
# Pieces from here on are to be copied at so much of one large copy's speed, and smaller ones at so much.
_BLOCKS_FROM, _OF_LARGE, _OF_SMALL = 64 << 10, 0.9, 0.7
# Places and evictions that are timed.
_LATENCIES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a GPU tier would be on.

    Attributes:
        backend: ``cuda``, or ``host`` where there is no GPU to use: blocks are in RAM then.
        reason: why there is none.
        device: name of the device.
        pci: its place on the bus.
        arch: its compute capability, as 90.
        image: which of the kernels' images it runs.
        driver: version of the driver, as 12090.
        total_bytes: its memory.
        free_bytes: what of that nobody has.
    """

    backend: str
    reason: str | None
    device: str | None = None
    pci: str | None = None
    arch: int | None = None
    image: str | None = None
    driver: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None


def status(device: int = 0, driver: str | os.PathLike[str] | None = None) -> Device:
    """Opens a device of the driver, looks, and closes it.

    Args:
        device: its number, as the driver counts.
        driver: library of the driver; ``None``: the system's.
    """
    return Device(**_native.gpu_status(device, driver))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of `stratakv gpu`."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, says in (
        ("status", _status, "say which device there is, or why none"),
        (
            "check",
            _check,
            "compare its kernels with the codec, fill its memory, and time its copies; at most 8 minutes",
        ),
    ):
        added = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
        added.add_argument("--device", type=int, default=0, metavar="N", help="its number (default: %(default)s)")
        added.add_argument("--driver", type=Path, metavar="FILE", help="library of the driver (default: the system's)")
        added.add_argument("--json", action="store_true", help="for programs")
        added.set_defaults(run=run)
        if name == "check":
            added.add_argument(
                "--out", type=Path, default=Path("gpu_report.json"), metavar="FILE", help="(default: %(default)s)"
            )


def _status(args: argparse.Namespace) -> int:
    found = status(args.device, args.driver)
    known = {name: value for name, value in asdict(found).items() if value is not None}
    print(json.dumps(known) if args.json else "\n".join(f"{name:<12} {value}" for name, value in known.items()))
    return 0 if found.reason is None else 2


def _check(args: argparse.Namespace) -> int:
    try:
        device = _native.Gpu(args.device, args.driver)
    except ConfigError as error:
        print(f"stratakv gpu: {error}", file=sys.stderr)
        return 2
    tell: Callable[[str], None] = (lambda _: None) if args.json else print
    report: dict[str, Any] = {"device": asdict(status(args.device, args.driver)), "real": device.is_real}
    compared, differs = device.kernels(_ROUNDS)
    report["kernels"] = {"payloads": compared, "differs": differs}
    tell(f"kernels: {differs or f'{compared} payloads equal the codec, byte for byte'}")
    report["room"] = device.room(_LEFT if device.is_real else 4 << 20)
    tell(f"memory: {report['room'] or 'runs out, and comes back, as it should'}")
    right = differs is None and report["room"] is None
    report["hand_over"] = _handed(args.device, args.driver, tell) if device.is_real else {}
    right = right and not any(report["hand_over"].values())
    if not device.is_real:
        tell("speed: unmeasured, this is not a GPU")
    elif right:
        report |= _speed(device, tell)
    if right and device.is_real:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        tell(f"written to {args.out}")
    if args.json:
        print(json.dumps(report))
    return 0 if right else 1


def _handed(device: int, driver: str | os.PathLike[str] | None, tell: Callable[[str], None]) -> dict[str, str | None]:
    """What was not as it should be with each library that is here and of use."""
    found: dict[str, str | None] = {}
    for name, make in _LIBRARIES.items():
        if importlib.util.find_spec(name) is None:
            tell(f"{name}: not installed, no blocks were handed to it")
            continue
        try:
            library = make(device)
        except Exception as error:  # whatever it finds amiss
            tell(f"{name}: of no use with this driver, no blocks were handed to it: {error}")
            continue
        try:
            found[name] = hand_over(library, device, driver)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        tell(f"{name}: {found[name] or 'tensors and blocks went there and back, in streams of its own'}")
    return found


def _speed(device: _native.Gpu, tell: Callable[[str], None]) -> dict[str, Any]:
    """Copies of pieces of each size by each path, beside one large one: the median, of those there was time for."""
    end, rows = time.monotonic() + 300, []
    ceiling = {}
    for up in (True, False):
        way = "up" if up else "down"
        ceiling[way] = median(device.copies(up, "engine", _LARGE, _REPEATS))
        tell(f"one large pinned copy {way}: {ceiling[way] / 1e9:.1f} GB/s")
        for size in _PIECES:
            for path in ("engine", "batch", "kernel"):
                if time.monotonic() > end:
                    break
                try:
                    speed = median(device.copies(up, path, size, _REPEATS))
                except InputError as error:
                    tell(f"{way}, {size >> 10} KiB, {path}: {error}")
                    continue
                rows.append({"way": way, "piece_bytes": size, "path": path, "bytes_per_s": speed})
                tell(f"{way}, {size >> 10} KiB, {path}: {speed / 1e9:.1f} GB/s, {speed / ceiling[way]:.2f} of that")
    coded = []
    for encode in (True, False):
        way = "down" if encode else "up"
        for staged in (False, True):
            speeds, share = device.coding(encode, staged, _REPEATS)
            speed = median(speeds)
            coded.append({"way": way, "staged": staged, "bytes_per_s": speed, "link_bytes_per_s": speed * share})
            what = ("encoded" if encode else "decoded") + (", staged" if staged else ", in place")
            tell(f"{what}: {speed / 1e9:.1f} GB/s of plain tensors, {speed * share / ceiling[way]:.2f} of the link")
    places, evictions = device.latencies(_LATENCIES)
    taken = {name: _percentiles(each) for name, each in (("place", places), ("evict", evictions))}
    tell(", ".join(f"{name} p50 {p50:.0f} ns, p99 {p99:.0f} ns" for name, (p50, p99) in taken.items()))
    return {
        "ceiling": ceiling,
        "copies": rows,
        "coded": coded,
        "latency_ns": taken,
        "engines_from": device.calibrate(),
    }


def _percentiles(values: list[int]) -> tuple[float, float]:
    each = quantiles(values, n=100)
    return each[49], each[98]


class Library(Protocol):
    """A library of arrays, as the check uses it: in the stream that is current."""

    def stream(self) -> AbstractContextManager[int]:
        """A stream of its own that is current within; its handle."""

    def late(self, array: np.ndarray) -> Any:  # noqa: ANN401 - an array of the library
        """The array on the device: written there only when the stream has worked for a while."""

    def memory(self, size: int) -> Any:  # noqa: ANN401
        """So many bytes of the device."""

    def imported(self, block: _native.DeviceBlock) -> Any:  # noqa: ANN401
        """A block, by DLPack."""

    def host(self, array: Any) -> np.ndarray:  # noqa: ANN401
        """What is in it when the stream has done what it was given."""


class _Torch:
    def __init__(self, device: int) -> None:
        import torch

        self.torch, self.device = torch, torch.device("cuda", device)
        torch.cuda.init()

    @contextmanager
    def stream(self) -> Iterator[int]:
        stream = self.torch.cuda.Stream(self.device)
        with self.torch.cuda.stream(stream):
            yield stream.cuda_stream

    def late(self, array: np.ndarray) -> Any:  # noqa: ANN401
        source = self.torch.from_numpy(array).to(self.device)
        out = self.torch.empty_like(source)
        self.torch.cuda._sleep(50_000_000)
        return out.copy_(source)

    def memory(self, size: int) -> Any:  # noqa: ANN401
        return self.torch.empty(size, dtype=self.torch.uint8, device=self.device)

    def imported(self, block: _native.DeviceBlock) -> Any:  # noqa: ANN401
        return self.torch.from_dlpack(block)

    def host(self, array: Any) -> np.ndarray:  # noqa: ANN401
        out: np.ndarray = array.cpu().numpy()
        return out


class _CuPy:
    def __init__(self, device: int) -> None:
        import cupy

        self.cupy = cupy
        cupy.cuda.Device(device).use()
        self.wait = cupy.RawKernel(
            'extern "C" __global__ void wait() { long long begun = clock64(); while (clock64() - begun < 50000000); }',
            "wait",
        )

    @contextmanager
    def stream(self) -> Iterator[int]:
        with self.cupy.cuda.Stream(non_blocking=True) as stream:
            yield stream.ptr

    def late(self, array: np.ndarray) -> Any:  # noqa: ANN401
        source = self.cupy.asarray(array)
        out = self.cupy.empty_like(source)
        self.wait((1,), (1,), ())
        out[...] = source
        return out

    def memory(self, size: int) -> Any:  # noqa: ANN401
        return self.cupy.empty(size, dtype=self.cupy.uint8)

    def imported(self, block: _native.DeviceBlock) -> Any:  # noqa: ANN401
        return self.cupy.from_dlpack(block)

    def host(self, array: Any) -> np.ndarray:  # noqa: ANN401
        out: np.ndarray = self.cupy.asnumpy(array)
        return out


_LIBRARIES: dict[str, Callable[[int], Library]] = {"cupy": _CuPy, "torch": _Torch}


def hand_over(library: Library, device: int, driver: str | os.PathLike[str] | None) -> str | None:
    """Puts and loads arrays of a library, and hands it blocks, in a stream of its own; what was not as it should be.

    Args:
        library: whose arrays.
        device: number of the device.
        driver: library of the driver; ``None``: the system's.
    """
    geometry = Geometry(layers=4, planes=2, kv_heads=4, head_dim=64, dtype="fp16", block_tokens=16)
    tokens, size = list(range(1, 129)), geometry.block_tokens
    shape = (geometry.layers, geometry.planes, geometry.kv_heads, len(tokens), geometry.head_dim)
    right = np.random.default_rng(1).standard_normal(shape).astype(np.float16)
    config = Config(
        ram=RamConfig(capacity_bytes="64MiB"),
        ssd=SsdConfig(enabled=False),
        gpu=GpuConfig(device=device, driver=driver, required=True),
    )
    with CacheManager(config, gpu_memory=library.memory(16 << 20)) as caches, library.stream() as stream:
        cache = caches.register("model", geometry)
        if cache.put(tokens, library.late(right), layout="LKHND", stream=stream) != len(tokens):
            return "not all was put"
        for _ in range(3):
            out = library.late(np.zeros_like(right))
            with cache.match(tokens) as hit:
                loaded = hit.load(out, layout="LKHND", stream=stream)
            if loaded != len(tokens) or not np.array_equal(library.host(out), right):
                return f"{loaded} tokens of {len(tokens)} were loaded, or other bytes than were put"
        with cache.match(tokens) as hit:
            blocks = [hit.device_view(n) for n in range(len(tokens) // size)]
        for n, block in enumerate(blocks):
            if block is None:
                return f"block {n} did not come to the device"
            if not np.array_equal(library.host(library.imported(block)), right[..., n * size : (n + 1) * size, :]):
                return f"block {n} was handed out with other bytes than were put"
        del block, blocks
        held = caches.status().gpu
        if held is None or held.failed is not None or held.held_blocks:
            return f"what was handed out is held still, or the device failed: {held}"
    return None


def table(report: Path) -> str:
    """What a report says, as docs/gpu.md has it; where there is none, that nothing was measured."""
    if not report.exists():
        return "No report of a device is here: everything is **unmeasured**."
    told = json.loads(report.read_text(encoding="utf-8"))
    lines = [
        f"{told['device']['device']}, driver {told['device']['driver']}. Of one large copy, by the fastest path:",
        "",
        "| way | piece | path | GB/s | of the large copy | must |",
        "|---|---|---|---|---|---|",
    ]
    for way in ("up", "down"):
        for size in _PIECES:
            found = [row for row in told["copies"] if (row["way"], row["piece_bytes"]) == (way, size)]
            if not found:
                continue
            best = max(found, key=lambda row: float(row["bytes_per_s"]))
            speed, must = best["bytes_per_s"], _OF_LARGE if size >= _BLOCKS_FROM else _OF_SMALL
            share = speed / told["ceiling"][way]
            lines.append(f"| {way} | {size >> 10} KiB | {best['path']} | {speed / 1e9:.1f} | {share:.2f} | {must} |")
    lines += ["", "| what | GB/s of plain tensors | of the link |", "|---|---|---|"]
    for row in told["coded"]:
        what = ("encoded" if row["way"] == "down" else "decoded") + (", staged" if row["staged"] else ", in place")
        share = row["link_bytes_per_s"] / told["ceiling"][row["way"]]
        lines.append(f"| {what} | {row['bytes_per_s'] / 1e9:.1f} | {share:.2f} |")
    lines += ["", "| call | p50 | p99 |", "|---|---|---|"]
    lines += [f"| {name} | {p50:.0f} ns | {p99:.0f} ns |" for name, (p50, p99) in told["latency_ns"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if sys.argv[1:] else "gpu_report.json")))
