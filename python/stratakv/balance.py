"""Divides the tiers between models while they serve: looks at what each was asked for, asks the policies, applies.

The policies are pure functions, in `allocation` and `victims`. What they divide are shares: what a model gets back when
it needs it. Bytes move behind that, in the native half, when somebody has a use for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from stratakv import _native
from stratakv.allocation import STEPS, Claim, divide
from stratakv.config import Geometry, ModelsConfig, Quota
from stratakv.quotas import Tier, bounds
from stratakv.victims import Heat, order

_TIERS: tuple[Tier, ...] = ("ram", "ssd")


class Registered(Protocol):
    """A registered model, as far as dividing goes."""

    @property
    def model(self) -> _native.Model:
        """Its native half."""

    @property
    def geometry(self) -> Geometry:
        """Shape of its blocks."""

    @property
    def priority(self) -> int:
        """1 to 10."""

    @property
    def quota(self) -> Quota:
        """What it may have."""

    @property
    def weights_bytes(self) -> int:
        """Declared size of its weights."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast it is computed, if that is known."""


@dataclass(slots=True)
class _Load:
    """What a model was asked for: the counter at the last look; blocks, those of long ago counting less; and when."""

    asked_blocks: int
    blocks: float
    used_at: float


class Balance:
    """Applies the policies to one store."""

    def __init__(self, config: ModelsConfig, store: _native.Store, segment_bytes: int) -> None:
        """Of a store whose SSD segments have this size. It has divided nothing yet."""
        self.config = config
        self.shares: dict[Tier, dict[str, int]] = {tier: {} for tier in _TIERS}
        self._store = store
        self._segment_bytes = segment_bytes
        self._loads: dict[str, _Load] = {}
        self._looked_at: float | None = None
        self._turn = 0

    def rebalance(self, models: Mapping[str, Registered], now: float) -> None:
        """Looks at what was asked for, and divides anew.

        Args:
            models: those registered, by name.
            now: seconds of a clock that does not go back.

        Raises:
            ClosedError: the store is closed.
        """
        counts = self._store.snapshot(0)["models"]
        self._look({name: counts[name]["asked_blocks"] for name in models}, now)
        room = self._store.divisible()
        n = max(len(models), 1)
        heads = n * room[3]
        parts: dict[Tier, tuple[int, int]] = {
            "ram": (room[0], room[1]),
            "ssd": (max(room[2] - heads, 0) if room[2] else 0, self._segment_bytes),
        }
        held: dict[str, Heat] = {name: self._heat(name, counts[name], now) for name in models}
        for tier, (capacity, step) in parts.items():
            claims = {
                name: self._claim(name, model, tier, counts[name]["tiers"][tier], capacity, step, n, now)
                for name, model in models.items()
            }
            least = {name: -(-model.model.record_bytes // step) * step for name, model in models.items()}
            reserved = {name: bounds(model.quota.limits(tier), 0, None, step)[0] for name, model in models.items()}
            self.shares[tier] = self._divide(tier, capacity, claims, least, reserved, step)
            if tier == "ram":
                held = {
                    name: replace(heat, loss=_loss(claims[name], capacity, self.shares[tier][name]))
                    for name, heat in held.items()
                }
        payers = order(self.config.victims, held, self._turn)
        self._turn += 1
        head = room[3] if room[2] else 0
        self._store.divide(
            [(models[name].model, self.shares["ram"][name], self.shares["ssd"][name] + head) for name in payers]
        )

    def _divide(
        self,
        tier: Tier,
        capacity: int,
        claims: Mapping[str, Claim],
        least: Mapping[str, int],
        reserved: Mapping[str, int],
        step: int,
    ) -> dict[str, int]:
        if sum(claim.floor_bytes for claim in claims.values()) > capacity:
            # Blocks that are large beside the tier: what is reserved, and room for one of each, come before all.
            some = {name: max(least[name], reserved[name]) for name in claims}
            claims = {name: _with_floor(claim, some[name]) for name, claim in claims.items()}
        if sum(claim.floor_bytes for claim in claims.values()) > capacity:
            # Not all can have something at once: but for what is reserved, they take turns.
            shares, left = {}, capacity // step * step
            for name in claims:
                shares[name] = min(reserved[name] // step * step, left)
                left -= shares[name]
            return shares
        return divide(self.config.strategy, capacity, claims, self.shares[tier], step_bytes=step)

    def _look(self, asked: Mapping[str, int], now: float) -> None:
        elapsed = 0.0 if self._looked_at is None else max(now - self._looked_at, 0.0)
        self._looked_at = now
        factor = 0.5 ** (elapsed / self.config.half_life_s)
        self._store.age_curves(factor)
        for gone in self._loads.keys() - asked.keys():
            del self._loads[gone]
        for name, blocks in asked.items():
            load = self._loads.setdefault(name, _Load(0, 0.0, now))
            # A model that was registered anew begins at zero.
            new = blocks - load.asked_blocks if blocks >= load.asked_blocks else blocks
            load.asked_blocks, load.blocks = blocks, load.blocks * factor + new
            if new:
                load.used_at = now

    def _heat(self, name: str, counts: Mapping[str, dict[str, dict[str, int]]], now: float) -> Heat:
        load = self._loads[name]
        held = counts["tiers"]["ram"]["used_bytes"]
        return Heat(idle_s=now - load.used_at, blocks=load.blocks, held_bytes=held)

    def _claim(
        self,
        name: str,
        model: Registered,
        tier: Tier,
        counts: Mapping[str, int],
        capacity: int,
        step: int,
        models: int,
        now: float,
    ) -> Claim:
        config, load, geometry = self.config, self._loads[name], model.geometry
        fair = capacity // models
        record = model.model.record_bytes
        floor = max(int(config.floor * fair) // step * step, -(-record // step) * step)
        demand = {
            "bytes": load.blocks * geometry.block_bytes,
            "weights": float(model.weights_bytes),
            "token_bytes": float(geometry.token_bytes),
        }
        block_bytes = counts["used_bytes"] / counts["blocks"] if counts["blocks"] else record
        # So many whole blocks a step has room for.
        block_bytes = step / (step // block_bytes) if block_bytes <= step else block_bytes
        curve: tuple[float, ...] = ()
        if config.strategy == "dynamic" or config.victims == "utility":
            _, hits = model.model.curve([n * capacity / STEPS / block_bytes for n in range(STEPS + 1)])
            value = self._block_value(model)
            curve = tuple(hit * value for hit in hits)
        idle = config.idle_s and now - load.used_at >= config.idle_s
        floor, limit = bounds(model.quota.limits(tier), floor, floor if idle else None, step)
        return Claim(
            floor_bytes=floor,
            limit_bytes=limit,
            priority=model.priority,
            demand=demand[config.demand],
            curve=curve,
        )

    def _block_value(self, model: Registered) -> float:
        geometry = model.geometry
        if self.config.objective == "bytes":
            return float(geometry.block_bytes)
        if self.config.objective == "tokens" or not model.prefill_tokens_per_s:
            return float(geometry.block_tokens)
        return geometry.block_tokens / model.prefill_tokens_per_s


def _with_floor(claim: Claim, floor_bytes: int) -> Claim:
    """The same, with another floor, as far as its limit allows."""
    most = floor_bytes if claim.limit_bytes is None else min(floor_bytes, claim.limit_bytes)
    return replace(claim, floor_bytes=most)


def _loss(claim: Claim, capacity: int, share: int) -> float:
    """What a model loses for each byte less, by its curve."""
    if not claim.curve or not capacity:
        return 0.0
    step = capacity / STEPS
    at = np.interp([max(share - step, 0.0), share], np.arange(STEPS + 1) * step, claim.curve)
    return float(at[1] - at[0]) / step
