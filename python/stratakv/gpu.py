"""Which GPU there is to use, or why there is none; and `stratakv gpu`: whether it does what it should, and how fast.

The check compares bytes first: a device that is wrong is not timed. What stands in for a device in tests is not timed
either.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from stratakv import _native
from stratakv.errors import ConfigError, InputError

__all__ = ["Device", "status"]

# Rounds of vectors through each kernel, each of 144 payloads.
_ROUNDS = 20
# What is left of the device's memory while it is full.
_LEFT = 200 << 20
_LARGE = 256 << 20
_REPEATS = 30
_PIECES = (4 << 10, 8 << 10, 16 << 10, 28 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
# Pieces from here on are to be copied at so much of one large copy's speed, and smaller ones at so much.
_BLOCKS_FROM, _OF_LARGE, _OF_SMALL = 64 << 10, 0.9, 0.7


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
    return {"ceiling": ceiling, "copies": rows, "engines_from": device.calibrate()}


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
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if sys.argv[1:] else "gpu_report.json")))
