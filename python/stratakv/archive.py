"""`stratakv ssd`: what a store directory holds, whether every byte is right, and moving it to another machine.

An export is a tar file: the directory's own files and, of each model's file, the head and every segment, named
`FILE.head` and `FILE.OFFSET`. An import puts them back to their places in a new directory, and checks them there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from stratakv import _native
from stratakv.errors import StoreError

# Superblock and calibration; segments begin behind it.
_HEAD_BYTES = 64 << 10
# What a directory has beside models' files; a `lock` is made by whoever opens it.
_CONTROL = ("store", "secret", "epochs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of `stratakv ssd`."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("directory", type=Path, metavar="DIR", help="a store's directory (ssd.path)")
        added.set_defaults(run=lambda args: _guarded(run, args))
        return added

    show = command("inspect", _inspect, "show what is in a directory: models, prefixes, bytes, ages")
    show.add_argument("--json", action="store_true", help="for programs")
    check = command("verify", _verify, "read every record and check every byte; exit status 1 if one is wrong")
    check.add_argument("--json", action="store_true", help="for programs")
    out = command(
        "export", _export, "write what is in a directory, checked, to one file; it holds the directory's secret"
    )
    out.add_argument("file", type=Path, metavar="FILE", help="a tar file to write; - for standard output")
    into = command("import", _import, "make a new directory of what another was exported to, and check it")
    into.add_argument("file", type=Path, metavar="FILE", help="what `export` wrote; - for standard input")


def _guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        return run(args)
    except (StoreError, OSError, tarfile.TarError) as problem:
        print(f"stratakv ssd: {problem}", file=sys.stderr)
        return 2


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _inspect(args: argparse.Namespace) -> int:
    archive = _native.Archive(args.directory)
    models = archive.models()
    if args.json:
        rows = [{**model, "path": str(model["path"]), "segments": len(model["segments"])} for model in models]
        damaged = [str(path) for path in archive.damaged]
        print(
            json.dumps({"uuid": archive.uuid, "in_use": archive.in_use, "models": rows, "damaged": damaged}, indent=1)
        )
        return 0
    state = "in use by a process" if archive.in_use else "not in use"
    print(f"{args.directory}: store {archive.uuid[:8]}, {state}, {len(models)} models")
    for model in models:
        layers, planes, heads, dim, dtype, tokens = model["geometry"]
        version = f" ({model['weights_version']})" if model["weights_version"] else ""
        print(f"\n{model['name']}{version}")
        print(
            f"  geometry  {layers} layers, {planes} planes, {heads} heads of {dim}, {dtype}; blocks of {tokens} tokens"
        )
        longest = model["longest_blocks"] * tokens
        print(f"  blocks    {model['blocks']:,} of {model['prefixes']:,} prefixes, the longest of {longest:,} tokens")
        print(f"  bytes     {_bytes(model['record_bytes'])} of records in {_bytes(model['file_bytes'])} of the disk")
        torn = f", {model['torn_segments']} without a footer" if model["torn_segments"] else ""
        print(f"  segments  {len(model['segments'])} of {_bytes(model['segment_bytes'])}{torn}")
        if model["written_s"] is not None:
            first, last = (datetime.fromtimestamp(at).isoformat(" ", "minutes") for at in model["written_s"])
            print(f"  written   {first} to {last}")
    for path in archive.damaged:
        print(f"\n{path}: not a model's file, or its head is damaged")
    return 0


class _Progress:
    """A bar on standard error, if that is a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._started = what, max(total, 1), 0, time.monotonic()
        self._live = sys.stderr.isatty()

    def add(self, count: int) -> None:
        self._done += count
        if self._live:
            share, elapsed = min(self._done / self._total, 1), max(time.monotonic() - self._started, 1e-9)
            bar = "#" * round(30 * share)
            rate = f"{self._done / elapsed / 1e9:.2f} GB/s"
            print(f"\r{self._what} [{bar:30}] {share:4.0%} {rate}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._live:
            print(file=sys.stderr)


def _checked(archive: _native.Archive, what: str) -> Iterator[tuple[dict[str, Any], int, tuple[int, int, list[Any]]]]:
    """Every segment of every model, with what checking it found."""
    models = archive.models()
    progress = _Progress(what, sum(len(model["segments"]) * model["segment_bytes"] for model in models))
    for n, model in enumerate(models):
        for segment, offset in enumerate(model["segments"]):
            yield model, offset, archive.verify(n, segment)
            progress.add(model["segment_bytes"])
    progress.end()


def _report(archive: _native.Archive, what: str, *, as_json: bool = False) -> int:
    """Checks all; prints what is wrong, and how much is right."""
    records = right_bytes = 0
    wrong: list[dict[str, Any]] = []
    for model, _, (count, size, bad) in _checked(archive, what):
        records, right_bytes = records + count, right_bytes + size
        wrong += ({"path": str(model["path"]), "at": at, "problem": problem} for at, problem in bad)
    damaged = [str(path) for path in archive.damaged]
    if as_json:
        print(json.dumps({"records": records, "bytes": right_bytes, "wrong": wrong, "damaged": damaged}))
        return 1 if wrong or damaged else 0
    for row in wrong:
        print("{path}: record at {at}: {problem}".format_map(row))
    for path in damaged:
        print(f"{path}: not a model's file, or its head is damaged")
    print(f"{records:,} records, {_bytes(right_bytes)}: right; {len(wrong) + len(damaged):,} wrong")
    return 1 if wrong or damaged else 0


def _verify(args: argparse.Namespace) -> int:
    return _report(_native.Archive(args.directory), "verify", as_json=args.json)


def _export(args: argparse.Namespace) -> int:
    archive, wrong = _native.Archive(args.directory), 0
    if archive.in_use:
        raise StoreError(f"{args.directory} is in use by a process; close it there first")
    to_stdout = str(args.file) == "-"
    # Who has the file can read the keys and values in it, as who has the directory can.
    descriptor = 1 if to_stdout else os.open(args.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb", closefd=not to_stdout) as raw, tarfile.open(fileobj=raw, mode="w|") as out:
        for name in _CONTROL:
            if (args.directory / name).exists():
                out.add(args.directory / name, name)
        for model in archive.models():
            _add_part(out, Path(model["path"]), 0, _HEAD_BYTES, "head")
        for model, offset, (_, _, bad) in _checked(archive, "export"):
            wrong += len(bad)
            _add_part(out, Path(model["path"]), offset, model["segment_bytes"], str(offset))
    said = sys.stderr if to_stdout else sys.stdout
    if wrong:
        print(f"{wrong} records are wrong, and will not be found there either", file=said)
    if not (args.directory / "secret").exists():
        print("it was written under a store.secret: set the same where it is imported", file=said)
    return 1 if wrong else 0


def _add_part(out: tarfile.TarFile, path: Path, offset: int, size: int, name: str) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        info = tarfile.TarInfo(f"{path.name}.{name}")
        info.size = min(size, max(os.fstat(file.fileno()).st_size - offset, 0))
        info.mode = 0o600
        out.addfile(info, file)


def _import(args: argparse.Namespace) -> int:
    if args.directory.exists() and any(args.directory.iterdir()):
        raise StoreError(f"{args.directory} is not empty; give a new directory")
    args.directory.mkdir(parents=True, exist_ok=True)
    from_stdin = str(args.file) == "-"
    with (
        os.fdopen(0, "rb", closefd=False) if from_stdin else args.file.open("rb") as raw,
        tarfile.open(fileobj=raw, mode="r|") as packed,
    ):
        for member in packed:
            _put_back(args.directory, packed, member)
    if not (args.directory / "store").exists():
        raise StoreError(f"{args.file} is no export of a store: there is no `store` in it")
    return _report(_native.Archive(args.directory), "import")


def _put_back(directory: Path, packed: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    name, _, place = member.name.rpartition(".")
    if member.name in _CONTROL:
        name, place = member.name, "0"
    offset = 0 if place == "head" else int(place) if place.isdecimal() else -1
    model = name.endswith(".kv") and len(name) == 35 and set(name[:32]) <= set("0123456789abcdef")
    source = packed.extractfile(member)
    if source is None or offset < 0 or not (model or name in _CONTROL):
        raise StoreError(f"{member.name!r} is no part of an export of a store")
    descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.seek(offset)
        while piece := source.read(4 << 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
