"""Hit ratios of the eviction policies on request traces, against each other and against Belady's optimum.

The policies are the real ones, driven by benches/policy.rs. `make bench SUITE=policy ARGS=DIR`: DIR holds any of
`*.jsonl[.xz]` with lines of Mooncake's form (timestamp, hash_ids: one id for each 512-token block, naming its whole
prefix) or of agent sessions (sid, reqs of (t, ..., runs of 64-token blocks, depth)). Sessions have no common clock:
they are started at random, RATE of them a minute (1), gaps are as captured up to 30 minutes, blocks are taken in
groups of eight, and the head of tools and system prompt is shared by sessions of one model where it is equally long.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rows import ROOT, Row, finish, row

CAPACITIES = (1_000, 3_000, 10_000, 30_000, 100_000)
GROUP = 8
LONGEST_GAP_S = 1800.0

Requests = list[tuple[float, list[Hashable]]]


def sessions(lines: list[dict[str, Any]], rate: float) -> Iterator[tuple[float, list[Hashable]]]:
    """Requests of agent sessions on one clock."""
    random = np.random.default_rng(7)
    random.shuffle(lines)
    start = 0.0
    for number, session in enumerate(lines):
        start += random.exponential(60 / rate)
        clock, last = start, 0.0
        head = (session["tool"], session["sys"], session["models"][0])
        shared = ((session["tool"] or 0) + (session["sys"] or 0)) // session["bs"]
        for at, *_, runs, depth in sorted(session["reqs"], key=lambda request: request[0]):
            clock += min(max(at - last, 0), LONGEST_GAP_S)
            last = at
            ids = [block for first, count in runs for block in range(first, first + count)]
            prefix: Hashable = 0
            path: list[Hashable] = []
            for end in range(GROUP, len(ids) + 1, GROUP):
                own = depth > 0 or end > shared
                prefix = hash((prefix, number, tuple(ids[end - GROUP : end]))) if own else hash((head, end))
                path.append(prefix)
            if path:
                yield clock, path


def read(path: Path) -> Requests:
    """The requests of a trace in the order of their time."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        lines = [json.loads(line) for line in file]
    if "hash_ids" in lines[0]:
        requests = [(float(line["timestamp"]), line["hash_ids"]) for line in lines]
    else:
        requests = list(sessions(lines, float(os.environ.get("RATE", "1"))))
    return sorted(requests, key=lambda request: request[0])


def measure(requests: Requests) -> dict[str, dict[int, tuple[float, float]]]:
    """Hit ratio and nanoseconds for a block, of each policy and capacity."""
    numbers: dict[Hashable, int] = {}
    words: list[int] = []
    for _, path in requests:
        words.append(len(path))
        words.extend(numbers.setdefault(block, len(numbers)) for block in path)
    with tempfile.NamedTemporaryFile() as file:
        np.array(words, np.uint32).tofile(file)
        file.flush()
        command = ["cargo", "bench", "--quiet", "--locked", "--bench", "policy", "--", file.name]
        lines = subprocess.run(
            [*command, *map(str, CAPACITIES)], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()
    out: dict[str, dict[int, tuple[float, float]]] = {}
    for line in lines:
        policy, capacity, hits, refs, seconds, _ = line.split()
        out.setdefault(policy, {})[int(capacity)] = int(hits) / int(refs), float(seconds) / int(refs) * 1e9
    return out


def rows_of(name: str, found: dict[str, dict[int, tuple[float, float]]]) -> list[Row]:
    """One row for each policy, and those that the policy has to reach."""
    hit = {policy: [found[policy][capacity][0] for capacity in CAPACITIES] for policy in found}
    simple = [policy for policy in hit if policy not in ("adaptive", "opt")]
    best = [max(hit[policy][n] for policy in simple) for n in range(len(CAPACITIES))]
    of_optimum = {p: 100 * mean(a / b for a, b in zip(hit[p], hit["opt"], strict=True)) for p in hit}
    rows = []
    for policy, ratios in hit.items():
        shown = " ".join(f"{100 * ratio:.1f}" for ratio in ratios)
        rows.append(row(f"{name}: {policy}: {shown}", of_optimum[policy], "% of Belady", n=len(CAPACITIES)))
    share = mean(a / b for a, b in zip(hit["adaptive"], best, strict=True))
    rows.append(row(f"{name}: adaptive / best simple", share, "", must="value >= 0.97", goal="value >= 1"))
    arc, mine = of_optimum["arc"], of_optimum["adaptive"]
    more = {"limit": "arc", "limit_value": arc, "ratio": mine / arc}
    rows.append(row(f"{name}: adaptive, of Belady", mine, "%", must=f"value > {arc:.3f}", **more))
    least = 100 * min(a - b for a, b in zip(hit["adaptive"], hit["lru"], strict=True))
    rows.append(row(f"{name}: adaptive - lru, least", least, "points", must="value >= -0.5", goal="value >= 0"))
    for policy in ("lru", "adaptive"):
        spent = mean(found[policy][capacity][1] for capacity in CAPACITIES)
        rows.append(row(f"{name}: {policy}, a block asked for", spent, "ns", n=len(CAPACITIES)))
    return rows


def main() -> None:
    """Measures every trace of the folders that are named."""
    files = sorted(file for name in sys.argv[1:] for file in Path(name).glob("*.jsonl*"))
    rows: list[Row] = [] if files else [row("policy: skipped, no folder of traces is named: ARGS=DIR", n=0)]
    for file in files:
        print(f"bench: {file.name}", file=sys.stderr, flush=True)
        rows += rows_of(file.name.split(".")[0], measure(read(file)))
    print("capacities:", *CAPACITIES)
    finish("policy", rows)


if __name__ == "__main__":
    main()
