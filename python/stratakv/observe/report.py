"""How a store is, as the page, `stratakv top` and programs read it: one table of plain numbers and text."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from stratakv.stats import Stats
from stratakv.status import View

__all__ = ["History", "report"]

# How often totals are noted, and for how long they are kept.
STEP_S = 5.0
_KEPT = 180
# What is noted of them.
_NOTED = ("asked_blocks", "hit_blocks", "loaded_tokens", "loaded_bytes", "put_bytes")


class History:
    """Totals of the last quarter of an hour. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Of nothing yet."""
        self._clock = clock
        self._lock = threading.Lock()
        self._rows: deque[tuple[float, tuple[float, ...]]] = deque(maxlen=_KEPT + 1)

    def note(self, total: Stats) -> None:
        """Notes the totals of now."""
        row = (self._clock(), tuple(float(getattr(total, name)) for name in _NOTED))
        with self._lock:
            self._rows.append(row)

    def steps(self) -> dict[str, list[float]]:
        """What came in each step, by what was noted; and ``at``, when each ended, in seconds since 1970."""
        with self._lock:
            rows = list(self._rows)
        out: dict[str, list[float]] = {"at": [round(at, 3) for at, _ in rows[1:]]}
        for n, name in enumerate(_NOTED):
            out[name] = [now[n] - before[n] for (_, before), (_, now) in itertools.pairwise(rows)]
        return out


def report(
    view: View, *, uptime_s: float, history: History | None = None, hottest: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """All of it, as JSON takes it."""
    status = view.status
    return {
        "version": view.version,
        "pid": os.getpid(),
        "uptime_s": round(uptime_s, 3),
        "degraded": list(status.degraded),
        "total": _counts(view.snapshot.total),
        "tiers": _tiers(view),
        "models": [
            {
                "name": name,
                **_counts(stats),
                "hit_ceiling": status.hit_ceiling.get(name),
                "eviction": status.ram_eviction.get(name),
                "tiers": {
                    tier: {"blocks": counts.blocks, "used_bytes": counts.used_bytes, "codec_ratio": counts.ratio}
                    for tier, counts in stats.tiers.items()
                },
                "shares": {"ram": status.ram_shares.get(name), "ssd": status.ssd_shares.get(name)},
            }
            for name, stats in view.snapshot.models.items()
        ],
        "tenants": view.tenants - 1,
        "index": {"blocks": status.index_blocks, "bytes": status.index_bytes, "refused": status.index_refused_blocks},
        "advice": list(view.snapshot.total.advice),
        "history": {"step_s": STEP_S, **(history.steps() if history is not None else {})},
        "hottest": list(hottest),
    }


def _counts(stats: Stats) -> dict[str, Any]:
    return {
        "matches": stats.matches,
        "asked_blocks": stats.asked_blocks,
        "hit_blocks": stats.hit_blocks,
        "hit_ratio": stats.hit_ratio,
        "missed": {reason: blocks for reason, blocks in stats.missed.items() if blocks},
        "unloaded": {reason: blocks for reason, blocks in stats.unloaded.items() if blocks},
        "loaded_tokens": stats.loaded_tokens,
        "loaded_bytes": stats.loaded_bytes,
        "load_s": stats.load_s,
        "put_blocks": stats.put_blocks,
        "put_bytes": stats.put_bytes,
        "put_s": stats.put_s,
        "put_refused_blocks": stats.put_refused_blocks,
        "prefill_saved_s": stats.prefill_saved_s,
        "corrupt_blocks": stats.corrupt_blocks,
        "io_errors": stats.io_errors,
    }


def _tiers(view: View) -> list[dict[str, Any]]:
    status, total = view.status, view.snapshot.total
    out: list[dict[str, Any]] = []
    gpu = status.gpu
    capacities = (gpu.capacity_bytes if gpu is not None else 0, status.ram_capacity_bytes, status.ssd_capacity_bytes)
    for name, capacity in zip(("gpu", "ram", "ssd"), capacities, strict=True):
        counts = total.tiers[name]
        row: dict[str, Any] = {
            "name": name,
            "state": "ok" if capacity else "off",
            "capacity_bytes": capacity,
            "used_bytes": counts.used_bytes,
            "blocks": counts.blocks,
            "asked_blocks": counts.asked_blocks,
            "hit_blocks": counts.hit_blocks,
            "evicted_blocks": counts.evicted_blocks,
            "codec_ratio": counts.ratio,
        }
        why = None
        if name == "gpu":
            row["device"], row["held_blocks"] = (gpu.device, gpu.held_blocks) if gpu is not None else (None, 0)
            why = status.gpu_absent if gpu is None else gpu.failed
        elif name == "ram":
            row["free_bytes"], row["largest_free_bytes"] = status.ram_free_bytes, status.ram_largest_free_bytes
            row["pages"] = status.ram_pages
        else:
            row["file_bytes"], row["io"], row["engine"] = status.ssd_file_bytes, status.ssd_io, status.ssd_engine
            row["write_amplification"], why = counts.write_amplification, status.ssd_read_only
        if why is not None:
            row["state"], row["why"] = "fails", why
        out.append(row)
    for name in ("dragonfly", "postgres", "qdrant"):
        stats = getattr(status, name)
        if stats is None:
            out.append({"name": name, "state": "off"})
            continue
        row = {"name": name, **{key: value for key, value in asdict(stats).items() if key != "guard"}}
        why = getattr(stats, "refused", None) or getattr(stats, "misfit", None)
        why = why or (stats.guard.last_error if stats.guard.failing else None)
        row["state"] = "fails" if why else "ok"
        if why:
            row["why"] = why
        row["breaker"], row["calls"] = stats.guard.state, stats.guard.asked
        row["failed_calls"] = stats.guard.errors + stats.guard.timeouts
        out.append(row)
    return out
