"""What is cached where: asked of the database that nodes share or, without one, of the local index.

store's log, ends of puts and matches, usage ─▶ `Keeper` ─(behind)─▶ PostgreSQL
versions retired there ─▶ `Keeper` ─▶ this node drops their blocks
`Catalog.find`, `iterate`, `export`, `where`, `usage` ─▶ PostgreSQL, or the local index
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from stratakv import _native
from stratakv.errors import InputError, StoreError
from stratakv.keeper import Entry, Keeper
from stratakv.tiers.postgres import Holder, Postgres, split

# Prefixes that are asked for at a time, and found at most.
_PREFIXES, _MOST = 1000, 10_000
_DAY_S = 86_400.0
_TIER_BITS = {"ram": 1, "ssd": 2}
# Seconds since which a node was not heard of that is taken to be gone.
_GONE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """A prefix that is cached, or was used of late.

    Attributes:
        model: name of its model.
        weights_version: names the weights.
        adapter: name of the adapter; ``None``: not known, as of what was found on SSD and not asked for since.
        tenant: name of the tenant; ``None``: not known.
        name: names it, 32 hex digits.
        tokens: its length.
        places: leading tokens by node and tier; of this node alone where the local index was asked.
        since: when its last block came.
        used: when it was used last.
        uses: by how many matches.
        heat: its uses, being put among them, each halved for every day since.
        score: how near it is to the text or tokens that were asked for, up to 1; ``None``: it was not asked by that.
    """

    model: str
    weights_version: str
    adapter: str | None
    tenant: str | None
    name: str
    tokens: int
    places: Mapping[str, Mapping[str, int]]
    since: datetime
    used: datetime
    uses: int
    heat: float
    score: float | None = None

    def row(self) -> dict[str, Any]:
        """What JSON takes."""
        return {**asdict(self), "since": self.since.isoformat(), "used": self.used.isoformat()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where a prompt's prefix is.

    Attributes:
        asked_tokens: tokens of the prompt.
        here: leading tokens that are here, by the tier that would be asked for them.
        nodes: other nodes that were heard of within a minute, those first that hold most: leading tokens, and those of
            them in RAM. ``None``: there is no database, or it does not answer.
        dragonfly: leading tokens that are there; ``None``: there is no such tier, or it does not answer.
    """

    asked_tokens: int
    here: Mapping[str, int]
    nodes: Mapping[str, tuple[int, int]] | None
    dragonfly: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """What a tenant asked of a model in an hour, over all nodes.

    Attributes:
        hour: its begin.
        model: name of the model.
        weights_version: names the weights.
        tenant: name of the tenant.
        asked_blocks: blocks asked for by matches.
        hit_blocks: blocks of them that were cached.
        loaded_tokens: tokens loaded.
        put_blocks: blocks put that were new.
        put_bytes: payload bytes of those.
    """

    hour: datetime
    model: str
    weights_version: str
    tenant: str | None
    asked_blocks: int
    hit_blocks: int
    loaded_tokens: int
    put_blocks: int
    put_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the catalog asks.

    Attributes:
        store: the native store.
        entries: models that are registered, by name.
        entry: one of them.
        near: names of prefixes of a model, adapter and tenant near to a text or tokens, so many at most, and how near.
        leading: how many of these blocks are in Dragonfly, up to the first that is not; by model and namespace.
        postgres: the database, and who keeps it.
    """

    store: _native.Store
    entries: Callable[[], Mapping[str, Entry]]
    entry: Callable[[str], Entry]
    near: Callable[[str, str, str, object, int], list[tuple[bytes, float]]]
    leading: Callable[[bytes, list[bytes]], int | None]
    postgres: tuple[Postgres, Keeper] | None

    @property
    def node(self) -> str:
        """What this node is called."""
        known = None if self.postgres is None else self.postgres[0].node
        return known or socket.gethostname()


class Catalog:
    """Asks what is cached, of the database or, without one, of the local index. Requests need none of it."""

    def __init__(self, source: Source) -> None:
        """Of a store; `CacheManager.catalog` is its."""
        self._source = source

    def find(
        self,
        *,
        model: str | None = None,
        adapter: str | None = None,
        tenant: str | None = None,
        tokens: object = None,
        text: str | None = None,
        tier: str | None = None,
        stored_within_s: float | None = None,
        used_within_s: float | None = None,
        unused_for_s: float | None = None,
        least_heat: float | None = None,
        limit: int = 100,
        fleet: bool | None = None,
    ) -> list[CachedPrefix]:
        """Prefixes for which all of this holds, those first that are worth most; by text, those that are nearest.

        Args:
            model: of that model.
            adapter: of that adapter; with ``tokens`` or ``text``, ``None`` is none.
            tenant: of that tenant, likewise.
            tokens: that begin with the whole blocks of these tokens, at least one; needs a model.
            text: that are near to this text, by the vector index; needs a model.
            tier: that have their first block in this tier, ``ram`` or ``ssd``, somewhere.
            stored_within_s: whose last block came within so many seconds.
            used_within_s: that were used within so many seconds.
            unused_for_s: that were not used for so many seconds.
            least_heat: that are worth so much at least.
            limit: so many at most.
            fleet: of all nodes; ``False``: of this one; ``None``: of all where the database answers, else of this one.

        Raises:
            InputError: a filter that makes no sense.
            ModelNotFoundError: no such model.
            StoreError: ``fleet`` was asked for, and the database does not answer.
        """
        if type(limit) is not int or not 1 <= limit <= _MOST:
            raise InputError(f"limit is {limit!r}, expected an integer from 1 to {_MOST}; `iterate` finds all")
        filters = _Filters.of(
            self._source, model, adapter, tenant, tokens, tier, stored_within_s, used_within_s, unused_for_s, least_heat
        )
        if text is not None:
            if model is None:
                raise InputError("text is given and model is not: the vector index is asked by model")
            near = dict(self._source.near(model, adapter or "", tenant or "", text, limit))
            filters = replace(filters, ids=frozenset(near), tenant=None, adapter=None)
        found = self._remote(filters, limit) if fleet is not False else None
        if found is None:
            if fleet:
                raise StoreError("the catalog's database does not answer, or there is none; ask with fleet=False")
            found = heapq.nlargest(limit, self._local(filters), key=lambda prefix: (prefix.heat, prefix.name))
        if text is None:
            return found
        scored = [replace(prefix, score=near[bytes.fromhex(prefix.name)]) for prefix in found]
        return sorted(scored, key=lambda prefix: -(prefix.score or 0.0))

    def iterate(self, *, fleet: bool | None = None, **filters: Any) -> Iterator[CachedPrefix]:  # noqa: ANN401 - as of `find`
        """All prefixes for which the filters of `find` hold, but text, in no order; they need not fit into memory."""
        chosen = _Filters.of(self._source, **{name: filters.pop(name, None) for name in _NAMES})
        if filters:
            raise InputError(f"{next(iter(filters))!r} is no filter, expected some of {', '.join(_NAMES)}")
        if fleet is not False and self._database is not None:
            for number in self._numbers(chosen.model):
                last: UUID | None = UUID(int=0)
                while last is not None:
                    page = self._page(chosen, number, last)
                    if page is None:
                        raise StoreError("the catalog's database does not answer")
                    found, last = page
                    yield from found
            return
        if fleet:
            raise StoreError("there is no catalog's database; ask with fleet=False")
        yield from self._local(chosen)

    def export(self, path: str | os.PathLike[str], **filters: Any) -> int:  # noqa: ANN401 - as of `iterate`
        """Writes what `iterate` finds as JSON, a line for each; how many. The file is there when it is whole."""
        count = 0
        part = f"{os.fspath(path)}.part"
        try:
            with open(part, "w", encoding="utf-8") as file:
                for prefix in self.iterate(**filters):
                    file.write(json.dumps(prefix.row()) + "\n")
                    count += 1
            os.replace(part, path)
        except OSError as error:
            raise InputError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)
        return count

    def where(self, tokens: object, *, model: str, adapter: str = "", tenant: str = "") -> Where:
        """Where the longest cached prefix of a prompt is: here, on other nodes, in Dragonfly. Nothing is counted.

        Raises:
            InputError: the tokens are no 1-d sequence of non-negative integers.
            ModelNotFoundError: no such model.
        """
        entry = self._source.entry(model)
        names, asked = _names(entry, tokens, adapter, tenant)
        size = entry.geometry.block_tokens
        places = list(itertools.takewhile(bool, entry.model.places(names)))
        here = {tier: size * sum(place & 1 == bit for place in places) for tier, bit in (("ram", 1), ("ssd", 0))}
        holders = self._holders(model, names)
        nodes = None
        if holders is not None:
            others = (h for h in holders if h.node != self._source.node and h.seen_s_ago < _GONE_S)
            nodes = {holder.node: (size * holder.blocks, size * holder.in_ram) for holder in others}
        there = self._source.leading(entry.model.fingerprint + entry.model.space(adapter, tenant), names)
        return Where(
            asked_tokens=asked,
            here={tier: tokens for tier, tokens in here.items() if tokens},
            nodes=nodes,
            dragonfly=None if there is None else size * there,
        )

    def usage(
        self, *, model: str | None = None, tenant: str | None = None, within_s: float | None = None
    ) -> list[UsageRow]:
        """What tenants asked of models, by hour, over all nodes.

        Raises:
            StoreError: there is no database, or it does not answer.
        """
        conditions, values = ["true"], dict[str, object]()
        for name, value, condition in (
            ("model", model, "model = %(model)s"),
            ("tenant", tenant, "tenant = %(tenant)s"),
            ("within", within_s, "hour > now() - make_interval(secs => %(within)s)"),
        ):
            if value is not None:
                conditions.append(condition)
                values[name] = value
        postgres = self._database
        rows = None if postgres is None else postgres.usage(" AND ".join(conditions), values)
        if rows is None:
            raise StoreError("the catalog's database does not answer, or there is none: usage over time is kept there")
        return [
            UsageRow(
                hour=datetime.fromtimestamp(float(hour), UTC),
                model=of,
                weights_version=version,
                tenant=who,
                asked_blocks=int(asked),
                hit_blocks=int(hit),
                loaded_tokens=int(loaded),
                put_blocks=int(put),
                put_bytes=int(put_bytes),
            )
            for hour, of, version, who, asked, hit, loaded, put, put_bytes in rows
        ]

    def retire(self, model: str, weights_version: str) -> int:
        """Retires a version of a model's weights on all nodes, in one transaction.

        Each node hears of it at once, or finds it within ``postgres.poll_s``. From then on it drops what it has of that
        version, and stores nothing of it.

        Returns:
            How many shapes of it were retired; 0: none was known, or all were retired.

        Raises:
            StoreError: there is no database, or it does not answer; then nothing was retired.
        """
        return self._retire(model, weights_version, back=False)

    def restore(self, model: str, weights_version: str) -> int:
        """Takes back that a version was retired: nodes store it again.

        Raises:
            StoreError: as `retire`.
        """
        return self._retire(model, weights_version, back=True)

    def _retire(self, model: str, weights_version: str, *, back: bool) -> int:
        postgres = self._database
        done = None if postgres is None else postgres.retire(model, weights_version, back=back)
        if done is None:
            raise StoreError("the catalog's database does not answer, or there is none: nothing was changed")
        return done

    @property
    def _database(self) -> Postgres | None:
        return None if self._source.postgres is None else self._source.postgres[0]

    def _holders(self, model: str, names: list[bytes]) -> list[Holder] | None:
        if self._source.postgres is None:
            return None
        postgres, keeper = self._source.postgres
        number = keeper.id_of(model)
        return None if number is None else postgres.holders(number, names)

    def _local(self, filters: _Filters) -> Iterator[CachedPrefix]:
        entries = self._source.entries()
        now = time.time()
        start: int | None = 0
        while start is not None:
            rows, start = self._source.store.prefixes(filters.model, start)
            for model, _, names, blocks, places, since, used, uses in rows:
                if model not in entries:
                    continue
                size = entries[model].geometry.block_tokens
                tiers = {
                    tier: size * sum(1 for _ in itertools.takewhile(lambda place, bit=bit: place & bit, places))  # type: ignore[misc]
                    for tier, bit in _TIER_BITS.items()
                }
                prefix = CachedPrefix(
                    model=model,
                    weights_version=entries[model].weights_version,
                    adapter=names and names[0],
                    tenant=names and names[1],
                    name=blocks[-16:].hex(),
                    tokens=size * len(places),
                    places={self._source.node: {tier: tokens for tier, tokens in tiers.items() if tokens}},
                    since=datetime.fromtimestamp(since, UTC),
                    used=datetime.fromtimestamp(used, UTC),
                    uses=uses,
                    heat=(uses + 1) * 0.5 ** (max(now - used, 0.0) / _DAY_S),
                )
                if filters.fit(prefix, blocks, now):
                    yield prefix

    def _remote(self, filters: _Filters, limit: int) -> list[CachedPrefix] | None:
        postgres = self._database
        if postgres is None:
            return None
        where, values = filters.condition()
        rows = postgres.find(where, values, limit)
        return None if rows is None else self._prefixes(rows)

    def _numbers(self, model: str | None) -> list[int]:
        numbers = None if self._database is None else self._database.numbers(model)
        if numbers is None:
            raise StoreError("the catalog's database does not answer")
        return numbers

    def _page(self, filters: _Filters, number: int, last: UUID) -> tuple[list[CachedPrefix], UUID | None] | None:
        """Prefixes of a model that follow one by name, and the last of them, if there may be more."""
        where, values = filters.condition()
        where += " AND p.model = %(number)s AND p.name > %(last)s"
        values |= {"number": number, "last": last}
        postgres = self._database
        rows = None if postgres is None else postgres.find(where, values, _PREFIXES, order="p.name")
        if rows is None:
            return None
        end = UUID(bytes=bytes(rows[-1][5][-16:])) if len(rows) == _PREFIXES else None
        return self._prefixes(rows), end

    def _prefixes(self, rows: list[tuple[Any, ...]]) -> list[CachedPrefix]:
        found = []
        for name, version, adapter, tenant, tokens, chain, places, since, used, uses, heat, _ in rows:
            size = tokens * 16 // len(chain)
            found.append(
                CachedPrefix(
                    model=name,
                    weights_version=version,
                    adapter=adapter,
                    tenant=tenant,
                    name=chain[-16:].hex(),
                    tokens=tokens,
                    places={
                        node: {tier: size * blocks for tier, blocks in tiers.items()}
                        for node, tiers in (places or {}).items()
                    },
                    since=datetime.fromtimestamp(float(since), UTC),
                    used=datetime.fromtimestamp(float(used), UTC),
                    uses=uses,
                    heat=heat,
                )
            )
        return found


_NAMES = (
    *("model", "adapter", "tenant", "tokens", "tier"),
    *("stored_within_s", "used_within_s", "unused_for_s", "least_heat"),
)


@dataclass(frozen=True, slots=True)
class _Filters:
    """What has to hold for a prefix."""

    model: str | None
    adapter: str | None
    tenant: str | None
    start: bytes
    tier: str | None
    stored_within_s: float | None
    used_within_s: float | None
    unused_for_s: float | None
    least_heat: float | None
    # Names of prefixes; None: all.
    ids: frozenset[bytes] | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        model: str | None,
        adapter: str | None,
        tenant: str | None,
        tokens: object,
        tier: str | None,
        *numbers: float | None,
        **named: float | None,
    ) -> _Filters:
        stored_within_s, used_within_s, unused_for_s, least_heat = numbers = (*numbers, *named.values())
        for name, number in zip(_NAMES[5:], numbers, strict=True):
            if number is not None and not (type(number) in (int, float) and 0 <= number <= 1e9):
                raise InputError(f"{name} is {number!r}, expected a number from 0 to 1e9, or None")
        for name, said in (("model", model), ("adapter", adapter), ("tenant", tenant)):
            if said is not None and (not isinstance(said, str) or "\0" in said):
                raise InputError(f"{name} is {said!r}, expected text, or None")
        if tier is not None and tier not in _TIER_BITS:
            raise InputError(f"tier is {tier!r}, expected one of {', '.join(_TIER_BITS)}")
        start = b""
        if tokens is not None:
            if model is None:
                raise InputError("tokens are given and model is not: each model names its blocks in its own way")
            adapter, tenant = adapter or "", tenant or ""
            entry = source.entry(model)
            names, asked = _names(entry, tokens, adapter, tenant)
            if not names:
                raise InputError(
                    f"{asked} tokens are given, expected at least the {entry.geometry.block_tokens} of a block"
                )
            start = b"".join(names)
        return cls(model, adapter, tenant, start, tier, stored_within_s, used_within_s, unused_for_s, least_heat)

    def fit(self, prefix: CachedPrefix, blocks: bytes, now: float) -> bool:
        """Whether a prefix of the local index, of these blocks, is one of them."""
        (tiers,) = prefix.places.values()
        age, idle = now - prefix.since.timestamp(), now - prefix.used.timestamp()
        return (
            self.model in (None, prefix.model)
            and self.adapter in (None, prefix.adapter)
            and self.tenant in (None, prefix.tenant)
            and blocks.startswith(self.start)
            and (self.tier is None or self.tier in tiers)
            and (self.stored_within_s is None or age <= self.stored_within_s)
            and (self.used_within_s is None or idle <= self.used_within_s)
            and (self.unused_for_s is None or idle >= self.unused_for_s)
            and (self.least_heat is None or prefix.heat >= self.least_heat)
            and (self.ids is None or blocks[-16:] in self.ids)
        )

    def condition(self) -> tuple[str, dict[str, object]]:
        """The same in SQL, and the values of its parameters."""
        conditions: list[tuple[str, dict[str, object]]] = []
        for name, value, text in (
            ("model", self.model, "m.name = %(model)s"),
            ("adapter", self.adapter, "p.adapter = %(adapter)s"),
            ("tenant", self.tenant, "p.tenant = %(tenant)s"),
            ("stored_within", self.stored_within_s, "p.since >= now() - make_interval(secs => %(stored_within)s)"),
            ("used_within", self.used_within_s, "p.used >= now() - make_interval(secs => %(used_within)s)"),
            ("unused_for", self.unused_for_s, "p.used <= now() - make_interval(secs => %(unused_for)s)"),
            (
                "least_heat",
                self.least_heat or None,
                "p.heat >= extract(epoch FROM now()) / 86400 + ln(%(least_heat)s::float8) / ln(2::float8)",
            ),
        ):
            if value is not None:
                conditions.append((text, {name: value}))
        if self.start:
            text = (
                "substring(p.chain FROM 1 FOR 16) = %(first)s AND substring(p.chain FROM 1 FOR %(length)s) = %(start)s"
            )
            values = {"first": self.start[:16], "length": len(self.start), "start": self.start}
            conditions.append((text, values))
        if self.tier is not None:
            text = (
                "EXISTS (SELECT FROM stratakv.blocks b JOIN stratakv.nodes n ON n.id = b.node AND n.closed_at IS NULL"
                " WHERE b.model = p.model AND b.name = encode(substring(p.chain FROM 1 FOR 16), 'hex')::uuid"
                " AND b.tier = %(tier)s)"
            )
            conditions.append((text, {"tier": list(_TIER_BITS).index(self.tier)}))
        if self.ids is not None:
            conditions.append(("p.name = ANY(%(ids)s)", {"ids": [UUID(bytes=name) for name in sorted(self.ids)]}))
        values = {}
        for _, more in conditions:
            values |= more
        return " AND ".join(["true", *(text for text, _ in conditions)]), values


def _names(entry: Entry, tokens: object, adapter: str, tenant: str) -> tuple[list[bytes], int]:
    """Names of the whole blocks of some tokens, and how many tokens they are."""
    sequence = tokens
    if not isinstance(tokens, _native.TokenSequence):
        sequence = entry.model.sequence(adapter, tenant)
        sequence.extend(tokens)
    assert isinstance(sequence, _native.TokenSequence)
    return split(entry.model.names(sequence)), len(sequence)
