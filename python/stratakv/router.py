"""Which replica should serve a request: the one where it takes the least, by what each has cached and has to do.

    events of each replica ─▶ index: block ─▶ who has it, where
    tokens ─▶ blocks ─▶ longest prefix of each replica ─▶ cost = what is missing + what loading takes + what waits there

Costs are counted in tokens that a replica could compute in the same time. Every decision can be explained.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from stratakv import _native
from stratakv.config import Geometry
from stratakv.errors import InputError
from stratakv.events import PLACES, Cleared, Event, Name, Place, Removed, Stored

Policy = Literal["cache_aware", "least_loaded"]

# What loading a cached token costs, in tokens computed. Blocks that are on their way to a replica count as in its RAM.
LOAD_COSTS: Mapping[Place, float] = {"gpu": 0.0, "ram": 0.02, "ssd": 0.1, "remote": 0.2}
# Blocks of a request that was just routed are taken to be there soon, for so long.
_SOON_S = 5.0
# Counted as one more place.
_SOON = len(PLACES)
# Tokens that name a session which has no other name.
_SESSION_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One replica, as a decision saw it.

    Attributes:
        replica: its name.
        hit_tokens: leading tokens that it has cached, by place; ``soon``: of requests that were just routed there.
        load_tokens: tokens that wait there to be computed.
        cost_tokens: what serving the request takes there, in tokens computed.
        excluded: why it was not taken into account; ``None``: it was.
    """

    replica: str
    hit_tokens: Mapping[str, int]
    load_tokens: float
    cost_tokens: float
    excluded: str | None


class Decision:
    """Where a request goes, and why.

    Attributes:
        replica: name of the replica; ``None``: there is none.
        reason: why this one, in a sentence.
        tokens: tokens of the request.
        candidates: all replicas of the model, the chosen one first, then by cost.
    """

    __slots__ = ("_rows", "reason", "replica", "tokens")

    def __init__(self, replica: str | None, reason: str, tokens: int, rows: list[_Row]) -> None:
        """Of what is known of each replica; it is put into words when it is asked for."""
        self.replica, self.reason, self.tokens, self._rows = replica, reason, tokens, rows

    @property
    def candidates(self) -> tuple[Candidate, ...]:  # noqa: D102 - see there
        order = sorted(
            self._rows, key=lambda row: (row.name != self.replica, row.excluded is not None, row.cost, row.name)
        )
        return tuple(
            Candidate(
                replica=row.name,
                hit_tokens={
                    place: count * row.block_tokens
                    for place, count in zip((*PLACES, "soon"), row.found.blocks(row.number), strict=True)
                    if count
                },
                load_tokens=row.load_tokens,
                cost_tokens=row.cost,
                excluded=row.excluded,
            )
            for row in order
        )

    def __str__(self) -> str:
        """The reason, and a line for each replica."""
        lines = [f"{self.replica or 'no replica'}: {self.reason}"]
        for each in self.candidates:
            hits = ", ".join(f"{tokens} in {place}" for place, tokens in each.hit_tokens.items() if tokens)
            state = f"excluded: {each.excluded}" if each.excluded else f"cost {each.cost_tokens:.0f} tokens"
            lines.append(
                f"  {each.replica}: {sum(each.hit_tokens.values())} of {self.tokens} tokens cached"
                f"{f' ({hits})' if hits else ''}, {each.load_tokens:.0f} waiting; {state}"
            )
        return "\n".join(lines)


class _Row(NamedTuple):
    """A replica, as a decision sees it."""

    cost: float
    load: float
    name: str
    variant: str
    excluded: str | None
    load_tokens: float
    number: int
    block_tokens: int
    found: _native.Found


@dataclass(slots=True)
class _Replica:
    name: str
    model: str
    variant: str
    index: _native.PrefixIndex
    block_tokens: int
    number: int
    prefill_tokens_per_s: float
    # What it calls its blocks, as far as they are indexed; None: it calls them as the index does.
    keys: dict[Name, bytes] | None
    # What it has, and where, by key.
    places: dict[bytes, int] = field(default_factory=dict)
    load_tokens: float = 0.0
    unhealthy: str | None = None
    refuses: dict[str, str] = field(default_factory=dict)
    unknown_blocks: int = 0


class Router:
    """Chooses replicas for requests. Any thread may use it."""

    def __init__(
        self,
        policy: Policy = "cache_aware",
        *,
        load_costs: Mapping[Place, float] = LOAD_COSTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of no replica yet.

        Args:
            policy: ``cache_aware``: where the request costs least; ``least_loaded``: where the least waits.
            load_costs: what loading a cached token costs, by place, in tokens computed.
            clock: seconds.

        Raises:
            InputError: an unknown policy or place, or a cost below 0.
        """
        if policy not in get_args(Policy):
            raise InputError(f"policy is {policy!r}, expected one of {', '.join(get_args(Policy))}")
        for place, cost in load_costs.items():
            if place not in PLACES or not cost >= 0:
                raise InputError(f"load_costs: {place!r} is {cost!r}, expected {', '.join(PLACES)}, from 0")
        self.policy: Policy = policy
        saved = [1 - load_costs.get(place, LOAD_COSTS[place]) for place in PLACES]
        # What a block saves, by place.
        self._saved = [*saved, saved[PLACES.index("ram")]]
        self._clock = clock
        self._lock = threading.Lock()
        self._secret = os.urandom(32)
        self._indexes: dict[object, _native.PrefixIndex] = {}
        self._replicas: dict[str, _Replica] = {}
        self._free_numbers: list[int] = []
        self._weights: dict[str, float] = {}
        self._soon: deque[tuple[float, _Replica, _native.Found, int]] = deque()

    def add_replica(
        self,
        name: str,
        *,
        model: str = "",
        block_tokens: int = 16,
        variant: str = "",
        prefill_tokens_per_s: float = 1.0,
        cache: tuple[bytes, str, str, Geometry] | None = None,
    ) -> None:
        """Adds a replica that has nothing cached, as far as is known.

        Args:
            name: what decisions call it.
            model: what it serves; requests for another model never go there.
            block_tokens: tokens of its blocks.
            variant: of an A/B test, see `set_weights`.
            prefill_tokens_per_s: how fast it computes prompts, beside the others.
            cache: of one whose events come from `stratakv.events.Publisher`: the store's secret, and the model's name,
                weights version and geometry there.

        Raises:
            InputError: the name is taken, or a number is not above 0.
        """
        if not (isinstance(block_tokens, int) and block_tokens > 0 and prefill_tokens_per_s > 0):
            given = f"block_tokens={block_tokens!r}, prefill_tokens_per_s={prefill_tokens_per_s!r}"
            raise InputError(f"replica {name!r}: {given}, expected numbers above 0")
        with self._lock:
            if name in self._replicas:
                raise InputError(f"replica {name!r} is there already; remove it first")
            if cache is None:
                shape = Geometry(layers=1, kv_heads=1, head_dim=1, dtype="uint8", block_tokens=block_tokens)
                cache_of = (self._secret, model, "", shape)
            else:
                cache_of = cache
            if cache_of not in self._indexes:
                secret, of, version, g = cache_of
                words = (g.layers, g.planes, g.kv_heads, g.head_dim, g.dtype, g.block_tokens)
                self._indexes[cache_of] = _native.PrefixIndex(secret, of, version, words)
            number = self._free_numbers.pop() if self._free_numbers else len(self._replicas)
            self._replicas[name] = _Replica(
                name=name,
                model=model,
                variant=variant,
                index=self._indexes[cache_of],
                block_tokens=cache_of[3].block_tokens,
                number=number,
                prefill_tokens_per_s=prefill_tokens_per_s,
                keys=None if cache is not None else {},
            )

    def remove_replica(self, name: str) -> None:
        """Forgets a replica.

        Raises:
            InputError: there is none of that name.
        """
        with self._lock:
            replica = self._replica(name)
            self._forget(replica)
            self._soon = deque(each for each in self._soon if each[1] is not replica)
            del self._replicas[name]
            self._free_numbers.append(replica.number)
            used = {id(each.index) for each in self._replicas.values()}
            self._indexes = {key: index for key, index in self._indexes.items() if id(index) in used}

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Divides requests between variants, by weight: which one a session gets stays the same as weights stay.

        Args:
            weights: by variant; one that is not named gets nothing. None at all: all variants are alike.

        Raises:
            InputError: a weight below 0, or no weight above 0.
        """
        for variant, weight in weights.items():
            if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
                raise InputError(f"weight of variant {variant!r} is {weight!r}, expected a number from 0")
        if weights and not sum(weights.values()):
            raise InputError(f"weights of {', '.join(map(repr, weights))} sum to 0, expected one above 0")
        with self._lock:
            self._weights = dict(weights)

    def report(
        self,
        name: str,
        *,
        load_tokens: float | None = None,
        unhealthy: str | None = None,
        refuses: Mapping[str, str] | None = None,
    ) -> None:
        """Notes how a replica is.

        Args:
            name: its name.
            load_tokens: prompt tokens that wait there to be computed; ``None``: as before.
            unhealthy: why it takes no requests at present; ``None``: it does.
            refuses: tenants whose quota is used up there, and why, as `Admission.reason`; ``None``: as before.

        Raises:
            InputError: there is none of that name, or a load below 0.
        """
        if load_tokens is not None and not load_tokens >= 0:
            raise InputError(f"load_tokens is {load_tokens!r}, expected a number from 0")
        with self._lock:
            replica = self._replica(name)
            replica.unhealthy = unhealthy
            if load_tokens is not None:
                replica.load_tokens = load_tokens
            if refuses is not None:
                replica.refuses = dict(refuses)

    def apply(self, name: str, events: Iterable[Event]) -> None:
        """Takes in what a replica got and lost.

        Raises:
            InputError: there is none of that name.
        """
        with self._lock:
            replica = self._replica(name)
            for event in events:
                match event:
                    case Cleared():
                        self._forget(replica)
                    case Removed():
                        self._remove(replica, event)
                    case Stored():
                        self._store(replica, event)

    def cached_blocks(self, name: str) -> tuple[int, int]:
        """Blocks that a replica is known to have; and how many it told of that follow nothing known.

        Raises:
            InputError: there is none of that name.
        """
        with self._lock:
            replica = self._replica(name)
            return len(replica.places), replica.unknown_blocks

    def route(
        self, tokens: object, *, model: str = "", adapter: str = "", tenant: str = "", session: str | None = None
    ) -> Decision:
        """Chooses a replica for a request.

        Args:
            tokens: token ids of the prompt, as for `ModelCache.match`.
            model: what has to serve it.
            adapter: name of the LoRA adapter.
            tenant: salt of the tenant.
            session: what stays with one variant; ``None``: the tenant, the adapter and the first 64 tokens.

        Raises:
            InputError: the tokens are no 1-d sequence of non-negative integers.
        """
        with self._lock:
            self._expire()
            of_index: dict[int, tuple[_native.Found, dict[int, float]]] = {}
            rows: list[_Row] = []
            length = 0
            for name, each in self._replicas.items():
                if each.model != model:
                    continue
                if (key := id(each.index)) not in of_index:
                    found = each.index.find(tokens, adapter, tenant)
                    of_index[key], length = (found, found.weighted(self._saved)), found.tokens
                found, saved = of_index[key]
                load, rate = each.load_tokens, each.prefill_tokens_per_s
                cost = (load + length - saved.get(each.number, 0.0) * each.block_tokens) / rate
                excluded = each.unhealthy or each.refuses.get(tenant)
                rows.append(
                    _Row(cost, load / rate, name, each.variant, excluded, load, each.number, each.block_tokens, found)
                )
            session_name = session or f"{tenant}/{adapter}/{_begin_of(tokens)}" if self._weights else ""
            variant = self._variant(rows, session_name) if self._weights else None
            chosen = self._choose(rows, variant)
            reason = self._reason(rows, chosen, variant, model)
            if chosen is not None:
                # Those that come next and begin alike find it there.
                replica, known = self._replicas[chosen.name], sum(chosen.found.blocks(chosen.number))
                replica.index.expect(chosen.found, known, _SOON, replica.number, True)
                self._soon.append((self._clock() + _SOON_S, replica, chosen.found, known))
            return Decision(chosen.name if chosen else None, reason, length, rows)

    def _choose(self, rows: list[_Row], variant: str | None) -> _Row | None:
        candidates = [row for row in rows if row.excluded is None]
        of_variant = [row for row in candidates if row.variant == variant] if variant is not None else []
        # A row begins with its cost, its load and its name, of which no two are equal.
        if self.policy == "least_loaded":
            return min(of_variant or candidates, key=lambda row: row[1:3], default=None)
        return min(of_variant or candidates, default=None)

    def _variant(self, rows: list[_Row], key: str) -> str | None:
        """By weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): few sessions move as weights change."""
        best, variant = -math.inf, None
        there = {row.variant for row in rows}
        for name, weight in self._weights.items():
            if weight > 0 and name in there:
                digest = hashlib.blake2b(key.encode(), key=name.encode()[:64], digest_size=8).digest()
                chance = (int.from_bytes(digest, "big") + 1) / (2**64 + 2)
                score = -weight / math.log(chance)
                if score > best:
                    best, variant = score, name
        return variant

    def _reason(self, rows: list[_Row], chosen: _Row | None, variant: str | None, model: str) -> str:
        if not rows:
            return f"no replica serves model {model!r}"
        if chosen is None:
            return "every replica is excluded"
        parts = []
        if variant is not None:
            elsewhere = f", none of which takes it: variant {chosen.variant!r}"
            parts.append(f"variant {variant!r}{'' if chosen.variant == variant else elsewhere}")
        parts.append("the least waits there" if self.policy == "least_loaded" else "it costs least there")
        excluded = len([row for row in rows if row.excluded is not None])
        if excluded:
            parts.append(f"{excluded} of {len(rows)} are excluded")
        return "; ".join(parts)

    def _replica(self, name: str) -> _Replica:
        if name not in self._replicas:
            known = ", ".join(sorted(self._replicas)) or "none"
            raise InputError(f"replica {name!r} is not there; known: {known}")
        return self._replicas[name]

    def _expire(self) -> None:
        now = self._clock()
        while self._soon and self._soon[0][0] <= now:
            _, replica, found, known = self._soon.popleft()
            replica.index.expect(found, known, _SOON, replica.number, False)

    def _forget(self, replica: _Replica) -> None:
        for place in range(len(PLACES)):
            keys = [key for key, places in replica.places.items() if places & 1 << place]
            replica.index.set(keys, place, replica.number, False)
        for _, each, found, known in self._soon:
            if each is replica:
                replica.index.expect(found, known, _SOON, replica.number, False)
        replica.places.clear()
        if replica.keys is not None:
            replica.keys.clear()

    def _store(self, replica: _Replica, event: Stored) -> None:
        index, place = replica.index, PLACES.index(event.place)
        if replica.keys is None:
            keys = [name for name in event.names if isinstance(name, bytes) and len(name) == 16]
        elif event.block_tokens != replica.block_tokens or not event.tokens:
            keys = []
        elif event.parent is not None and event.parent not in replica.keys:
            # What was before it was missed, or is nothing that an index of tokens can name.
            keys = []
        else:
            after = None if event.parent is None else replica.keys[event.parent]
            keys = index.hashes(list(event.tokens), event.adapter, event.tenant, after)
            replica.keys.update(zip(event.names, keys, strict=True))
        replica.unknown_blocks += len(event.names) - len(keys)
        for key in keys:
            replica.places[key] = replica.places.get(key, 0) | 1 << place
        index.set(keys, place, replica.number, True)

    def _remove(self, replica: _Replica, event: Removed) -> None:
        place = PLACES.index(event.place)
        for name in event.names:
            key = name if replica.keys is None else replica.keys.get(name)
            if not isinstance(key, bytes) or key not in replica.places:
                continue
            replica.places[key] &= ~(1 << place)
            replica.index.set([key], place, replica.number, False)
            if not replica.places[key]:
                del replica.places[key]
                if replica.keys is not None:
                    del replica.keys[name]


def _begin_of(tokens: Any) -> str:  # noqa: ANN401 - whatever the hasher takes
    return str(np.asarray(tokens[:_SESSION_TOKENS]).tolist())
