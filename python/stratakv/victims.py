"""Which model makes room when a tier is full: the order in which those pay that hold more than their shares.

A pure function of what each model is worth at present. Within a model its eviction policy chooses the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from stratakv.config import VictimPolicy
from stratakv.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """How much a model is used.

    Attributes:
        idle_s: seconds since it was last asked for anything.
        blocks: blocks asked for, those of long ago counting less.
        held_bytes: bytes that it holds.
        loss: what it would lose of its hits, in the unit of the objective, for each byte less.
    """

    idle_s: float = 0.0
    blocks: float = 0.0
    held_bytes: int = 0
    loss: float = 0.0


def order(policy: VictimPolicy, heats: Mapping[str, Heat], turn: int = 0) -> list[str]:
    """In which order models make room.

    Args:
        policy: ``lru``, whoever was used longest ago first; ``lfu``, least often, aged; ``smallest``, least bytes held;
            ``round_robin``, each first in its turn; ``utility``, who loses least by each byte.
        heats: by model.
        turn: how often the order was asked for before, of ``round_robin``.

    Returns:
        All models. Equal ones are in the order of their names.

    Raises:
        InputError: an unknown policy.
    """
    if policy not in get_args(VictimPolicy):
        raise InputError(f"victims is {policy!r}, expected one of {', '.join(get_args(VictimPolicy))}")
    names = sorted(heats)
    if policy == "round_robin":
        first = turn % max(len(names), 1)
        return names[first:] + names[:first]
    keys = {
        "lru": lambda heat: -heat.idle_s,
        "lfu": lambda heat: heat.blocks,
        "smallest": lambda heat: heat.held_bytes,
        "utility": lambda heat: heat.loss,
    }
    return sorted(names, key=lambda name: keys[policy](heats[name]))
