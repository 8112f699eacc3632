"""What quotas mean for policy: pure functions of quotas and of what is used.

The native half keeps hard limits and tenants' reserves, at every instant. Here stands what a division owes them,
whether they can all be kept at once, and what a prompt that comes next may expect.

    0 ──── reserved ──────── soft ──────── hard
      not taken for others │ its own     │ lent: goes first when others need room  │ never
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from stratakv.config import Limits, Quota
from stratakv.errors import InputError

Tier = Literal["ram", "ssd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a model or a tenant uses.

    Attributes:
        ram_bytes: bytes of its blocks in RAM, those that are being put among them.
        ssd_bytes: of a tenant, bytes of its records on SSD, those that are being written among them; of a model, bytes
            of its file.
        tokens_left: new tokens that may be stored at once; ``None``: there is no such limit.
        loads: loads under way.
    """

    ram_bytes: int = 0
    ssd_bytes: int = 0
    tokens_left: int | None = None
    loads: int = 0

    @classmethod
    def of(cls, row: tuple[int, int, int | None, int]) -> Usage:
        """What the native half tells, in the order of the fields."""
        ram_bytes, ssd_bytes, tokens_left, loads = row
        return cls(ram_bytes=ram_bytes, ssd_bytes=ssd_bytes, tokens_left=tokens_left, loads=loads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What quotas let a prompt do at this moment.

    Attributes:
        tokens: leading tokens that would be stored, whole blocks only.
        may_load: whether one more load may begin.
        reason: what limits it most, in a sentence; ``None``: nothing does.
    """

    tokens: int
    may_load: bool
    reason: str | None


def admit(tokens: int, block_tokens: int, block_bytes: int, accounts: Mapping[str, tuple[Quota, Usage]]) -> Admission:
    """What quotas let a prompt of new tokens do.

    Whoever is at its hard limit makes room of its own, so what counts is whether the prompt fits at all.

    Args:
        tokens: new tokens that are to be stored.
        block_tokens: tokens of a block.
        block_bytes: bytes that one takes in RAM.
        accounts: quota and usage of all that the prompt is counted for: its model and its tenant, by what to call them.
    """
    whole = tokens // block_tokens
    blocks, may_load, reason = whole, True, None
    for who, (quota, usage) in accounts.items():
        limits = []
        hard = quota.limits("ram").hard_bytes
        if hard is not None:
            most = int(hard) // block_bytes
            limits.append((most, f"{who}: hard limit of {hard} bytes of ram, {most} blocks"))
        if quota.tokens_per_s is not None and usage.tokens_left is not None:
            most = usage.tokens_left // block_tokens
            limits.append((most, f"{who}: {quota.tokens_per_s:g} tokens a second, {usage.tokens_left} left now"))
        for most, sentence in limits:
            if most < blocks:
                blocks, reason = most, sentence
        if quota.loads is not None and usage.loads >= quota.loads:
            may_load = False
            reason = reason or f"{who}: {usage.loads} loads under way, {quota.loads} allowed"
    return Admission(tokens=blocks * block_tokens, may_load=may_load, reason=reason)


def bounds(limits: Limits, floor_bytes: int, limit_bytes: int | None, step_bytes: int) -> tuple[int, int | None]:
    """Floor and limit of a model's share: never below its reserve, never above its soft and its hard limit.

    A floor is in whole steps, upwards; a hard limit below it wins.
    """
    caps = [int(cap) for cap in (limits.soft_bytes, limits.hard_bytes) if cap is not None]
    cap = min(caps, default=None) if limit_bytes is None else min([*caps, limit_bytes])
    reserved = -(-int(limits.reserved_bytes) // step_bytes) * step_bytes
    if cap is None:
        return max(floor_bytes, reserved), None
    cap = max(cap, reserved)
    return max(min(floor_bytes, cap), reserved), cap


def check(quotas: Iterable[tuple[str, Quota]], capacities: Mapping[Tier, tuple[int, int]]) -> None:
    """Whether what is reserved can be kept for all.

    Args:
        quotas: with what to call each; all of models, or all of tenants.
        capacities: bytes of each tier, and the steps in which they are divided.

    Raises:
        InputError: a tier has less than what is reserved.
    """
    named = list(quotas)
    for tier, (capacity, step) in capacities.items():
        reserved = {who: int(quota.limits(tier).reserved_bytes) for who, quota in named}
        total = sum(-(-bytes_ // step) * step for bytes_ in reserved.values())
        if total > capacity:
            listed = ", ".join(f"{who} {bytes_}" for who, bytes_ in reserved.items() if bytes_)
            raise InputError(
                f"quotas reserve {total} bytes of {tier}, in steps of {step}; it has {capacity}; lower one of: {listed}"
            )
