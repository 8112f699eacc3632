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
        places: the tiers that have each of them: ``ram``, ``ssd``, ``dragonfly``.
        reason: why no tier has them, as of a match; ``None``: one has.
        load_s: seconds that loading them from the tier that would be asked takes, as measured of late; ``None``: not
            known, or from RAM, which is always worth it.
        compute_s: seconds that computing them takes; ``None``: the model's rate is not known.
        decision: what a load would do: ``load``, ``compute`` since that is quicker, or ``miss``: what is not there, or
            comes behind what is not.
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
    size, record_bytes = entry.geometry.block_tokens, model.record_bytes
    places = model.places(names)
    shared = 0
    if dragonfly is not None and names:
        here = next((n for n, place in enumerate(places) if not place), len(names))
        space = model.fingerprint + model.space(adapter, tenant)
        shared = here + dragonfly.leading(space, names, here)[0]
    reasons: Sequence[str] = model.missing(sequence)
    rate, read_s = model.prefill_rate(), model.read_s()

    def where(n: int) -> tuple[str, ...]:
        local = [tier for bit, tier in ((1, "ram"), (2, "ssd")) if places[n] & bit]
        return tuple([*local, "dragonfly"] if not local and n < shared else local)

    rows = [(where(n), None if where(n) else reasons[n]) for n in range(len(names))]
    out: list[Stretch] = []
    reached = True
    first = 0
    for (tiers, reason), group in itertools.groupby(rows):
        blocks = len(list(group))
        compute_s = None if rate is None else blocks * size / rate
        load_s = None
        if tiers and tiers[0] == "ssd" and read_s is not None:
            load_s = read_s * record_bytes * blocks
        elif tiers and tiers[0] == "dragonfly" and dragonfly is not None:
            load_s = dragonfly.cost.seconds(record_bytes * blocks)
        reached = reached and bool(tiers)
        decision = "miss"
        if reached:
            slow = load_s is not None and compute_s is not None and load_s > compute_s
            decision = "compute" if slow else "load"
        out.append(
            Stretch(
                first=first,
                blocks=blocks,
                places=tiers,
                reason=reason,
                load_s=load_s,
                compute_s=compute_s,
                decision=decision,
            )
        )
        first += blocks
    # A load goes on over what is slow, where what follows makes up for it.
    best, saved_s, loaded = 0.0, 0.0, 0
    for each in out:
        if each.decision == "miss":
            break
        saved_s += (each.compute_s or 0.0) - (each.load_s or 0.0) if each.compute_s is not None else 0.0
        if saved_s >= best:
            best, loaded = saved_s, each.first + each.blocks
    return Explained(
        model=cache.name,
        asked_tokens=len(sequence),
        block_tokens=size,
        loaded_tokens=loaded * size,
        stretches=tuple(out),
    )
