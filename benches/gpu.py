"""The GPU tier: what places and hits cost at the Rust boundary, see benches/gpu.rs; and what of a device is unmeasured.

A folder of request traces (ARGS=DIR) is replayed: `mooncake_conversation.jsonl.xz` there.
"""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import ROOT, Row, finish, row

from stratakv import gpu

# What each row must reach.
BOUNDS = {
    "place in a slab that is 85 % full, p99": "value < 200",
    "hit: look up 64 blocks, lease, hold, touch, p99": "value < 500",
    "replay: places that had a block before": "value >= 0.95",
    "replay: calls of the device for memory after the slab's": "value < 1",
}
ON_A_DEVICE = (
    "copies up and down of blocks from 64 KiB, of a large pinned copy (must 0.9)",
    "copies up and down of 4 to 28 KiB, of a large pinned copy (must 0.7)",
    "encoding on the way down, of the link",
    "sizes from which engines are faster than a kernel",
)


def replayed(folder: Path, out: Path) -> list[str]:
    """Block numbers of each request of a trace, a line each; where they are."""
    with lzma.open(folder / "mooncake_conversation.jsonl.xz", "rt") as lines, out.open("w") as file:
        file.writelines(" ".join(map(str, json.loads(line)["hash_ids"])) + "\n" for line in lines)
    return [str(out)]


def main() -> None:
    """Measures what there is to measure here."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        trace = replayed(Path(sys.argv[1]), Path(folder) / "trace") if sys.argv[1:] else []
        if not trace:
            rows.append(row("replay: skipped, no folder of traces is named (ARGS=DIR)", n=0))
        command = ["cargo", "bench", "--quiet", "--locked", "--bench", "gpu", "--", *trace]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for line in said.splitlines():
        name, value, unit, limit, bound, count = line.split("|")
        more = {"limit": limit, "limit_value": float(bound), "ratio": float(value) / float(bound)} if limit else {}
        rows.append(row(name, float(value), unit, n=int(count), must=BOUNDS.get(name), **more))
    device = gpu.status()
    why = "no GPU" if device.reason else f"{device.device}: run `stratakv gpu check`"
    rows += [row(f"unmeasured: {what}: {why}", n=0) for what in ON_A_DEVICE]
    finish("gpu", rows)


if __name__ == "__main__":
    main()
