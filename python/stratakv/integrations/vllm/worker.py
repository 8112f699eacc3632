"""A worker's side: it has the store of its rank, loads into the engine's blocks and saves from them.

    match (asked by the scheduler) ─▶ lease, until the step ─▶ load, behind the engine ─▶ told: there, or not
                                                     forward ─▶ save: what it computed, once

The engine keeps a request and its blocks apart until the word comes that they are loaded; what does not load it
computes.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from stratakv import CacheManager, Match, ModelCache, StrataKVError, TokenSequence, log
from stratakv import open as open_store
from stratakv.integrations.engine import settings
from stratakv.integrations.vllm.messages import Counted, Ids, Load, Save, Saved, Step
from stratakv.integrations.vllm.pages import DeviceMover, Gathered, HostMover, Pages, TierMover
from stratakv.integrations.vllm.ranks import Answers, Found

_log = log.of(__name__)

# Steps whose saves may be on their way from a device.
_MOST_BEHIND = 8
# How long an engine that has nothing to compute waits for a load, rather than asking again at once.
_IDLE_S = 0.005
# How often blocks that were announced are looked for, and how many at a time.
_LOOK_EVERY_S, _LOOK_AT = 1.0, 4096


@dataclass
class _Saving:
    """A request's tokens so far."""

    sequence: TokenSequence
    # Tokens that were handed over; the sequence may still be behind.
    tokens: int = 0


@dataclass
class _Leases:
    """Matches that wait for their step."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    by_request: dict[str, tuple[int, Match]] = field(default_factory=dict)

    def keep(self, request: str, step: int, match: Match) -> None:
        with self.lock:
            before = self.by_request.pop(request, None)
            self.by_request[request] = (step, match)
        if before is not None:
            before[1].release()

    def take(self, request: str) -> Match | None:
        with self.lock:
            found = self.by_request.pop(request, None)
        return found[1] if found is not None else None

    def release(self, until: int | None) -> None:
        """Gives back what was asked for up to a step and is not loaded in it; ``None``: all."""
        with self.lock:
            over = [name for name, (step, _) in self.by_request.items() if until is None or step <= until]
            matches = [self.by_request.pop(name)[1] for name in over]
        for match in matches:
            match.release()


class Worker:
    """One rank's store, and what moves between it and the engine's blocks."""

    def __init__(
        self,
        name: str,
        version: str,
        rank: str,
        specs: Mapping[str, FullAttentionSpec],
        caches: Mapping[str, torch.Tensor],
        blocks: int,
        block_tokens: int,
        options: Mapping[str, Any],
    ) -> None:
        """Opens the store and begins to answer.

        Args:
            name: of the model.
            version: of all that its keys and values depend on.
            rank: this worker's among all; each has a directory of its own.
            specs: of each layer that has a cache.
            caches: each layer's tensor, ``[B, H, N, C]``.
            blocks: of the scheduler.
            block_tokens: tokens of one of them.
            options: as of `settings`, and ``staging``: pass memory of the host in between, as devices need.

        Raises:
            InputError: the tensors are not what can be cached.
            StrataKVError: the store cannot be opened.
        """
        given = dict(options)
        staging = given.pop("staging", False)
        on_device = any(cache.device.type != "cpu" for cache in caches.values())
        pages = Pages(specs, caches, blocks, block_tokens, packed=not on_device)
        self._block, self._geometry = block_tokens, pages.geometry
        self.layers = pages.names
        # Which layers a rank has is part of it: how they are divided can be set.
        layers = blake2b(" ".join(pages.names).encode(), digest_size=8).hexdigest()
        self._name, self._version = name, f"{version} {pages.packing} rank {rank} layers {layers}"
        # Steps before that one computed with other weights; and whether this one could not be brought to the host.
        self._saves_from, self._broken = 0, False
        config = settings(given, f"rank-{rank}")
        if pages.device.type == "cuda":
            # That of the engine's own memory, which ranks have one each of.
            config = replace(config, gpu=replace(config.gpu, device=pages.device.index or 0))
        self._caches: CacheManager = open_store(config)
        try:
            tier = self._caches.status().gpu is not None and TierMover.serves(pages)
            mover = TierMover if tier else DeviceMover if on_device or staging else HostMover
            self._mover: HostMover | DeviceMover = mover(pages)
            self._cache: ModelCache = self._caches.register(name, pages.geometry, weights_version=self._version)
        except BaseException:
            self._caches.close()
            raise
        self._leases = _Leases()
        self._saving: dict[str, _Saving] = {}
        self._gathered: dict[int, Gathered] = {}
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._under_way = 0
        self._invalid: set[int] = set()
        self._received: set[str] = set()
        self._counted = Counted()
        self._saved = Saved()
        # Our names of blocks, by the engine's.
        self._announced: dict[bytes, bytes] = {}
        self._looked = time.monotonic()
        self._loads = ThreadPoolExecutor(2, thread_name_prefix="stratakv-load")
        self._puts = ThreadPoolExecutor(1, thread_name_prefix="stratakv-put")
        self._room = threading.BoundedSemaphore(_MOST_BEHIND)
        self._answers = Answers(self)
        self.address = self._answers.address
        where = self._caches.config.ssd.path if self._caches.config.ssd.enabled else "RAM alone"
        moved = "by the GPU tier" if tier else "through host memory" if on_device or staging else "in place"
        self.summary = f"{self._geometry} of {name}, {pages.packing}, moved {moved}, in {where}"

    # What the scheduler asks.

    def match(self, request: str, step: int, tokens: Ids, adapter: str, tenant: str) -> Found:
        """Leases what there is of a prompt, until the step is over."""
        try:
            with log.bound(request_id=request):
                match = self._cache.match(tokens, adapter=adapter, tenant=tenant)
        except StrataKVError as error:
            _log.warning(
                "prompt_not_asked_for",
                "a prompt is computed, the cache could not be asked: %s",
                error,
                request_id=request,
            )
            return Found()
        except Exception:
            _log.exception("match_failed", "a prompt is computed, the cache could not be asked", request_id=request)
            return Found()
        if not match.tokens:
            match.release()
            return Found()
        self._leases.keep(request, step, match)
        tiers: dict[str, int] = {}
        for place in match.explain().blocks:
            tiers[place] = tiers.get(place, 0) + self._block
        return Found(match.tokens, tiers)

    def reset(self, step: int) -> None:
        """Forgets everything, as the weights may be others now: what comes is stored under a version of its own.

        What steps before that one computed is of the old weights, and is not saved any more.
        """
        self._saves_from = step
        self._leases.release(None)
        self._caches.unregister(self._name)
        version = f"{self._version} after {uuid.uuid4().hex}"
        self._cache = self._caches.register(self._name, self._geometry, weights_version=version)

    # Loads.

    def begin(self, step: Step) -> None:
        """Begins to load what this step has made room for."""
        after = self._mover.mark() if step.loads else None
        with self._lock:
            self._under_way += len(step.loads)
        for load in step.loads:
            self._loads.submit(self._load, load, self._leases.take(load.request), after)
        self._leases.release(step.number)

    def _load(self, load: Load, match: Match | None, after: object) -> None:
        """Loads, and tells the engine that it is there, or is not: without a word a request waits for ever."""
        started = time.perf_counter()
        valid, reason = 0, "its lease is over"
        try:
            if match is not None:
                with log.bound(request_id=load.request):
                    valid = self._mover.load(match, load, after)
                reason = match.explain().reason or ""
        except StrataKVError as error:
            reason = str(error)
        except Exception as error:
            # Whatever it is, it costs no request.
            _log.exception("load_failed", "a load failed", request_id=load.request)
            reason = str(error)
        finally:
            valid = max(valid, load.start)
            with self._lock:
                self._counted.add(
                    loaded_tokens=valid - load.start,
                    loaded_bytes=(valid - load.start) * self._geometry.token_bytes,
                    load_seconds=time.perf_counter() - started,
                    failed_tokens=load.stop - valid,
                )
                self._invalid.update(load.pages[valid // self._block : load.stop // self._block].tolist())
                self._received.add(load.request)
                self._under_way -= 1
                self._came.notify_all()
            if match is not None:
                match.release()
        if valid < load.stop:
            _log.warning(
                "load_incomplete",
                "%d of %d tokens are computed: %s",
                load.stop - valid,
                load.stop - load.start,
                reason,
                request_id=load.request,
            )

    # During and after the forward pass.

    def gather_layer(self, step: Step, number: int) -> None:
        """Begins to bring one layer of what this step saves to the host."""
        if not isinstance(self._mover, DeviceMover) or self._broken:
            return
        try:
            for n, save in enumerate(step.saves):
                if n not in self._gathered:
                    self._gathered[n] = self._mover.gather(save.pages[save.start // self._block :])
                self._mover.gather_layer(self._gathered[n], number)
        except Exception:
            # No memory, for one. It costs no request.
            _log.exception("step_not_saved", "this step saves nothing")
            self._broken = True

    def finish(self, step: Step) -> None:
        """Saves what this step computed."""
        for number in range(self._geometry.layers):
            self.gather_layer(step, number)
        stale, self._broken = self._broken or step.number < self._saves_from, False
        gathered, self._gathered = self._gathered, {}
        for n, save in enumerate(step.saves):
            if stale:
                self._saving.pop(save.request, None)
                continue
            try:
                self._save(save, gathered.get(n))
            except Exception:
                _log.exception("save_failed", "%d tokens were not saved", len(save.tokens), request_id=save.request)
                self._saving.pop(save.request, None)
        for request in step.finished:
            self._saving.pop(request, None)

    def _save(self, save: Save, gathered: Gathered | None) -> None:
        state = self._saving.get(save.request)
        if save.start == 0:
            sequence = self._cache.sequence(adapter=save.adapter, tenant=save.tenant)
            state = self._saving[save.request] = _Saving(sequence)
        elif state is None or state.tokens != save.start:
            return
        state.tokens += len(save.tokens)
        if gathered is None:
            self._put(state, save, None)
        elif self._room.acquire(blocking=False):
            self._puts.submit(self._put_behind, state, save, gathered)
        else:
            self._counted.add(refused_tokens=len(save.tokens))
            del self._saving[save.request]

    def _put_behind(self, state: _Saving, save: Save, gathered: Gathered) -> None:
        try:
            self._put(state, save, gathered)
        except Exception:
            _log.exception("save_failed", "%d tokens were not saved", len(save.tokens), request_id=save.request)
        finally:
            self._room.release()

    def _put(self, state: _Saving, save: Save, gathered: Gathered | None) -> None:
        started = time.perf_counter()
        try:
            state.sequence.extend(save.tokens)
            with log.bound(request_id=save.request):
                stored = self._mover.put(self._cache, state.sequence, save.pages, save.start, gathered)  # type: ignore[arg-type]
        except StrataKVError as error:
            _log.warning(
                "save_refused", "%d tokens were not saved: %s", len(save.tokens), error, request_id=save.request
            )
            stored = 0
        new = max(stored - save.start, 0)
        with self._lock:
            self._counted.add(
                saved_tokens=new,
                saved_bytes=new * self._geometry.token_bytes,
                save_seconds=time.perf_counter() - started,
                refused_tokens=len(save.tokens) - new,
            )
            if save.hashes:
                self._announce(state.sequence, save, new // self._block)

    # What the engine is told.

    def received(self, *, idle: bool) -> set[str]:
        """Requests whose loads are over, whether they came or not. An engine that has nothing to do waits for one."""
        with self._lock:
            if idle and self._under_way and not self._received:
                self._came.wait(_IDLE_S)
            out, self._received = self._received, set()
        return out

    def invalid(self) -> set[int]:
        """The engine's blocks that were to be loaded and were not."""
        with self._lock:
            out, self._invalid = self._invalid, set()
        return out

    def counted(self) -> Counted | None:
        """Sums since the last call."""
        with self._lock:
            return self._counted.taken()

    def _announce(self, sequence: TokenSequence, save: Save, blocks: int) -> None:
        """Notes blocks that were stored, by the engine's names for them and ours."""
        names = self._cache.names(sequence)[save.start // self._block :][:blocks]
        for name, engine_name in zip(names, save.hashes, strict=False):
            if engine_name not in self._announced:
                self._saved.stored[engine_name] = 1
            # Stored again after a drop, it has another name, and was never gone to those who listen.
            self._announced[engine_name] = name

    def _held(self, names: list[bytes]) -> list[bool]:
        try:
            return self._cache.held(names)
        except StrataKVError:
            return [False] * len(names)

    def saved(self) -> Saved | None:
        """What was stored since the last call, and which of all that ever was is gone."""
        now = time.monotonic()
        with self._lock:
            if self._announced and now - self._looked >= _LOOK_EVERY_S:
                self._looked = now
                # The oldest, which come last then.
                looked_at = dict(itertools.islice(self._announced.items(), _LOOK_AT))
                for engine_name, held in zip(looked_at, self._held(list(looked_at.values())), strict=True):
                    del self._announced[engine_name]
                    if held:
                        self._announced[engine_name] = looked_at[engine_name]
                    else:
                        self._saved.gone[engine_name] = 1
            if not self._saved.stored and not self._saved.gone:
                return None
            out, self._saved = self._saved, Saved()
        return out

    def close(self) -> None:
        """Ends everything; what is only in RAM is written as far as the time allows."""
        self._answers.close()
        self._loads.shutdown(cancel_futures=True)
        self._puts.shutdown(cancel_futures=True)
        self._leases.release(None)
        self._caches.close()
