"""Rows of measurements: how they are made, shown and written.

Limits are measured in the same run, in turns with the values: machines are noisy, so `ratio` is the median over
neighbouring pairs, and 1.0 means at the limit. Nothing fails here: a row is `ok` or not.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benches" / "out"

Row = dict[str, Any]


def row(name: str, value: float | None = None, unit: str = "", **more: object) -> Row:
    """A row. `must` and `goal` read "field sign bound"; a result that is not `right` is never ok."""
    blank, right = dict.fromkeys(("limit", "limit_value", "ratio", "must", "goal")), more.pop("right", None)
    filled: Row = {"name": name, "value": value, "unit": unit, **blank, "ok": right, "n": 1, **more}
    if filled["must"] and right is not False:
        field, sign, bound = filled["must"].split()
        filled["ok"] = {">=": operator.ge, ">": operator.gt, "<": operator.lt, "<=": operator.le}[sign](
            filled[field], float(bound)
        )
    return filled


def paired(name: str, unit: str, pairs: list[tuple[float, float]], limit: str, **more: object) -> Row:
    """A row of measurements, each with the limit that was measured beside it."""
    value, limit_value = map(median, zip(*pairs, strict=True))
    ratio = median(mine / bound for mine, bound in pairs)
    filled = {"limit": limit, "limit_value": limit_value, "ratio": ratio, "n": len(pairs)} | more
    return row(name, value, unit, **filled)


def skipped(what: str, *modules: str) -> list[Row]:
    """A row that says which of the modules cannot be imported; none if all can."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return [row(f"{what}: skipped, {module} is not installed", n=0)]
    return []


def facts() -> Row:
    """The commit, marked if the tree differs from it, and the machine."""
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    system, memory = os.uname(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), system.machine)
    machine = f"{os.cpu_count()} cores {processor}, {memory:.0f} GiB, {system.sysname} {system.release}"
    return {"commit": git.stdout.strip() or "unknown", "machine": machine}


def show(rows: list[Row]) -> None:
    """Prints the table."""
    columns = ("name", "value", "unit", "limit", "limit_value", "ratio", "must", "goal", "ok", "n")
    text = lambda cell: "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)  # noqa: E731
    shown = [each | {"ok": {True: "yes", False: "NO"}.get(each["ok"]), "n": each["n"] or None} for each in rows]
    table = [columns, *([text(each[column]) for column in columns] for each in shown)]
    width = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(size) for cell, size in zip(line, width, strict=True)).rstrip())


def run(suite: str, *sections: Callable[[], list[Row]]) -> None:
    """Runs the sections that the command line names, or all."""
    by_name, rows = {section.__name__: section for section in sections}, []
    OUT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or by_name:
        print(f"bench: {name}", file=sys.stderr, flush=True)
        try:
            rows += by_name[name]()
        except Exception as error:  # A section that breaks must not hide the others.
            traceback.print_exc()
            rows.append(row(f"{name}: failed, {type(error).__name__}", right=False, n=0))
    finish(suite, rows)


def finish(suite: str, rows: list[Row]) -> None:
    """Prints the table and writes `benches/out/SUITE.json`."""
    run = facts()
    show(rows)
    print(f"\n{run['machine']}; commit {run['commit']}")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{suite}.json").write_text(json.dumps([each | run for each in rows], indent=1) + "\n", encoding="utf-8")
