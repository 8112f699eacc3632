"""How a store's tiers run; and `stratakv status`: whether each tier of a configuration answers.

The command asks each tier by itself and opens no store: a directory that a running store has is none of its business.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stratakv import _native
from stratakv.config import Config
from stratakv.errors import ConfigError, StoreError
from stratakv.near import NearStats
from stratakv.quotas import Usage
from stratakv.stats import GpuStats, LiftStats, Snapshot, Stats
from stratakv.tiers.dragonfly import Dragonfly, DragonflyStats
from stratakv.tiers.postgres import Postgres, PostgresStats
from stratakv.tiers.qdrant import Qdrant, QdrantStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the tiers run.

    Attributes:
        ram_capacity_bytes: size of the RAM tier.
        ram_free_bytes: bytes of it in no slot that is taken.
        ram_largest_free_bytes: the longest piece of them that one put could have.
        ram_pages: what the kernel backs its memory with, as far as it was touched: ``huge``, ``mixed`` or ``ordinary``
            pages; ``untouched`` before the first put, ``unknown`` where the kernel does not tell.
        ram_huge_bytes: bytes of it on huge pages.
        ram_eviction: the eviction policy that runs at present, by model.
        ram_held: bytes of RAM that each model holds, by model; slots of its own that are free among them.
        model_usage: what counts for each model's quota, by model.
        tenant_usage: what counts for each tenant's quota, by tenant, over all models.
        ram_shares: bytes of RAM that each model gets back when it needs them, by model.
        ssd_shares: the same of the SSD.
        ssd_capacity_bytes: cap of the SSD tier; 0 if it is off.
        ssd_file_bytes: bytes its files take.
        ssd_io: ``direct``, ``buffered`` or ``off``.
        ssd_engine: what reads and writes: ``io_uring``, ``pread`` or ``off``.
        ssd_read_only: why the SSD takes no writes at present; ``None`` if it does.
        gpu: how the GPU tier is; ``None``: there is none.
        gpu_absent: why there is none, though one is configured.
        demotion_queue_blocks: blocks that wait to be written to the SSD, by model.
        waiting: what could not be written yet to a tier behind it, by tier: blocks, or rows; what fails is tried again.
        hit_ceiling: which share of the blocks that matches asked for a cache would have hit that never forgets, 0..1,
            by model, from its registration on; by a sample, and only of models that were asked for enough.
        dragonfly: what was asked of the tier that nodes share, and how it is; ``None``: there is none.
        postgres: the same of the catalog.
        qdrant: the same of the vector index.
        semantic_prefetch: what was brought to RAM because it was near to a prompt.
        warm_start: what was brought to RAM when models were registered.
        degraded: what it runs without at present, of what it is configured with, see `degraded`.
        index_blocks: blocks in the index.
        index_bytes: memory that the index takes when it is full.
        index_refused_blocks: blocks that were not stored because it was full.
        threads: threads that copy and read.
    """

    ram_capacity_bytes: int
    ram_free_bytes: int
    ram_largest_free_bytes: int
    ram_pages: str
    ram_huge_bytes: int
    ram_eviction: dict[str, str]
    ram_held: dict[str, int]
    model_usage: dict[str, Usage]
    tenant_usage: dict[str, Usage]
    ram_shares: dict[str, int]
    ssd_shares: dict[str, int]
    ssd_capacity_bytes: int
    ssd_file_bytes: int
    ssd_io: str
    ssd_engine: str
    ssd_read_only: str | None
    gpu: GpuStats | None
    gpu_absent: str | None
    demotion_queue_blocks: dict[str, int]
    waiting: dict[str, int]
    hit_ceiling: dict[str, float]
    dragonfly: DragonflyStats | None
    postgres: PostgresStats | None
    qdrant: QdrantStats | None
    semantic_prefetch: NearStats | None
    warm_start: LiftStats
    degraded: tuple[str, ...]
    index_blocks: int
    index_bytes: int
    index_refused_blocks: int
    threads: int


@dataclass(frozen=True, slots=True)
class View:
    """Counters and status of one instant.

    Attributes:
        version: of the package.
        snapshot: all counters; of the tenants those that were seen first.
        status: how the tiers run; of the tenants likewise.
        other_tenants: of the others together, if there are more.
        tenants: how many there are.
    """

    version: str
    snapshot: Snapshot
    status: Status
    other_tenants: Stats | None
    tenants: int

    @classmethod
    def of(cls, native: dict[str, Any], **tiers: Any) -> View:  # noqa: ANN401 - fields of `Status`
        """A native snapshot, and those fields of a `Status` that it does not have."""
        serves = native["ssd_read_only"] is None if native["ssd_capacity_bytes"] else None
        gpu = None if native["gpu"] is None else GpuStats(**native["gpu"])
        on_gpu = None if gpu is None and tiers["gpu_absent"] is None else gpu is not None and gpu.failed is None
        came, hit = native["lifted"]["warm"]
        used = ("model_usage", "tenant_usage")
        usage = {kind: {name: Usage.of(row) for name, row in native[kind].items()} for kind in used}
        known = {
            **native,
            **usage,
            **tiers,
            "warm_start": LiftStats(bytes=came, hit_bytes=hit),
            "gpu": gpu,
            "degraded": degraded(
                tiers["dragonfly"], tiers["postgres"], tiers["qdrant"], ssd_serves=serves, gpu_serves=on_gpu
            ),
        }
        others = native["other_tenants"]
        return cls(
            version=_native.__version__,
            snapshot=Snapshot.of(native),
            status=Status(**{name: known[name] for name in Status.__slots__}),
            other_tenants=None if others is None else Stats.of(others),
            tenants=native["tenant_count"],
        )


MODES = ("no_gpu", "no_hot_cache", "no_catalog", "no_vector_index", "ram_only")
"""What `Status.degraded` may say."""


def degraded(
    dragonfly: DragonflyStats | None,
    postgres: PostgresStats | None,
    qdrant: QdrantStats | None,
    *,
    ssd_serves: bool | None,
    gpu_serves: bool | None = None,
) -> tuple[str, ...]:
    """What a store runs without at present, of what it is configured with.

    Args:
        dragonfly: how the tier that nodes share is; ``None``: there is none.
        postgres: the same of the catalog.
        qdrant: the same of the vector index.
        ssd_serves: whether the SSD takes writes; ``None``: there is none.
        gpu_serves: whether the GPU does; ``None``: none is configured.

    Returns:
        ``no_gpu``, ``no_hot_cache``, ``no_catalog`` and ``no_vector_index``, where that tier does not answer; and
        ``ram_only``, where RAM is all that is left of the tiers that hold blocks by themselves.
    """
    cold = [ssd_serves, None if dragonfly is None else not dragonfly.guard.failing]
    holds = (
        gpu_serves is False,
        cold[1] is False,
        postgres is not None and (postgres.refused is not None or postgres.guard.failing),
        qdrant is not None and (qdrant.misfit is not None or qdrant.guard.failing),
        any(serves is False for serves in cold) and not any(cold),
    )
    return tuple(itertools.compress(MODES, holds))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `stratakv status`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file; the environment is applied to it")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Asks every tier; 0: all that are configured answer, 1: not all, 2: the configuration makes no sense."""
    try:
        config = Config.load(args.config)
    except ConfigError as error:
        print(f"stratakv status: {error}", file=sys.stderr)
        return 2
    tiers: dict[str, dict[str, Any]] = {}
    tiers["gpu"], gpu_serves = _gpu(config)
    tiers["ram"] = {"state": "ok", "capacity_bytes": config.ram.capacity_bytes}
    tiers["ssd"], serves = _ssd(config)
    stats: dict[str, Any] = {}
    missing: list[str] = []
    for name, kind in (("dragonfly", Dragonfly), ("postgres", Postgres), ("qdrant", Qdrant)):
        settings = getattr(config, name)
        if settings.url is None and getattr(settings, "path", None) is None:
            tiers[name] = {"state": "off"}
            continue
        if name == "postgres":
            # Whoever opens it is a node from then on.
            refused = Postgres.check(settings)
            missing += ["no_catalog"] if refused else []
            tiers[name] = {"state": "fails", "why": refused} if refused else {"state": "ok"}
            continue
        tiers[name], stats[name] = _asked(kind, replace(settings, required=False))
    found = degraded(stats.get("dragonfly"), None, stats.get("qdrant"), ssd_serves=serves, gpu_serves=gpu_serves)
    modes = sorted({*missing, *found})
    if args.json:
        print(json.dumps({"tiers": tiers, "degraded": modes}))
    else:
        for name, tier in tiers.items():
            more = ", ".join(f"{key} {value}" for key, value in tier.items() if key != "state" and value is not None)
            print(f"{name:<10} {tier['state']}" + (f": {more}" if more else ""))
        print("degraded   " + (", ".join(modes) or "no"))
    return 1 if modes else 0


def _gpu(config: Config) -> tuple[dict[str, Any], bool | None]:
    if not config.gpu.capacity_bytes:
        return {"state": "off"}, None
    found = _native.gpu_status(config.gpu.device, config.gpu.driver)
    if found["reason"] is not None:
        return {"state": "fails", "why": found["reason"]}, False
    return {"state": "ok", "device": found["device"], "free_bytes": found["free_bytes"]}, True


def _ssd(config: Config) -> tuple[dict[str, Any], bool | None]:
    if not config.ssd.enabled:
        return {"state": "off"}, None
    path = Path(str(config.ssd.path))
    if not path.exists():
        return {"state": "ok", "path": str(path), "holds": "nothing yet"}, True
    try:
        archive = _native.Archive(path)
    except StoreError as error:
        return {"state": "fails", "path": str(path), "why": str(error)}, False
    use = "in use" if archive.in_use else "not in use"
    return {"state": "ok", "path": str(path), "holds": f"{len(archive.models())} models, {use}"}, True


def _asked(kind: Callable[[Any], Any], settings: Any) -> tuple[dict[str, Any], Any]:  # noqa: ANN401 - of each tier
    begun = time.perf_counter()
    try:
        tier = kind(settings)
    except (ConfigError, StoreError) as error:
        return {"state": "fails", "why": str(error)}, None
    try:
        stats = tier.stats()
    finally:
        tier.close()
    why = getattr(stats, "refused", None) or getattr(stats, "misfit", None) or stats.guard.last_error
    if why is not None:
        return {"state": "fails", "why": why}, stats
    return {"state": "ok", "answers_in": f"{1000 * (time.perf_counter() - begun):.0f} ms"}, stats
