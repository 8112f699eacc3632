"""One model's cache: match, put, and what is set of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stratakv import _native, log
from stratakv.config import Codec, Geometry, Quota
from stratakv.errors import InputError, StoreError
from stratakv.match import Behind, Match
from stratakv.quotas import Admission
from stratakv.stats import Stats, Suggestion
from stratakv.tiers.dragonfly import Dragonfly
from stratakv.tiers.remote import Remote
from stratakv.tracing import Traces

_log = log.of(__name__)


MAX_PRIORITY = 10  # As in the native half.


class ModelCache:
    """The cached prefixes of one model."""

    __slots__ = (
        "_behind",
        "_manager",
        "_model",
        "_said",
        "_traces",
        "geometry",
        "name",
        "retired",
        "turn",
    )

    def __init__(
        self,
        manager: Any,  # noqa: ANN401 - the manager stands above this module
        behind: Behind,
        name: str,
        geometry: Geometry,
        model: _native.Model,
    ) -> None:
        """Wraps a native model; `CacheManager.register` makes caches."""
        self._manager = manager
        self._behind = behind
        self._model = model
        self._said = False
        self._traces: Traces | None = manager.traces
        # See `Traces.turn`.
        self.turn: Iterator[Any] | None = self._traces.turn() if self._traces is not None else None
        self.name = name
        self.geometry = geometry
        # Whether its version is: then it finds nothing, and stores nothing.
        self.retired = False

    def match(
        self,
        tokens: object,
        *,
        text: str | None = None,
        adapter: str = "",
        tenant: str = "",
        traceparent: str | None = None,
    ) -> Match:
        """Finds the longest cached prefix and leases it.

        Args:
            tokens: token ids: a list, an array or a tensor, 1-d, integers from 0 to 2**32 - 1. Or a `sequence`, which
                has its adapter and tenant already.
            text: of the prompt, where the vector index embeds texts. Where too little is found, what is near may be
                brought to RAM.
            adapter: name of the LoRA adapter, or of whatever else alters keys and values.
            tenant: salt of the tenant; nothing is shared across tenants.
            traceparent: of the request, as W3C Trace Context writes it, where spans are made.

        Returns:
            The match; of 0 tokens if nothing is cached.

        Raises:
            InputError: the tokens are no 1-d sequence of non-negative integers.
            ClosedError: the store is closed.
        """
        turn = self.turn
        if turn is not None and ((context := next(turn, True)) or traceparent):
            traces: Traces = self._traces  # type: ignore[assignment]  # whoever has turns is traced
            if traces.wants(self, context, traceparent):
                found: Match = traces.match(self, traceparent, tokens=tokens, text=text, adapter=adapter, tenant=tenant)
                return found
        tier: Dragonfly | None = self._manager.dragonfly
        if tier is None:
            if text is not None:
                self._ask_for_near(tokens, text, adapter, tenant)
            return Match(self._model.match_prefix(tokens, adapter, tenant), self._behind, self._say_that_ssd_is_slow)
        # What a load asks for later is what was asked for now.
        own = isinstance(tokens, _native.TokenSequence) and not adapter and not tenant
        asked = tokens if own else self.sequence(tokens, adapter=adapter, tenant=tenant)
        lease = self._model.match_here(asked)
        remote = Remote(tier, self._model, asked, lease)  # type: ignore[arg-type]  # it is a sequence in both cases
        if text is not None:
            self._ask_for_near(tokens, text, adapter, tenant)
        return Match(lease, self._behind, self._say_that_ssd_is_slow, remote)

    def _ask_for_near(self, tokens: object, text: str, adapter: str, tenant: str) -> None:
        """Has what is near to a text brought up, if the prompt is not here."""
        if self._manager.semantic is not None:
            self._manager.semantic.note("missed", self, tokens, text, adapter, tenant)

    def sequence(
        self,
        tokens: object = (),
        *,
        block_hashes: Sequence[bytes] | None = None,
        adapter: str = "",
        tenant: str = "",
    ) -> _native.TokenSequence:
        """Tokens that grow, to be matched and put again: only new ones are hashed.

        Args:
            tokens: the first of them, as for `match`.
            block_hashes: the engine's own hash of each whole block, in place of ours; see `TokenSequence.extend`. What
                is stored under such hashes is found by them alone; to be found after a restart, they must be the same
                then. Token ids are compared on load all the same.
            adapter: as for `match`.
            tenant: as for `match`.

        Raises:
            InputError: as `TokenSequence.extend`.
        """
        sequence = self._model.sequence(adapter, tenant)
        sequence.extend(tokens, block_hashes=block_hashes)
        return sequence

    def put(
        self,
        tokens: object,
        kv: object,
        *,
        layout: str = "BHND",
        batch: int = 0,
        pages: object = None,
        start: int = 0,
        text: str | None = None,
        adapter: str = "",
        tenant: str = "",
        priority: int = 0,
        ttl_s: float | None = None,
        stream: int | None = None,
        traceparent: str | None = None,
    ) -> int:
        """Stores the keys and values of a prompt. Back as soon as they are in RAM; the SSD follows behind.

        Only whole blocks are stored, and only those that are not cached yet; each byte is copied once.

        Args:
            tokens: token ids, as for `match`.
            kv: keys and values of at least these tokens: NumPy arrays, torch tensors or any DLPack producer; on the
                device of the GPU tier, where there is one, with equal strides in all layers.
                Strides are free but for the last axis. What ``layout`` does not name is a sequence: of layers, and
                within a layer of planes.
            layout: axes of each tensor, outermost first: L layer, K plane (key, value), B batch, P page, H head,
                N token (within its page), D dim. ``"BHND"`` fits ``[(keys, values), ...]`` of transformers;
                ``"KPNHD"`` a paged cache with one tensor per layer; ``"LKHND"`` one array for all.
            batch: row to use where the layout has B.
            pages: page numbers in the order of the sequence, where the layout has P.
            start: first token that ``kv`` holds, at its own place: rows before it are not read. Where one of the blocks
                before is not cached any more, nothing is stored.
            text: of the prompt, where the vector index embeds texts: it is not kept.
            adapter: as for `match`.
            tenant: as for `match`.
            priority: how often these blocks are passed over when their turn to leave RAM comes, 0 to 10, and anew
                after each use. A bias: when nothing else may leave, they leave.
            ttl_s: seconds from their last use on after which these blocks leave RAM before all others; until they do,
                they are found. ``None``: no such time. Both hints hold for all blocks of the tokens, new or not, while
                they are in RAM; a later put with hints replaces them.
            stream: as for `Match.load`.
            traceparent: as for `match`.

        Returns:
            Leading tokens that are cached now.

        Raises:
            InputError: the tensors do not fit the model or cover fewer tokens, or a hint is out of range.
            ClosedError: the store is closed.
        """
        if type(priority) is not int or not 0 <= priority <= MAX_PRIORITY:
            raise InputError(f"priority is {priority!r}, expected an integer from 0 to {MAX_PRIORITY}")
        # Written so that it refuses what is not a number, too.
        if ttl_s is not None and not (isinstance(ttl_s, (int, float)) and ttl_s >= 0):
            raise InputError(f"ttl_s is {ttl_s!r}, expected seconds from 0 up, or None")
        if type(start) is not int or start < 0:
            raise InputError(f"start is {start!r}, expected an integer from 0")

        def work() -> int:
            return self._model.put(tokens, kv, layout, batch, pages, start, adapter, tenant, priority, ttl_s, stream)

        traces = self._traces
        if traces is not None and self.turn is not None and traces.wants(self, next(self.turn, True), traceparent):
            stored = traces.put(self, traceparent, work, lambda: self.names(tokens, adapter, tenant))
        else:
            stored = work()
        if self._manager.semantic is not None and stored:
            self._manager.semantic.note("put", self, tokens, text, adapter, tenant)
        return stored

    def admission(self, tokens: int, *, tenant: str = "") -> Admission:
        """What quotas let a prompt of so many new tokens do now: how much is stored, and whether it may load.

        Args:
            tokens: number of new tokens.
            tenant: as for `match`.

        Raises:
            InputError: a number below 0.
            ModelNotFoundError: the model is not registered.
        """
        if type(tokens) is not int or tokens < 0:
            raise InputError(f"tokens is {tokens!r}, expected an integer from 0")
        admission: Admission = self._manager.admission(self.name, tokens, tenant)
        return admission

    @property
    def fingerprint(self) -> bytes:
        """Names the model, its version and its geometry to all nodes that have the store's secret, 16 bytes."""
        return self._model.fingerprint

    def space(self, adapter: str, tenant: str) -> bytes:
        """Names a namespace of the model in its present epoch, 16 bytes."""
        return self._model.space(adapter, tenant)

    def names(self, tokens: object, adapter: str = "", tenant: str = "") -> list[bytes]:
        """Names of the whole blocks of some tokens or of a `sequence`, 16 bytes each."""
        own = isinstance(tokens, _native.TokenSequence)
        asked = tokens if own else self.sequence(tokens, adapter=adapter, tenant=tenant)
        names = self._model.names(asked)  # type: ignore[arg-type]  # it is a sequence in both cases
        return [names[at : at + 16] for at in range(0, len(names), 16)]

    def in_ram(self, names: list[bytes]) -> int:
        """How many leading blocks of a sequence are in RAM, by their names."""
        return sum(1 for _ in itertools.takewhile(lambda place: place & 1, self._model.places(names)))

    def held(self, names: list[bytes]) -> list[bool]:
        """Whether RAM or SSD has each of some blocks, by their names."""
        return [place != 0 for place in self._model.places(names)]

    def suggest(
        self, tokens: object = None, *, text: str | None = None, limit: int = 3, adapter: str = "", tenant: str = ""
    ) -> list[Suggestion]:
        """Stored prefixes that are near to a prompt, nearest first. They are hints: their keys and values are others.

        Args:
            tokens: of the prompt, as for `match`, if tokens are what is embedded.
            text: of the prompt, if texts are.
            limit: so many at most.
            adapter: as for `match`; what belongs to another is never suggested.
            tenant: as for `match`, likewise.

        Returns:
            None of them where there is no vector index, or it does not answer.

        Raises:
            InputError: not just one of tokens and text, or that which is not embedded; or a limit below 1.
        """
        if (tokens is None) == (text is None):
            raise InputError("give either tokens or text")
        if type(limit) is not int or limit < 1:
            raise InputError(f"limit is {limit!r}, expected an integer from 1")
        index = self._manager.semantic
        if index is None:
            return []
        found, _ = index.near(self, tokens if text is None else text, adapter, tenant, limit)
        return [Suggestion(name=near.name.hex(), tokens=near.tokens, score=near.score) for near in found]

    def lift(self, names: list[bytes], adapter: str | None, tenant: str | None, lifter: str, most_bytes: int) -> int:
        """Brings blocks of one sequence to RAM, from its first on, from where they are; how many bytes came."""
        blocks, came = self._model.lift(names, lifter, most_bytes)
        tier: Dragonfly | None = self._manager.dragonfly
        size = self._model.record_bytes
        wanted = names[: blocks + (most_bytes - came) // size]
        if tier is None or len(wanted) <= blocks or adapter is None or tenant is None:
            return came
        space = self._model.fingerprint + self._model.space(adapter, tenant)
        records, _ = tier.fetch(space, wanted, size, blocks)
        _, more, _ = self._model.admit_named(adapter, tenant, names, blocks, records, lifter)
        tier.booked(len(wanted) - blocks, more, sum(map(len, records[:more])))
        return came + more * size

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast the engine computes, as it was told or learned; ``None``: not known."""
        return self._model.prefill_rate()

    def set_prefill_rate(self, tokens_per_s: float | Literal["learned"] | None) -> None:
        """Tells how fast the engine computes this model's prompts, so that no load takes longer than computing.

        ``"learned"``: from the time between a match and the put of the same prompt. That is right for an engine that
        puts as soon as it has computed; where keys and values come from elsewhere, as in a replay, no load looks worth
        it.

        What SSD and Dragonfly deliver is learned from each load. Where reading on would take longer than computing,
        a load ends with the reason ``not_worth_it``; one of sixteen such loads is made all the same, to see whether
        the tier has recovered. What is in RAM is loaded in any case.

        Args:
            tokens_per_s: prompt tokens computed a second, or ``"learned"``; ``None``: not known, and all that is found
                is loaded.

        Raises:
            InputError: the rate is not above zero.
            ModelNotFoundError: the model is not registered.
            ClosedError: the store is closed.
        """
        if tokens_per_s == "learned":
            self._model.learn_prefill_rate()
        elif isinstance(tokens_per_s, str):
            raise InputError(f"tokens_per_s is {tokens_per_s!r}, expected a number above zero, 'learned' or None")
        else:
            self._model.set_prefill_rate(tokens_per_s)
        self._said = False

    def _say_that_ssd_is_slow(self) -> None:
        """Says so in the log, once for each rate that was set."""
        if not self._said:
            self._said = True
            ssd = self._manager.model_stats(self.name).tiers["ssd"]
            rate = ssd.read_bytes / ssd.read_s / 1e6 if ssd.read_s else 0.0
            _log.warning(
                "ssd_slower_than_computing",
                "model %r is computed where the SSD takes longer: it delivers %.4g MB/s",
                self.name,
                rate,
                key=self.name,
                model=self.name,
            )

    def set_ram_codec(self, codec: Codec | str | Mapping[str, Any]) -> None:
        """Encodes blocks when they are put, from now on; as such they go to SSD, too. See `set_cold_codec`.

        RAM holds more of them. A put reads the tensors once and encodes on the way, a load decodes into the tensors;
        `Match.view` has no plain bytes to show.

        Args:
            codec: as for `set_cold_codec`.

        Raises:
            InputError: as there, and the others.
        """
        self._model.set_codec("ram", Codec.of(codec).terms())

    def set_cold_codec(self, codec: Codec | str | Mapping[str, Any]) -> None:
        """Encodes blocks when they go to SSD, from now on; what was encoded before stays readable, after a restart too.

        Every codec but ``none`` loses precision. What is encoded is never encoded again: it goes from one tier to the
        other as it is. A block with a NaN, an infinity or values that fit no scale stays plain, and is counted. The
        setting is not kept over a restart.

        Args:
            codec: a `Codec`, its name, or a table of its fields.

        Raises:
            InputError: there is no such codec, it does not fit the model's geometry, saves nothing, or clips by a
                calibration that there was not.
            ModelNotFoundError: the model is not registered.
            ClosedError: the store is closed.
        """
        self._model.set_codec("ssd", Codec.of(codec).terms())

    def set_codecs(self, ram: Codec | None, cold: Codec | None) -> None:
        """Sets those that are given, as `set_ram_codec` and `set_cold_codec` do."""
        if ram is not None:
            self.set_ram_codec(ram)
        if cold is not None:
            self.set_cold_codec(cold)

    def calibrate(
        self,
        kv: object,
        *,
        percentile: float = 99.99,
        layout: str = "BHND",
        batch: int = 0,
        pages: object = None,
    ) -> tuple[tuple[float, ...], ...]:
        """Measures, once, what codecs of ``clip="calibrated"`` cut magnitudes to; it is kept with the model's file.

        It is found again by a model of the same name, geometry and `weights_version`. Codecs that are set already go on
        with what they were set with.

        Args:
            kv: keys and values of a sample, as `put` takes them: all tokens count.
            percentile: of the magnitudes of each layer's keys and of its values, above 0 to 100.
            layout: as for `put`.
            batch: as for `put`.
            pages: as for `put`.

        Returns:
            The bounds, ``[layer][plane]``.

        Raises:
            InputError: the tensors do not fit the model, are empty, or hold what is not finite; or the percentile is
                out of range.
            ModelNotFoundError: the model is not registered.
            StoreError: it cannot be written; then nothing has changed.
            ClosedError: the store is closed.
        """
        bounds = self._model.calibrate(kv, percentile, layout, batch, pages)
        planes = self.geometry.planes
        return tuple(tuple(bounds[at : at + planes]) for at in range(0, len(bounds), planes))

    def drop(self, *, adapter: str = "", tenant: str = "") -> int:
        """Forgets all that is cached for an adapter and a tenant: an adapter has new weights, or a tenant left.

        On return nothing of it is found any more, on any tier, after a restart either. A `sequence` made before matches
        nothing more, and nothing is put for it: its keys and values may be of what was dropped. Matches made before
        stay safe, and load nothing more. Other adapters and tenants lose nothing. Other nodes are not told: what is
        put after a drop is shared with none. Where nodes share, name an adapter anew when it has new weights.

        Args:
            adapter: as for `match`.
            tenant: as for `match`.

        Returns:
            How many blocks were forgotten.

        Raises:
            ModelNotFoundError: the model is not registered.
            StoreError: the drop cannot be noted on SSD; then nothing was dropped. Or the tier that nodes share does not
                answer: it is dropped here, and nothing of it is loaded from there; what lies there is unlinked as soon
                as that tier answers this process. Or there is such a tier and no SSD tier, to remember the drop: then
                nothing was dropped.
            ClosedError: the store is closed.
        """
        tier: Dragonfly | None = self._manager.dragonfly
        if tier is None:
            return self._model.drop_namespace(adapter, tenant)
        if not self._manager.config.ssd.enabled:
            raise StoreError(
                "a store without a directory cannot remember a drop, and after a restart would find in dragonfly what"
                " was dropped: name an adapter anew when it has new weights, or enable ssd"
            )
        before = self._model.space(adapter, tenant)
        forgotten = self._model.drop_namespace(adapter, tenant)
        if not tier.forget(self._model.fingerprint + before):
            raise StoreError(
                f"{forgotten} blocks were dropped here, and dragonfly does not answer: what is there is unlinked"
                " as soon as it does, and is not loaded until then"
            )
        return forgotten

    def stats(self) -> Stats:
        """Counters of this model."""
        stats: Stats = self._manager.model_stats(self.name)
        return stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A model and what it was registered with."""

    cache: ModelCache
    model: _native.Model
    weights_version: str
    priority: int
    weights_bytes: int
    quota: Quota

    @property
    def geometry(self) -> Geometry:
        """Shape of its blocks."""
        return self.cache.geometry

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast it is computed, if that is known."""
        return self.cache.prefill_tokens_per_s
