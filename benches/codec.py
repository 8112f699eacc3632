"""The codecs against memcpy of the same bytes, see benches/codec.rs, and against libraries that quantise halves.

Libraries return fresh memory, which for results of one size is the same each time; so they stand beside our rows
that write to the same memory.
"""

from __future__ import annotations

import importlib
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import numpy as np
from rows import ROOT, Row, finish, row, skipped

BYTES, BLOCKS, WIDTH = 2 << 20, 128, 128
PEERED = "fp16, int8_asym per token, to the same memory"


def bounds(name: str) -> tuple[str, str] | None:
    """What a ratio must reach, and ought to."""
    verb, rest = name.split(" ", 1)
    if "same memory" in name or "per head" in name:
        return None
    if verb == "put":
        return "ratio >= 1.3", "ratio >= 1.8"
    if "percentile" in name:
        return "ratio >= 0.7", "ratio >= 0.95"
    if "2 threads" in name:
        return "ratio >= 1.7", "ratio >= 1.95"
    if "int4" in name or "k8v4" in name:
        return ("ratio >= 0.3", "ratio >= 0.6") if verb == "encode" else ("ratio >= 0.7", "ratio >= 1.2")
    if rest.endswith("fp16"):
        return ("ratio >= 1.2", "ratio >= 1.6") if verb == "encode" else None
    if verb == "decode":
        return "ratio >= 0.9", "ratio >= 1.4"
    return ("ratio >= 0.8", "ratio >= 1.2") if "fp32" in name else ("ratio >= 0.4", "ratio >= 0.8")


def ours() -> list[Row]:
    """Rows of benches/codec.rs."""
    command = ["cargo", "bench", "--quiet", "--locked", "--bench", "codec"]
    rows: list[Row] = []
    for line in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        name, value, unit, limit, bound, ratio, count = line.split("|")
        must, goal = bounds(name) or (None, None)
        more = {"limit": limit, "limit_value": float(bound), "ratio": float(ratio), "must": must, "goal": goal}
        rows.append(row(name, float(value), unit, n=int(count), **more))
    return rows


def rate(call: Callable[[int], object]) -> float:
    """GB/s of a call that works on one block of halves; its result is dropped, and its memory used again."""
    spent = []
    for turn in range(2 * BLOCKS):
        started = time.perf_counter()
        call(turn % BLOCKS)
        spent.append(time.perf_counter() - started)
    return BYTES / median(spent) / 1e9


def peers() -> dict[str, dict[str, float]]:
    """Rates of encode and decode, by library."""
    values = np.random.default_rng(0).standard_normal((BYTES // 2 // WIDTH, WIDTH)).astype(np.float16)
    arrays = [values.copy() for _ in range(BLOCKS)]

    def encode(values: np.ndarray) -> tuple[np.ndarray, ...]:
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        scale = (high - low) / np.float16(255)
        return np.rint((values - low) / scale).astype(np.uint8), scale, low

    codes, scale, low = encode(values)
    found = {
        f"numpy {np.__version__}": {
            "encode": rate(lambda n: encode(arrays[n])),
            "decode": rate(lambda _: codes * scale + low),
        }
    }
    if skipped("torch", "torch"):
        return found
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    tensors = [torch.from_numpy(array) for array in arrays]

    def quantise(values: object) -> object:
        return torch.quantize_per_tensor(values.float(), 0.05, 128, torch.quint8)

    coded = [quantise(tensor) for tensor in tensors]
    found[f"torch {torch.__version__}, per tensor"] = {
        "encode": rate(lambda n: quantise(tensors[n])),
        "decode": rate(lambda n: coded[n].dequantize().half()),
    }
    if not skipped("fbgemm", "fbgemm_gpu"):
        fbgemm = torch.ops.fbgemm
        coded = [fbgemm.HalfToFused8BitRowwiseQuantized(tensor) for tensor in tensors]
        found[f"fbgemm-gpu-cpu {version('fbgemm-gpu-cpu')}"] = {
            "encode": rate(lambda n: fbgemm.HalfToFused8BitRowwiseQuantized(tensors[n])),
            "decode": rate(lambda n: fbgemm.Fused8BitRowwiseQuantizedToHalf(coded[n])),
        }
    return found


def main() -> None:
    """Our rows, and those of libraries beside the ones that they can be compared with."""
    rows, found = ours(), peers()
    rates = {each["name"]: each["value"] for each in rows}
    for library, verbs in found.items():
        for verb, theirs in verbs.items():
            mine = rates[f"{verb} {PEERED}"]
            best = {"must": "ratio >= 1.2", "goal": "ratio >= 1.5"} if "fbgemm" in library else {}
            more = {"limit": library, "limit_value": theirs, "ratio": mine / theirs, "n": 2 * BLOCKS, **best}
            rows.append(row(f"{verb} {PEERED}, beside a library", mine, "GB/s", **more))
    rows += skipped("fbgemm", "torch", "fbgemm_gpu")
    finish("codec", rows)


if __name__ == "__main__":
    main()
