"""How the capacity of a tier is divided between models: pure functions of what each of them claims.

A share is what a model gets back when it needs it; idle bytes are lent. Every division gives each model its floor, none
more than its limit, and all of the capacity unless limits forbid it.

`dynamic` puts bytes where they save most. What a share is worth comes from miss-ratio curves, and these are not
concave: a loop longer than its share hits nothing at all, so the next byte may be worth nothing and the next gigabyte
everything. Hence dynamic programming over steps of the capacity, as LAMA does for Memcached (Hu et al., ATC 2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from stratakv.config import Strategy
from stratakv.errors import InputError

# Steps in which `dynamic` divides a capacity.
STEPS = 64
# A division that gains less than this part of what the old one is worth is not made.
_WORTH_MOVING = 0.01
# Of the way to a better division so much is gone at a time.
_PACE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one model claims of a tier.

    Attributes:
        floor_bytes: what it has under any strategy.
        limit_bytes: what it may not pass; ``None``: all there is.
        priority: 1 to 10, what `priority` divides by.
        demand: what `proportional` divides by, in any unit: bytes that requests ask for, or a declared size.
        curve: what shares of 0, 1, ... `STEPS` steps of the capacity are worth to `dynamic`, in one unit for all
            models; it never falls.
    """

    floor_bytes: int = 0
    limit_bytes: int | None = None
    priority: int = 5
    demand: float = 0.0
    curve: tuple[float, ...] = ()


def divide(
    strategy: Strategy,
    capacity_bytes: int,
    claims: Mapping[str, Claim],
    held: Mapping[str, int] | None = None,
    *,
    step_bytes: int = 1,
) -> dict[str, int]:
    """Divides a capacity.

    Args:
        strategy: ``fair`` gives all the same, ``proportional`` by demand, ``priority`` by priority, ``dynamic`` what
            saves most; each within floors and limits.
        capacity_bytes: what is divided.
        claims: by model.
        held: the division before this one: `dynamic` keeps it where a better one gains less than a hundredth, and goes
            half of the way to it otherwise, so that noise in the curves moves little.
        step_bytes: shares are multiples of this; floors count as the next multiple, limits as the one before.

    Returns:
        Bytes of each model. Their sum is the capacity in whole steps, or what limits leave of it.

    Raises:
        InputError: an unknown strategy, a floor above its limit, floors above the capacity, a curve of another length.
    """
    if strategy not in get_args(Strategy):
        raise InputError(f"strategy is {strategy!r}, expected one of {', '.join(get_args(Strategy))}")
    _check(strategy, capacity_bytes, claims)
    steps = {name: _in_steps(claim, step_bytes) for name, claim in claims.items()}
    before = None if held is None else {name: held_bytes // step_bytes for name, held_bytes in held.items()}
    shares = _divide(strategy, capacity_bytes // step_bytes, steps, before)
    return {name: share * step_bytes for name, share in shares.items()}


def _in_steps(claim: Claim, step_bytes: int) -> Claim:
    limit = None if claim.limit_bytes is None else claim.limit_bytes // step_bytes
    floor = -(-claim.floor_bytes // step_bytes)
    return replace(claim, floor_bytes=floor if limit is None else min(floor, limit), limit_bytes=limit)


def _divide(
    strategy: Strategy, capacity: int, claims: Mapping[str, Claim], held: Mapping[str, int] | None
) -> dict[str, int]:
    if sum(claim.floor_bytes for claim in claims.values()) > capacity:
        # Only in whole steps: each gets what is nearest.
        claims = {name: replace(claim, floor_bytes=max(claim.floor_bytes - 1, 0)) for name, claim in claims.items()}
    if strategy == "fair":
        return _spread(capacity, claims, dict.fromkeys(claims, 1.0))
    if strategy == "proportional":
        return _spread(capacity, claims, {name: claim.demand for name, claim in claims.items()})
    if strategy == "priority":
        return _spread(capacity, claims, {name: float(claim.priority) for name, claim in claims.items()})
    best = _spread(capacity, claims, _steps(capacity, claims))
    if held is None or held.keys() != claims.keys():
        return best
    # What is held may be above a limit, or below a floor, that was changed since.
    old = _spread(capacity, claims, {name: float(held[name]) for name in claims})
    before, after = (worth(capacity, claims, shares) for shares in (old, best))
    if after - before < _WORTH_MOVING * before:
        return old
    between = {name: old[name] + (best[name] - old[name]) * _PACE for name in claims}
    return _spread(capacity, claims, between)


def worth(capacity_bytes: int, claims: Mapping[str, Claim], shares: Mapping[str, float]) -> float:
    """What a division is worth by the curves of the claims, in their unit; straight lines join their steps."""
    steps = np.arange(STEPS + 1) * (capacity_bytes / STEPS)
    return float(sum(np.interp(shares[name], steps, claim.curve) for name, claim in claims.items()))


def _check(strategy: str, capacity_bytes: int, claims: Mapping[str, Claim]) -> None:
    for name, claim in claims.items():
        if claim.limit_bytes is not None and claim.floor_bytes > claim.limit_bytes:
            floor, limit = claim.floor_bytes, claim.limit_bytes
            raise InputError(f"model {name!r}: a floor of {floor} bytes is above its limit, {limit}")
        if strategy == "dynamic" and len(claim.curve) != STEPS + 1:
            raise InputError(f"model {name!r}: a curve of {len(claim.curve)} values, expected {STEPS + 1}")
    floors = sum(claim.floor_bytes for claim in claims.values())
    if floors > capacity_bytes:
        raise InputError(f"floors of {floors} bytes in all are above the capacity of {capacity_bytes}; lower them")


def _spread(capacity_bytes: int, claims: Mapping[str, Claim], weights: Mapping[str, float]) -> dict[str, int]:
    """Shares by weight, within floors and limits; what limits leave over goes to the others alike."""
    shares = _level(capacity_bytes, claims, weights)
    if sum(shares.values()) < capacity_bytes:
        raised = {name: replace(claim, floor_bytes=shares[name]) for name, claim in claims.items()}
        shares = _level(capacity_bytes, raised, dict.fromkeys(claims, 1.0))
    return shares


def _level(capacity_bytes: int, claims: Mapping[str, Claim], weights: Mapping[str, float]) -> dict[str, int]:
    """Water-filling: the level at which weights times it, within floors and limits, make up the capacity."""
    if not claims:
        return {}
    floor = np.array([claim.floor_bytes for claim in claims.values()], np.float64)
    most = [capacity_bytes if claim.limit_bytes is None else claim.limit_bytes for claim in claims.values()]
    limit = np.minimum(np.array(most, np.float64), capacity_bytes)
    weight = np.maximum(np.array([weights[name] for name in claims], np.float64), 0.0)
    if not weight.any():
        weight[:] = 1.0
    weight /= weight.max()
    # So little is nothing in any capacity, and would only lose the others' digits.
    weight[weight < 1e-15] = 0.0
    low, high = 0.0, capacity_bytes / weight[weight > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(weight * middle, floor, limit).sum() <= capacity_bytes:
            low = middle
        else:
            high = middle
    exact = np.clip(weight * low, floor, limit)
    shares = np.floor(exact + 1e-6).astype(np.int64)
    # The bytes that rounding left, at most a few a model, go one by one to those that lost most by it.
    order = np.argsort(shares - exact, kind="stable")
    open_ = [n for n in order if weight[n] > 0 and exact[n] < limit[n]]
    for turn in range(int(min(capacity_bytes - shares.sum(), 4 * len(open_)))):
        n = open_[turn % len(open_)]
        shares[n] += shares[n] < limit[n]
    return dict(zip(claims, map(int, shares), strict=True))


def _steps(capacity_bytes: int, claims: Mapping[str, Claim]) -> dict[str, float]:
    """How many steps of the capacity each model gets for the most worth in all, by dynamic programming."""
    unit = capacity_bytes / STEPS or 1.0
    fair = STEPS / max(len(claims), 1)
    top = max((claim.curve[-1] for claim in claims.values()), default=0.0) or 1.0
    steps = np.arange(STEPS + 1)
    best, choices = np.full(STEPS + 1, -np.inf), []
    best[0] = 0.0
    for claim in claims.values():
        least = int(claim.floor_bytes / unit)
        most = STEPS if claim.limit_bytes is None else min(STEPS, -int(-claim.limit_bytes // unit))
        # Of equal ones the more even: an idle model keeps its share until another has a use for it.
        value = np.array(claim.curve) - 1e-9 * top * ((steps - fair) / STEPS) ** 2
        value[:least], value[most + 1 :] = -np.inf, -np.inf
        # By what all have so far and what this one has.
        table = np.full((STEPS + 1, STEPS + 1), -np.inf)
        for used in steps:
            table[used, : used + 1] = best[used::-1] + value[: used + 1]
        choices.append(table.argmax(axis=1))
        best = table.max(axis=1)
    left, found = int(np.argmax(best)), {}
    for name, choice in zip(reversed(list(claims)), reversed(choices), strict=True):
        found[name] = float(choice[left])
        left -= int(choice[left])
    return found
