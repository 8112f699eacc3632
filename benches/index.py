"""The index against the machine's cache misses and atomic additions; see benches/index.rs."""

from __future__ import annotations

import subprocess

from rows import ROOT, Row, finish, row

# What each row must reach, and ought to.
BOUNDS = {
    "match + lease, 256 hashes, all cached": ("value < 1000", "value <= 450"),
    "match + lease from 4,096 tokens": ("value < 6000", "value <= 3000"),
    "lease + release, hot": ("value < 10", "value <= 3"),
    "lease + release, random": ("value < 50", "value <= 15"),
    "match, 2 threads": ("ratio >= 1.8", "ratio >= 1.95"),
    "evict a block beside a reader": ("value < 1000", "value <= 150"),
    "match and what it leaves behind, 10240 blocks, adaptive": ("ratio <= 1.1", "ratio <= 1.03"),
    "match and what it leaves behind, 102400 blocks, adaptive": ("ratio <= 1.1", "ratio <= 1.03"),
    "miss-ratio curve, of a match and what it leaves behind, 10240 blocks": ("ratio <= 0.03", "ratio <= 0.01"),
    "miss-ratio curve, of a match and what it leaves behind, 102400 blocks": ("ratio <= 0.03", "ratio <= 0.01"),
    "put of a block that evicts one, beside a reader, 102400 blocks, adaptive": ("value < 1000", "value <= 150"),
    "index bytes a block": ("value <= 96", "value <= 78"),
    "alloc + free, 1 thread": ("value < 50", "value <= 6"),
    "alloc + free, 2 threads": ("value < 50", "value <= 6"),
}


def main(suite: str = "index", parts: tuple[str, ...] = ("index", "store")) -> None:
    """Measures parts of benches/index.rs."""
    command = ["cargo", "bench", "--quiet", "--locked", "--bench", "index", "--", *parts]
    rows: list[Row] = []
    for line in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        name, value, unit, limit, bound, count = line.split("|")
        must, goal = BOUNDS.get(name, (None, None))
        more = {"limit": limit, "limit_value": float(bound), "ratio": float(value) / float(bound)} if limit else {}
        rows.append(row(name, float(value), unit, n=int(count), must=must, goal=goal, **more))
    finish(suite, rows)


if __name__ == "__main__":
    main()
