"""What is counted, and what is said of one match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Bytes decoded from a tier before anything is said of what that costs.
_TOLD_FROM = 64 << 20


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often something lasted how long.

    Attributes:
        bounds: seconds, rising.
        counts: how often it was at most as long as each bound and longer than the one before; at last, how often longer
            than all.
        sum: seconds of all together.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @classmethod
    def of(cls, row: tuple[Iterable[float], Iterable[int], float]) -> Histogram:
        """One of a native snapshot."""
        bounds, counts, total = row
        return cls(tuple(bounds), tuple(counts), total)

    def __add__(self, other: Histogram) -> Histogram:
        """Both together, of equal bounds."""
        counts = tuple(one + more for one, more in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.sum + other.sum)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier's share of the work.

    In a load, every block is asked of RAM first; what RAM misses is asked of SSD. ``asked = hit + miss`` holds exactly.

    Attributes:
        asked_blocks: blocks asked of the tier.
        hit_blocks: blocks it delivered.
        miss_blocks: blocks it did not have, or could not deliver.
        blocks: blocks it holds now.
        used_bytes: bytes they take, headers and padding included; ``in = out + used`` holds exactly.
        in_bytes: bytes of blocks that came to the tier, from wherever.
        out_bytes: bytes of blocks that left it, for whatever reason.
        plain_bytes: bytes they would take if none were encoded.
        evicted_blocks: blocks that had to leave.
        residence: of one block in sixteen, seconds in the tier, when it left for whatever reason.
        reuse_gap: of one block in sixteen, seconds between two matches that found it, here at the second.
        encoded_bytes: payload bytes that were encoded for the tier.
        decoded_bytes: payload bytes that were decoded from it.
        written_bytes: bytes that were written to its device.
        rewritten_bytes: those of them that were no block's first record: records once more, headers and footers.
        read_bytes: bytes of records that were read from its device.
        saved_bytes: bytes that were not, because records were encoded.
        encode_s: seconds spent on encoding, over all threads.
        decode_s: seconds spent on decoding, over all threads.
        read_s: seconds from the first read of each load to its last.
    """

    asked_blocks: int
    hit_blocks: int
    miss_blocks: int
    blocks: int
    used_bytes: int
    in_bytes: int
    out_bytes: int
    plain_bytes: int
    evicted_blocks: int
    residence: Histogram
    reuse_gap: Histogram
    encoded_bytes: int
    decoded_bytes: int
    written_bytes: int
    rewritten_bytes: int
    read_bytes: int
    saved_bytes: int
    encode_s: float
    decode_s: float
    read_s: float

    @property
    def write_amplification(self) -> float:
        """Bytes written to its device for each byte of a block's first record; 1 before the first."""
        first = self.written_bytes - self.rewritten_bytes
        return self.written_bytes / first if first else 1.0

    @property
    def ratio(self) -> float:
        """How many times more blocks the tier holds than it would if none were encoded; 1 when it is empty."""
        return self.plain_bytes / self.used_bytes if self.used_bytes else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters of one model, or of all, at one instant.

    Attributes:
        matches: matches made.
        asked_blocks: whole blocks asked for by matches; ``asked = hit + miss`` holds exactly.
        hit_blocks: blocks of them that were cached.
        miss_blocks: blocks of them that were not.
        missed: those by why the first of their match was not; every reason that this node gives is there.
        loads: loads made.
        load_s: seconds that they took.
        unloaded: blocks that a load asked for and did not deliver, by why the first of them was not; as ``missed``.
        loaded_tokens: tokens loaded, that is prefill saved.
        loaded_bytes: payload bytes loaded.
        prefill_saved_s: seconds that computing the loaded tokens would have taken, where the model's rate was known.
        puts: puts made.
        put_s: seconds that they took, but for the hashing of tokens.
        put_blocks: blocks put that were new.
        put_bytes: payload bytes of those.
        put_refused_blocks: blocks of puts that found no room.
        put_over_quota_blocks: those of them that a quota did not let in.
        demoted_blocks: blocks written to SSD.
        reinserted_blocks: blocks written there once more: asked for since, and their segment had to leave.
        encoded_blocks: blocks that were encoded, when they were put or on their way to SSD.
        not_encodable_blocks: blocks that were to be encoded, and stayed as they are: values that fit no scale.
        demotions_dropped_blocks: blocks that left RAM before they could be written to SSD.
        promoted_blocks: blocks copied up from SSD to RAM.
        dropped_blocks: blocks that were forgotten, since they were dropped, or their model was unregistered or retired.
        corrupt_blocks: records that failed their checks.
        io_errors: reads and writes of the SSD that failed.
        not_worth_it_loads: loads that ended where reading on takes longer than computing.
        tiers: per tier, by name.
    """

    matches: int
    asked_blocks: int
    hit_blocks: int
    miss_blocks: int
    missed: Mapping[str, int]
    loads: int
    load_s: float
    unloaded: Mapping[str, int]
    loaded_tokens: int
    loaded_bytes: int
    prefill_saved_s: float
    puts: int
    put_s: float
    put_blocks: int
    put_bytes: int
    put_refused_blocks: int
    put_over_quota_blocks: int
    demoted_blocks: int
    reinserted_blocks: int
    encoded_blocks: int
    not_encodable_blocks: int
    demotions_dropped_blocks: int
    promoted_blocks: int
    dropped_blocks: int
    corrupt_blocks: int
    io_errors: int
    not_worth_it_loads: int
    tiers: Mapping[str, TierStats]

    @property
    def hit_ratio(self) -> float:
        """Blocks found over blocks asked for, 0..1; 0 before the first match."""
        return self.hit_blocks / self.asked_blocks if self.asked_blocks else 0.0

    @property
    def advice(self) -> tuple[str, ...]:
        """Where decoding costs more than it saves, in sentences; none before 64 MiB of a tier were decoded.

        From SSD it saves the reading of the bytes that are not there. From RAM it saves reads from SSD, of those blocks
        that RAM would not hold if they were plain; without reads from SSD nothing is known, and nothing is said.
        """
        found = []
        ram, ssd = self.tiers["ram"], self.tiers["ssd"]
        if ssd.decoded_bytes >= _TOLD_FROM and ssd.read_bytes:
            saved_s = ssd.saved_bytes * ssd.read_s / ssd.read_bytes
            if ssd.decode_s > saved_s:
                found.append(
                    f"decoding from ssd took {ssd.decode_s:.3g} s and saved {saved_s:.3g} s of reading: "
                    f"set_cold_codec('none'), unless it is for the room"
                )
        delivered = ssd.read_bytes + ssd.saved_bytes
        if ram.decoded_bytes >= _TOLD_FROM and delivered and ram.ratio > 1:
            otherwise_s = ram.decoded_bytes * (1 - 1 / ram.ratio) * (ssd.read_s + ssd.decode_s) / delivered
            if ram.decode_s > otherwise_s:
                found.append(
                    f"decoding from ram took {ram.decode_s:.3g} s and saved {otherwise_s:.3g} s of ssd: "
                    f"set_ram_codec('none')"
                )
        return tuple(found)

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Stats:
        """The counters of a native snapshot."""
        timed = ("residence", "reuse_gap")
        tiers = {
            name: TierStats(**{**row, **{each: Histogram.of(row[each]) for each in timed}})
            for name, row in counts["tiers"].items()
        }
        return cls(**{**counts, "tiers": tiers})


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStats:
    """How the GPU tier is.

    Attributes:
        device: its name.
        capacity_bytes: memory of it that the tier has.
        taken_blocks: places that were given to blocks there.
        fresh_blocks: those of them where no block had been before.
        held_blocks: blocks that loads under way hold there.
        reservations: how often the driver was asked for memory; once it serves, never again.
        refused: how often it did not do what it was asked for.
        failed: why the tier serves no more; ``None``: it does.
    """

    device: str
    capacity_bytes: int
    taken_blocks: int
    fresh_blocks: int
    held_blocks: int
    reservations: int
    refused: int
    failed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A stored prefix that is near to a prompt.

    Attributes:
        name: names it, 32 hex digits, as in the catalog.
        tokens: its length.
        score: how near it is: the cosine of the angle between the two, up to 1.
    """

    name: str
    tokens: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftStats:
    """What became of blocks that were brought to RAM ahead of requests.

    Attributes:
        bytes: bytes that they took there.
        hit_bytes: bytes of those that a match asked for since.
    """

    bytes: int
    hit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All counters at one instant: ``total`` is the sum over the tenants, and over the models and those before.

    Attributes:
        total: all together, models that were unregistered included.
        models: those registered, by name.
        tenants: over all models, by name, in the order in which they were seen; ``""`` is no tenant, ``tag:...`` one
            that was found on SSD and has not been seen since. What belongs to no block, as the header of a segment,
            counts for no tenant.
    """

    total: Stats
    models: Mapping[str, Stats]
    tenants: Mapping[str, Stats]

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Snapshot:
        """The counters of a native snapshot."""
        models, tenants = (
            {name: Stats.of(row) for name, row in counts[kind].items()} for kind in ("models", "tenants")
        )
        return cls(total=Stats.of(counts["total"]), models=models, tenants=tenants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a match found, what its load delivered, and why not more.

    Attributes:
        asked_tokens: tokens asked for.
        matched_tokens: leading tokens found, whole blocks only.
        loaded_tokens: tokens valid after the last load; ``None`` before one.
        blocks: the tier of each block: after a load where it was read from, before it where it was found.
        reason: why no more, as ``never_stored``, ``evicted``, ``corrupt``, ``io_error``, ``dropped``, ``closed``,
            ``not_worth_it`` or ``quota``, or of the tier that nodes share ``timeout`` or ``error``; ``None`` when every
            whole block was found and loaded.
    """

    asked_tokens: int
    matched_tokens: int
    loaded_tokens: int | None
    blocks: tuple[str, ...]
    reason: str | None

    def __str__(self) -> str:
        """One sentence."""
        places = ", ".join(f"{self.blocks.count(tier)} in {tier}" for tier in dict.fromkeys(self.blocks))
        found = f"{self.matched_tokens} of {self.asked_tokens} tokens matched"
        blocks = f" ({len(self.blocks)} blocks: {places})" if self.blocks else ""
        loaded = "" if self.loaded_tokens is None else f", {self.loaded_tokens} loaded"
        return found + blocks + loaded + (f"; no more because: {self.reason}" if self.reason else "")
