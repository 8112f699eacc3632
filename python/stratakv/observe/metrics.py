"""All metrics: what each is called, what it means, and where it is read; one table for Prometheus, OTLP and the docs.

    one view of the store ─▶ `METRICS`, each reads its samples ─▶ `Collector`: folded labels ─▶ Prometheus, OTLP

Counters are the native half's, read in one snapshot: what adds up there adds up in every scrape. Labels are bounded: as
many models and tenants have their names as there is room for, all others together are ``other``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from stratakv.guard import GuardStats
from stratakv.stats import Histogram, Stats, TierStats
from stratakv.status import MODES, Status, View
from stratakv.tiers.dragonfly import DragonflyStats

__all__ = ["Collector", "Family", "Metric", "table"]

Labels = tuple[str, ...]
Sample = tuple[Labels, float | Histogram]
Read = Callable[[View], Iterable[Sample]]

# Models that have a name of their own, as tenants have that the view tells apart; and what the others are called.
MOST_MODELS = 256
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus shows it, with its unit.
        kind: ``counter``, ``gauge`` or ``histogram``.
        labels: names of its labels.
        help: what it means.
        read: its samples in a view: values of the labels, and a number or a histogram.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: Labels
    help: str
    read: Read


@dataclass(frozen=True, slots=True)
class Family:
    """A metric's samples at one instant, no two of them with the same labels."""

    metric: Metric
    samples: dict[Labels, float | Histogram]


def _model(value: Callable[[Stats], float]) -> Read:
    return lambda view: (((name,), value(stats)) for name, stats in view.snapshot.models.items())


def _tenants(view: View) -> Iterator[tuple[str, Stats]]:
    """Those that were seen first, and the others as one."""
    yield from view.snapshot.tenants.items()
    if view.other_tenants is not None:
        yield OTHER, view.other_tenants


def _tenant(value: Callable[[Stats], float]) -> Read:
    return lambda view: (((name,), value(stats)) for name, stats in _tenants(view))


def _tier(value: Callable[[TierStats], float]) -> Read:
    def read(view: View) -> Iterator[Sample]:
        for name, stats in view.snapshot.models.items():
            for tier, counts in stats.tiers.items():
                yield (name, tier), value(counts)

    return read


def _any_tier(value: Callable[[TierStats | DragonflyStats], float]) -> Read:
    """Of a model's tiers, and of the one that nodes share, which does not count by model."""

    def read(view: View) -> Iterator[Sample]:
        yield from _tier(value)(view)
        if view.status.dragonfly is not None:
            yield ("", "dragonfly"), value(view.status.dragonfly)

    return read


def _reasons(blocks: Callable[[Stats], Iterable[tuple[str, int]]]) -> Read:
    def read(view: View) -> Iterator[Sample]:
        for name, stats in view.snapshot.models.items():
            for reason, count in blocks(stats):
                yield (name, reason), count

    return read


def _histogram(value: Callable[[TierStats], Histogram]) -> Read:
    return lambda view: (((tier,), value(counts)) for tier, counts in view.snapshot.total.tiers.items())


# What moves bytes, and how many in what time.
_PATHS: dict[str, Callable[[Stats], tuple[float, float]]] = {
    "put": lambda stats: (stats.put_bytes, stats.put_s),
    "load": lambda stats: (stats.loaded_bytes, stats.load_s),
    "ssd_read": lambda stats: (stats.tiers["ssd"].read_bytes, stats.tiers["ssd"].read_s),
    "ram_encode": lambda stats: (stats.tiers["ram"].encoded_bytes, stats.tiers["ram"].encode_s),
    "ram_decode": lambda stats: (stats.tiers["ram"].decoded_bytes, stats.tiers["ram"].decode_s),
    "ssd_encode": lambda stats: (stats.tiers["ssd"].encoded_bytes, stats.tiers["ssd"].encode_s),
    "ssd_decode": lambda stats: (stats.tiers["ssd"].decoded_bytes, stats.tiers["ssd"].decode_s),
}


def _path(part: int) -> Read:
    def read(view: View) -> Iterator[Sample]:
        for name, stats in view.snapshot.models.items():
            for path, moved in _PATHS.items():
                yield (name, path), moved(stats)[part]

    return read


def _shared(number: Callable[[DragonflyStats], float]) -> Read:
    """Of the tier that nodes share, if there is one."""

    def read(view: View) -> Iterator[Sample]:
        if view.status.dragonfly is not None:
            yield ("dragonfly",), number(view.status.dragonfly)

    return read


def _guards(view: View) -> Iterator[tuple[str, GuardStats]]:
    for tier in ("dragonfly", "postgres", "qdrant"):
        stats = getattr(view.status, tier)
        if stats is not None:
            yield tier, stats.guard


def _breakers(view: View) -> Iterator[Sample]:
    for tier, guard in _guards(view):
        yield (tier,), {"closed": 0.0, "half_open": 0.5, "open": 1.0}[guard.state]


def _calls(view: View) -> Iterator[Sample]:
    for tier, guard in _guards(view):
        for result in ("answered", "errors", "timeouts", "refused"):
            yield (tier, result), getattr(guard, result)


def _opened(view: View) -> Iterator[Sample]:
    for tier, guard in _guards(view):
        yield (tier,), guard.opened


def _capacity(view: View) -> Iterator[Sample]:
    yield ("ram",), view.status.ram_capacity_bytes
    yield ("ssd",), view.status.ssd_capacity_bytes
    if view.status.gpu is not None:
        yield ("gpu",), view.status.gpu.capacity_bytes


def _shares(view: View) -> Iterator[Sample]:
    for tier, shares in (("ram", view.status.ram_shares), ("ssd", view.status.ssd_shares)):
        for name, size in shares.items():
            yield (name, tier), size


def _held(view: View) -> Iterator[Sample]:
    for name, size in view.status.ram_held.items():
        yield (name,), size


def _one(value: Callable[[Status], float]) -> Read:
    return lambda view: [((), float(value(view.status)))]


def _fragmentation(view: View) -> Iterator[Sample]:
    free = view.status.ram_free_bytes
    yield (), 1 - view.status.ram_largest_free_bytes / free if free else 0.0


def _tenant_bytes(view: View) -> Iterator[Sample]:
    for name, stats in _tenants(view):
        for tier, counts in stats.tiers.items():
            yield (name, tier), counts.used_bytes


def _ceiling(view: View) -> Iterator[Sample]:
    for name, ratio in view.status.hit_ceiling.items():
        yield (name,), ratio


def _queues(view: View) -> Iterator[Sample]:
    yield ("demotion",), sum(view.status.demotion_queue_blocks.values())
    if (near := view.status.semantic_prefetch) is not None:
        yield ("vector_index",), near.behind.waiting
    for tier, waiting in view.status.waiting.items():
        yield (tier,), waiting


def _lifted(view: View) -> Iterator[Sample]:
    yield ("warm_start",), view.status.warm_start.bytes
    if (near := view.status.semantic_prefetch) is not None:
        yield ("semantic",), near.lifted


def _lifted_hit(view: View) -> Iterator[Sample]:
    yield ("warm_start",), view.status.warm_start.hit_bytes
    if (near := view.status.semantic_prefetch) is not None:
        yield ("semantic",), near.hit


def _rows(view: View) -> Iterator[Sample]:
    if view.status.postgres is not None:
        yield (), view.status.postgres.written_rows


def _degraded(view: View) -> Iterator[Sample]:
    for mode in MODES:
        yield (mode,), float(mode in view.status.degraded)


def _info(view: View) -> Iterator[Sample]:
    yield (view.version, view.status.ssd_io, view.status.ssd_engine, view.status.ram_pages), 1.0


MODEL, TIER, TENANT = ("model",), ("model", "tier"), ("tenant",)

METRICS: tuple[Metric, ...] = (
    # What was asked for, and found.
    Metric("stratakv_matches_total", "counter", MODEL, "Matches made.", _model(lambda s: s.matches)),
    Metric(
        "stratakv_asked_blocks_total",
        "counter",
        MODEL,
        "Whole blocks that matches asked for: those found and those not, exactly.",
        _model(lambda s: s.asked_blocks),
    ),
    Metric("stratakv_hit_blocks_total", "counter", MODEL, "Blocks that were found.", _model(lambda s: s.hit_blocks)),
    Metric(
        "stratakv_miss_blocks_total",
        "counter",
        ("model", "reason"),
        "Blocks that were not found, by the reason of the first that was missing.",
        _reasons(lambda s: s.missed.items()),
    ),
    Metric(
        "stratakv_unloaded_blocks_total",
        "counter",
        ("model", "reason"),
        "Blocks that were found and could not be loaded, by the reason.",
        _reasons(lambda s: s.unloaded.items()),
    ),
    Metric(
        "stratakv_hit_ceiling_ratio",
        "gauge",
        MODEL,
        "Share of the blocks asked for that a cache without end would have found, from a sample.",
        _ceiling,
    ),
    Metric("stratakv_loads_total", "counter", MODEL, "Loads made.", _model(lambda s: s.loads)),
    Metric("stratakv_puts_total", "counter", MODEL, "Puts made.", _model(lambda s: s.puts)),
    Metric(
        "stratakv_loaded_tokens_total",
        "counter",
        MODEL,
        "Tokens loaded, that is prefill that was saved.",
        _model(lambda s: s.loaded_tokens),
    ),
    Metric(
        "stratakv_prefill_saved_seconds_total",
        "counter",
        MODEL,
        "Seconds that computing the loaded tokens would have taken, where the model's rate is known.",
        _model(lambda s: s.prefill_saved_s),
    ),
    Metric(
        "stratakv_not_worth_it_loads_total",
        "counter",
        MODEL,
        "Loads that ended where reading on takes longer than computing.",
        _model(lambda s: s.not_worth_it_loads),
    ),
    # By tier.
    Metric(
        "stratakv_tier_asked_blocks_total",
        "counter",
        TIER,
        "Blocks that loads asked a tier for: those it delivered and those it did not, exactly.",
        _any_tier(lambda t: t.asked_blocks),
    ),
    Metric(
        "stratakv_tier_hit_blocks_total",
        "counter",
        TIER,
        "Blocks that a tier delivered.",
        _any_tier(lambda t: t.hit_blocks),
    ),
    Metric(
        "stratakv_tier_miss_blocks_total",
        "counter",
        TIER,
        "Blocks that a tier did not have, or could not deliver.",
        _any_tier(lambda t: t.miss_blocks),
    ),
    Metric("stratakv_blocks", "gauge", TIER, "Blocks that a tier holds.", _tier(lambda t: t.blocks)),
    Metric(
        "stratakv_used_bytes",
        "gauge",
        TIER,
        "Bytes that they take, headers and padding included.",
        _tier(lambda t: t.used_bytes),
    ),
    Metric(
        "stratakv_tier_in_bytes_total",
        "counter",
        TIER,
        "Bytes of blocks that came to a tier: what left and what it holds, exactly.",
        _tier(lambda t: t.in_bytes),
    ),
    Metric(
        "stratakv_tier_out_bytes_total",
        "counter",
        TIER,
        "Bytes of blocks that left a tier, for whatever reason.",
        _tier(lambda t: t.out_bytes),
    ),
    Metric(
        "stratakv_codec_ratio",
        "gauge",
        TIER,
        "How many times more blocks a tier holds than it would if none were encoded.",
        _tier(lambda t: t.ratio),
    ),
    Metric("stratakv_capacity_bytes", "gauge", ("tier",), "Size of a tier; 0: there is none.", _capacity),
    Metric("stratakv_share_bytes", "gauge", TIER, "Bytes that a model gets back when it needs them.", _shares),
    Metric("stratakv_ram_held_bytes", "gauge", MODEL, "Bytes of RAM that a model holds, free slots included.", _held),
    Metric(
        "stratakv_ram_free_bytes", "gauge", (), "Bytes of RAM in no block.", _one(lambda status: status.ram_free_bytes)
    ),
    Metric(
        "stratakv_ram_largest_free_bytes",
        "gauge",
        (),
        "The longest run of them in one piece.",
        _one(lambda status: status.ram_largest_free_bytes),
    ),
    Metric(
        "stratakv_ram_fragmentation_ratio",
        "gauge",
        (),
        "How much of the free RAM is not in its longest run.",
        _fragmentation,
    ),
    # What comes and goes.
    Metric("stratakv_put_blocks_total", "counter", MODEL, "New blocks that were put.", _model(lambda s: s.put_blocks)),
    Metric(
        "stratakv_put_refused_blocks_total",
        "counter",
        MODEL,
        "Blocks of puts that found no room.",
        _model(lambda s: s.put_refused_blocks),
    ),
    Metric(
        "stratakv_put_over_quota_blocks_total",
        "counter",
        MODEL,
        "Of those, blocks that a quota did not let in.",
        _model(lambda s: s.put_over_quota_blocks),
    ),
    Metric(
        "stratakv_evicted_blocks_total",
        "counter",
        TIER,
        "Blocks that had to leave a tier.",
        _tier(lambda t: t.evicted_blocks),
    ),
    Metric(
        "stratakv_demoted_blocks_total",
        "counter",
        MODEL,
        "Blocks written to SSD.",
        _model(lambda s: s.demoted_blocks),
    ),
    Metric(
        "stratakv_reinserted_blocks_total",
        "counter",
        MODEL,
        "Blocks written there once more, since they were asked for and their segment had to leave.",
        _model(lambda s: s.reinserted_blocks),
    ),
    Metric(
        "stratakv_demotions_dropped_blocks_total",
        "counter",
        MODEL,
        "Blocks that left RAM before they could be written to SSD.",
        _model(lambda s: s.demotions_dropped_blocks),
    ),
    Metric(
        "stratakv_promoted_blocks_total",
        "counter",
        MODEL,
        "Blocks copied up from SSD to RAM.",
        _model(lambda s: s.promoted_blocks),
    ),
    Metric(
        "stratakv_dropped_blocks_total",
        "counter",
        MODEL,
        "Blocks that were forgotten since their namespace was dropped.",
        _model(lambda s: s.dropped_blocks),
    ),
    Metric(
        "stratakv_residence_seconds",
        "histogram",
        ("tier",),
        "How long blocks had been in a tier when they left it; one block in 16.",
        _histogram(lambda t: t.residence),
    ),
    Metric(
        "stratakv_reuse_gap_seconds",
        "histogram",
        ("tier",),
        "Time between two matches of a block, by where it was found; one block in 16.",
        _histogram(lambda t: t.reuse_gap),
    ),
    Metric(
        "stratakv_lifted_bytes_total",
        "counter",
        ("by",),
        "Bytes brought to RAM ahead of requests: at a warm start, or since they are near to a prompt.",
        _lifted,
    ),
    Metric(
        "stratakv_lifted_hit_bytes_total",
        "counter",
        ("by",),
        "Of those, bytes that a match asked for since.",
        _lifted_hit,
    ),
    # Bytes and seconds.
    Metric(
        "stratakv_path_bytes_total",
        "counter",
        ("model", "path"),
        "Bytes that went a way: put and load copy to and from tensors, the others are behind them.",
        _path(0),
    ),
    Metric(
        "stratakv_path_seconds_total",
        "counter",
        ("model", "path"),
        "Seconds that took; of encoding and decoding over all threads.",
        _path(1),
    ),
    Metric(
        "stratakv_ssd_written_bytes_total",
        "counter",
        MODEL,
        "Bytes written to SSD.",
        _model(lambda s: s.tiers["ssd"].written_bytes),
    ),
    Metric(
        "stratakv_ssd_rewritten_bytes_total",
        "counter",
        MODEL,
        "Of those, bytes that were no block's first record: all of them by the rest is the write amplification.",
        _model(lambda s: s.tiers["ssd"].rewritten_bytes),
    ),
    Metric(
        "stratakv_ssd_file_bytes",
        "gauge",
        (),
        "Bytes that the SSD tier's files take.",
        _one(lambda status: status.ssd_file_bytes),
    ),
    Metric(
        "stratakv_remote_read_bytes_total",
        "counter",
        ("tier",),
        "Bytes of records that came from the tier that nodes share.",
        _shared(lambda stats: stats.read_bytes),
    ),
    Metric(
        "stratakv_remote_written_bytes_total",
        "counter",
        ("tier",),
        "Bytes of records that went there.",
        _shared(lambda stats: stats.written_bytes),
    ),
    Metric("stratakv_catalog_rows_total", "counter", (), "Rows of blocks written to the catalog.", _rows),
    # What goes wrong.
    Metric(
        "stratakv_corrupt_blocks_total",
        "counter",
        MODEL,
        "Records that failed their checks: misses, never wrong bytes.",
        _model(lambda s: s.corrupt_blocks),
    ),
    Metric(
        "stratakv_io_errors_total",
        "counter",
        MODEL,
        "Reads and writes of the SSD that failed.",
        _model(lambda s: s.io_errors),
    ),
    Metric(
        "stratakv_not_encodable_blocks_total",
        "counter",
        MODEL,
        "Blocks that were to be encoded and stayed as they are: values that fit no scale.",
        _model(lambda s: s.not_encodable_blocks),
    ),
    Metric(
        "stratakv_breaker_state",
        "gauge",
        ("tier",),
        "Of a server: 0 it is asked, 1 it is not, since it does not answer, 0.5 it is tried again.",
        _breakers,
    ),
    Metric("stratakv_breaker_opened_total", "counter", ("tier",), "How often the breaker opened.", _opened),
    Metric(
        "stratakv_calls_total",
        "counter",
        ("tier", "result"),
        "Calls of a server: answered, errors, timeouts, or refused since the breaker was open.",
        _calls,
    ),
    Metric(
        "stratakv_degraded", "gauge", ("mode",), "1: the store runs without something it is configured with.", _degraded
    ),
    Metric(
        "stratakv_ssd_read_only",
        "gauge",
        (),
        "1: the SSD takes no writes at present.",
        _one(lambda status: status.ssd_read_only is not None),
    ),
    # How full it is inside.
    Metric("stratakv_queue_depth", "gauge", ("queue",), "Blocks, rows, or prompts that wait to be written.", _queues),
    Metric(
        "stratakv_index_blocks",
        "gauge",
        (),
        "Blocks in the index.",
        _one(lambda status: status.index_blocks),
    ),
    Metric(
        "stratakv_index_refused_blocks_total",
        "counter",
        (),
        "Blocks that were not stored because the index was full.",
        _one(lambda status: status.index_refused_blocks),
    ),
    # By tenant.
    Metric(
        "stratakv_tenant_asked_blocks_total",
        "counter",
        TENANT,
        "As stratakv_asked_blocks_total, by tenant over all models.",
        _tenant(lambda s: s.asked_blocks),
    ),
    Metric(
        "stratakv_tenant_hit_blocks_total",
        "counter",
        TENANT,
        "As stratakv_hit_blocks_total, by tenant over all models.",
        _tenant(lambda s: s.hit_blocks),
    ),
    Metric(
        "stratakv_tenant_used_bytes",
        "gauge",
        ("tenant", "tier"),
        "As stratakv_used_bytes, by tenant over all models.",
        _tenant_bytes,
    ),
    Metric("stratakv_info", "gauge", ("version", "ssd_io", "ssd_engine", "ram_pages"), "Always 1.", _info),
)


class Collector:
    """Reads all metrics of a store. Any thread may use it."""

    def __init__(self, view: Callable[[], View]) -> None:
        """`view`: of the store, at one instant."""
        self._view = view
        self._lock = threading.Lock()
        # Models that have names of their own.
        self._models: set[str] = set()

    def families(self) -> list[Family]:
        """All metrics at one instant, with at most as many values of a label as are allowed.

        Raises:
            ClosedError: the store is closed.
        """
        view = self._view()
        there = view.snapshot.models
        with self._lock:
            # Whoever is gone leaves its name to others.
            self._models &= there.keys()
            new = (name for name in there if name not in self._models)
            self._models |= set(itertools.islice(new, MOST_MODELS - len(self._models)))
            known = frozenset(self._models | {""})
        return [_folded(metric, view, known) for metric in METRICS]


def _folded(metric: Metric, view: View, models: frozenset[str]) -> Family:
    """A metric's samples; models without a name of their own are added up, and ratios of these left out."""
    by_model = "model" in metric.labels
    at = metric.labels.index("model") if by_model else 0
    samples: dict[Labels, float | Histogram] = {}
    for labels, value in metric.read(view):
        folded = labels
        if by_model and labels[at] not in models:
            if metric.name.endswith("_ratio"):
                continue
            folded = (*labels[:at], OTHER, *labels[at + 1 :])
        before = samples.get(folded)
        samples[folded] = value if before is None else before + value  # type: ignore[operator]  # of one kind
    return Family(metric, samples)


def table() -> str:
    """All metrics as a table of the docs."""
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(m.labels)} | {m.help} |" for m in METRICS]
    return "\n".join(["| metric | kind | labels | |", "|---|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(table(), end="")
