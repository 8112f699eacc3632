"""What scheduler and workers tell each other.

Scheduler to worker, with every step: what to load, what to save, and which step it is. Worker to scheduler: what was
saved, how many bytes in what time, and which blocks are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Load:
    """Keys and values of a request that the engine has made room for.

    Attributes:
        request: its id; its match is leased under it.
        start: first token to load.
        stop: the token after the last.
        pages: the engine's blocks, of all tokens up to `stop`.
    """

    request: str
    start: int
    stop: int
    pages: Ids


@dataclass(frozen=True)
class Save:
    """Tokens of a request whose keys and values are in the engine's blocks when this step is done.

    Attributes:
        request: its id.
        adapter: of its namespace.
        tenant: of its namespace.
        start: first of the tokens; 0 begins anew.
        tokens: their ids, whole blocks.
        pages: the engine's blocks of all tokens up to the last of these.
        hashes: the engine's own names of these blocks, where events are published.
    """

    request: str
    adapter: str
    tenant: str
    start: int
    tokens: Ids
    pages: Ids
    hashes: tuple[bytes, ...] = ()


@dataclass
class Step(KVConnectorMetadata):
    """What the workers do in one step.

    Attributes:
        number: of the step: matches that were asked for before are loaded now, or given back.
        loads: what to begin to load.
        saves: what to save after it.
        finished: requests that are over.
        idle: whether the engine computes nothing in this step.
    """

    number: int = 0
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    finished: frozenset[str] = frozenset()
    idle: bool = False


@dataclass(frozen=True)
class Address(KVConnectorHandshakeMetadata):
    """Where a worker answers what it has: a socket, and the key that opens it."""

    path: str
    key: bytes
    pid: int


@dataclass
class Saved(KVConnectorWorkerMetadata):
    """What workers have stored, and lost: blocks by the engine's names; with several workers, how many of them."""

    stored: dict[bytes, int] = field(default_factory=dict)
    gone: dict[bytes, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Both together."""
        if isinstance(other, Saved):
            for mine, more in ((self.stored, other.stored), (self.gone, other.gone)):
                for name, count in more.items():
                    mine[name] = mine.get(name, 0) + count
        return self


# What is counted: name, unit and help, as Prometheus shows it.
COUNTERS: Mapping[str, str] = {
    "asked_tokens": "Tokens of prompts that the engine did not have and asked for.",
    "hit_tokens": "Of these, tokens that were found.",
    "loaded_tokens": "Tokens loaded into the engine's blocks, by rank.",
    "loaded_bytes": "Bytes loaded into the engine's blocks.",
    "load_seconds": "Time that loads took.",
    "failed_tokens": "Tokens that were found and then could not be loaded: the engine computed them.",
    "saved_tokens": "Tokens saved from the engine's blocks, by rank.",
    "saved_bytes": "Bytes of new blocks that were saved.",
    "save_seconds": "Time that saves took.",
    "refused_tokens": "Tokens for which there was no room.",
}


class Counted(KVConnectorStats):
    """Sums since the last step, of scheduler and workers."""

    data: dict[str, Any]

    def add(self, **more: float) -> None:
        """Adds to some sums."""
        for name, value in more.items():
            self.data[name] = self.data.get(name, 0) + value

    def taken(self) -> Counted | None:
        """What was counted since the last call; ``None``: nothing."""
        if not self.data:
            return None
        out, self.data = Counted(self.data), {}
        return out

    def reset(self) -> None:
        """Forgets all."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both together."""
        self.add(**other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What a line of the log shows."""
        get = self.data.get
        asked, hit, loaded, saved = (get(n, 0) for n in ("asked_tokens", "hit_tokens", "loaded_bytes", "saved_bytes"))
        out: dict[str, int | float] = {"asked tokens": asked, "hit ratio": round(hit / asked, 4) if asked else 0.0}
        for name, size, seconds in (("load", loaded, get("load_seconds", 0)), ("save", saved, get("save_seconds", 0))):
            out[f"{name} MB"] = round(size / 1e6, 1)
            out[f"{name} GB/s"] = round(size / seconds / 1e9, 2) if seconds else 0.0
        out["failed tokens"] = get("failed_tokens", 0)
        return out


class Metrics(KVConnectorPromMetrics):
    """The sums as counters of Prometheus: ``vllm:stratakv_…_total``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """Registers them."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, help_text in COUNTERS.items():
            metric: Any = metric_types[Counter](
                name=f"vllm:stratakv_{name}", documentation=help_text, labelnames=labelnames
            )
            self._counters[name] = {engine: metric.labels(*values) for engine, values in per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds what was counted."""
        for name, value in transfer_stats_data.items():
            if name in self._counters and value:
                self._counters[name][engine_idx].inc(value)
