"""Why a prompt hits or misses: block by block where it is or why it is not, what that costs, and what a load would do.

Nothing of it counts as a use: whoever asks why changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stratakv.cache import Registered
from stratakv.tiers.dragonfly import Dragonfly

__all__ = ["Explained", "Stretch", "explain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Neighbouring blocks of which all of this holds.

    Attributes:
        first: number of the first block, from 0.
        blocks: how many.
        places: the tiers that have each of them: ``gpu``, ``ram``, ``ssd``, ``dragonfly``.
        reason: why no tier has them, as of a match; ``None``: one has.
        load_s: seconds that loading them from the tier that would be asked takes, as measured of late; ``None``: not
            known, or from RAM, which is always worth it. The GPU tier is asked for tensors on the device alone.
        compute_s: seconds that computing them takes; ``None``: the model's rate is not known.
        decision: what a load would do: ``load``, also over what is slow where what follows makes up for it; ``compute``
            since that is quicker; or ``miss``: what is not there, or comes behind what is not.
    """

    first: int
    blocks: int
    places: tuple[str, ...]
    reason: str | None
    load_s: float | None
    compute_s: float | None
    decision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What is known of a prompt.

    Attributes:
        model: name of the model.
        asked_tokens: tokens of the prompt.
        block_tokens: tokens of a block.
        loaded_tokens: leading tokens that a load would bring.
        stretches: all whole blocks, in order.
    """

    model: str
    asked_tokens: int
    block_tokens: int
    loaded_tokens: int
    stretches: tuple[Stretch, ...]

    def row(self) -> dict[str, Any]:
        """What JSON takes."""
        return asdict(self)

    def __str__(self) -> str:
        """A line for each stretch."""
        out = [f"{self.model}: {self.loaded_tokens} of {self.asked_tokens} tokens would be loaded"]
        for each in self.stretches:
            last = each.first + each.blocks - 1
            where = "+".join(each.places) if each.places else f"nowhere ({each.reason})"
            costs = [
                f"{what} {1e3 * seconds:.3g} ms"
                for what, seconds in (("load", each.load_s), ("compute", each.compute_s))
                if seconds is not None
            ]
            out.append(f"  blocks {each.first}-{last}: {where}, {', '.join([*costs, each.decision])}")
        if rest := self.asked_tokens % self.block_tokens:
            out.append(f"  last {rest} tokens: no whole block, computed")
        return "\n".join(out)


def explain(
    entry: Registered, dragonfly: Dragonfly | None, tokens: object, adapter: str = "", tenant: str = ""
) -> Explained:
    """Explains a prompt.

    Args:
        entry: of the model.
        dragonfly: the tier that nodes share, if there is one.
        tokens: as of `ModelCache.match`.
        adapter: as there.
        tenant: as there.

    Raises:
        InputError: the tokens are no token ids.
        ClosedError: the store is closed.
    """
    cache, model = entry.cache, entry.model
    sequence = cache.sequence(tokens, adapter=adapter, tenant=tenant)
    names = cache.names(sequence)
    size = entry.geometry.block_tokens
    places = model.places(names)
    here = next((n for n, place in enumerate(places) if not place), len(names))
    there = 0
    if dragonfly is not None and names:
        there = dragonfly.leading(model.fingerprint + model.space(adapter, tenant), names, here)[0]
    reasons: Sequence[str] = model.missing(sequence)
    rate, read_s = model.prefill_rate(), model.read_s()

    def computed_s(blocks: int) -> float | None:
        return None if rate is None else blocks * size / rate

    def fetched_s(blocks: int) -> float | None:
        return None if dragonfly is None else dragonfly.cost.seconds(model.record_bytes * blocks)

    # What is elsewhere comes to RAM first, if that is worth it; then a load goes as far as saves most time.
    takes_s, saves_s = fetched_s(there), computed_s(there)
    slow = takes_s is not None and saves_s is not None and takes_s > saves_s
    reads, loaded = model.weigh(names[:here], 0 if slow else there)

    def row(n: int) -> tuple[tuple[str, ...], str | None, str]:
        local = [tier for bit, tier in ((4, "gpu"), (1, "ram"), (2, "ssd")) if places[n] & bit]
        where = tuple(local or (["dragonfly"] if n < here + there else []))
        decision = "load" if n < loaded else "compute" if n < here + there else "miss"
        return where, None if where else reasons[n], decision

    out: list[Stretch] = []
    first = 0
    for (where, reason, decision), group in itertools.groupby(map(row, range(len(names)))):
        blocks = len(list(group))
        load_s = fetched_s(blocks) if where == ("dragonfly",) else None
        if "ssd" in where and "ram" not in where and read_s is not None and first + blocks <= len(reads):
            load_s = read_s * sum(reads[first : first + blocks])
        out.append(
            Stretch(
                first=first,
                blocks=blocks,
                places=where,
                reason=reason,
                load_s=load_s,
                compute_s=computed_s(blocks),
                decision=decision,
            )
        )
        first += blocks
    return Explained(
        model=cache.name,
        asked_tokens=len(sequence),
        block_tokens=size,
        loaded_tokens=loaded * size,
        stretches=tuple(out),
    )
