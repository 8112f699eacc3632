"""The scheduler's side: asks the workers what they have, and tells them what to load and save.

A request is matched when the engine asks, as often as it asks: the match is leased for that step and given back at its
end if nothing came of it. What was found is always loaded behind: until all workers have told that it is there, the
engine neither computes on it nor shows it to other requests. What a request has computed is saved block by block, as
soon as the block is whole and its tokens are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from stratakv import log
from stratakv.integrations.vllm.messages import Address, Counted, Load, Save, Saved, Step
from stratakv.integrations.vllm.model import Namespaces
from stratakv.integrations.vllm.ranks import Found, Ranks

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


_log = log.of(__name__)

# Blocks that wait for all workers to have stored them; beyond that, events of some are not sent.
_MOST_TOLD = 100_000


class _Known:
    """A request, its namespace, and how far it was saved."""

    __slots__ = ("failed", "namespace", "pages", "request", "saved", "tiers")

    def __init__(self, request: Request, namespace: tuple[str, str] | None) -> None:
        self.request, self.namespace, self.saved = request, namespace, 0
        # What is loaded for it, where that comes from, and whether it did not come: then it is not tried again.
        self.pages: frozenset[int] = frozenset()
        self.tiers: dict[str, int] = {}
        self.failed = False


class Scheduler:
    """What is asked, loaded and saved."""

    def __init__(
        self, block_tokens: int, namespaces: Namespaces, *, loads: bool, saves: bool, decoded: bool, events: bool
    ) -> None:
        """Of an engine whose workers are not known yet.

        Args:
            block_tokens: tokens of one of the engine's blocks.
            namespaces: of its requests.
            loads: whether prompts are looked for.
            saves: whether what was computed is saved.
            decoded: whether that includes what was generated.
            events: whether blocks are announced.
        """
        self._block, self._may_load, self._may_save = block_tokens, loads, saves
        self._namespaces = namespaces
        self._decoded, self._announces = decoded, events
        self._ranks = Ranks([])
        self._workers = 0
        self._number = 0
        self._known: dict[str, _Known] = {}
        self._found: dict[str, tuple[int, Found]] = {}
        self._loads: list[Load] = []
        self.counted = Counted()
        self._events: list[KVCacheEvent] = []
        # Stored blocks that not all workers have told of, and what an event says of each.
        self._partly: dict[bytes, int] = {}
        self._told: dict[bytes, BlockStored] = {}

    def connect(self, addresses: list[Address]) -> None:
        """Tells it its workers."""
        self._ranks, self._workers = Ranks(addresses), len(addresses)

    def add(self, request: Request) -> _Known:
        """A request, once."""
        known = self._known.get(request.request_id)
        if known is None or known.request is not request:
            known = self._known[request.request_id] = _Known(request, self._namespaces.of(request))
        return known

    def matched(self, request: Request, computed: int) -> int:
        """Tokens that can be loaded beyond those computed."""
        known = self.add(request)
        # The last token is always computed, to say what follows it.
        asked = (request.num_tokens - 1) // self._block * self._block
        if not self._may_load or known.namespace is None or known.failed or request.skip_reading_prefix_cache:
            return 0
        if asked <= computed:
            return 0
        tokens = np.array(request.all_token_ids[:asked], np.uint32)
        found = self._ranks.match(request.request_id, self._number, tokens, *known.namespace)
        self._found[request.request_id] = (asked - computed, found)
        return max(found.tokens // self._block * self._block - computed, 0)

    def allocated(self, request: Request, blocks: KVCacheBlocks, tokens: int) -> None:
        """The engine has made room for so many of the tokens that were found."""
        found = self._found.pop(request.request_id, None)
        if found is not None:
            self.counted.add(asked_tokens=found[0], hit_tokens=tokens)
        if not tokens:
            return
        ids = blocks.get_block_ids()[0]
        # What was not found in this step is told all the same: the workers say that it did not come.
        tiers = found[1].tiers if found is not None else {}
        stop = (found[1].tokens if found is not None else len(ids) * self._block) // self._block * self._block
        pages = np.array(ids[: stop // self._block], np.uint32)
        self._loads.append(Load(request.request_id, stop - tokens, stop, pages))
        known = self.add(request)
        known.tiers, known.pages = tiers, frozenset(pages[(stop - tokens) // self._block :].tolist())

    def sources(self, request: Request) -> dict[str, int]:
        """Tokens of the last match by tier."""
        return self.add(request).tiers

    def step(self, output: SchedulerOutput) -> Step:
        """What the workers do in this step."""
        step = Step(
            number=self._number,
            loads=self._loads,
            finished=frozenset(output.finished_req_ids),
            idle=not output.total_num_scheduled_tokens,
        )
        self._number += 1
        self._loads = []
        self._found.clear()
        try:
            self._plan_saves(step, output)
        except Exception:
            # What is not saved is a later miss; the loads of this step have to be told.
            _log.exception("step_not_saved", "this step saves nothing")
        return step

    def _plan_saves(self, step: Step, output: SchedulerOutput) -> None:
        for name in output.finished_req_ids:
            self._known.pop(name, None)
        # These have other blocks now than they had: what is known of the old ones is worth nothing.
        again = {*output.scheduled_cached_reqs.resumed_req_ids, *(new.req_id for new in output.scheduled_new_reqs)}
        for name in again & self._known.keys():
            self._known[name].saved = 0
        state = output.kv_connector_block_state
        if self._may_save and state is not None:
            for name, scheduled in output.num_scheduled_tokens.items():
                known = self._known.get(name)
                if known is not None and known.namespace is not None:
                    save = self._save(known, known.request.num_computed_tokens + scheduled, state.get_block_ids)
                    if save is not None:
                        step.saves.append(save)

    def _save(self, known: _Known, computed: int, block_ids: object) -> Save | None:
        """What is new of a request when so many of its tokens are computed: whole blocks of tokens that are known."""
        request = known.request
        most = request.num_tokens if self._decoded else request.num_prompt_tokens
        stop = min(computed, most) // self._block * self._block
        start = known.saved
        if stop <= start:
            return None
        ids = block_ids(request.request_id)  # type: ignore[operator]  # a method of the engine's
        if not ids or len(ids[0]) * self._block < stop:
            return None
        known.saved = stop
        tokens = np.array(request.all_token_ids[start:stop], np.uint32)
        blocks = slice(start // self._block, stop // self._block)
        hashes = tuple(request.block_hashes[blocks]) if self._announces else ()
        if hashes:
            self._describe(request, start, hashes)
        assert known.namespace is not None
        return Save(
            request.request_id, *known.namespace, start, tokens, np.array(ids[0][: blocks.stop], np.uint32), hashes
        )

    def _describe(self, request: Request, start: int, hashes: tuple[bytes, ...]) -> None:
        """Prepares what events say of some blocks."""
        lora = request.lora_request
        first = start // self._block
        if len(self._told) > _MOST_TOLD:
            self._told.clear()
        for n, name in enumerate(hashes):
            if self._partly.get(name, 0) >= self._workers:
                continue
            parent = request.block_hashes[first + n - 1] if first + n else None
            at = start + n * self._block
            self._told[name] = BlockStored(
                block_hashes=[maybe_convert_block_hash(name)],
                parent_block_hash=maybe_convert_block_hash(parent) if parent is not None else None,
                token_ids=list(request.all_token_ids[at : at + self._block]),
                block_size=self._block,
                lora_id=lora.lora_int_id if lora else None,
                medium=MEDIUM_CPU,
                lora_name=lora.lora_name if lora else None,
            )

    def after(self, output: KVConnectorOutput) -> None:
        """What came of a step."""
        if output.invalid_block_ids:
            # What failed once would be found again, and again: it is computed.
            for known in self._known.values():
                known.failed |= not known.pages.isdisjoint(output.invalid_block_ids)
        meta = output.kv_connector_worker_meta
        if isinstance(meta, Saved):
            for name, count in meta.stored.items():
                self._partly[name] = self._partly.get(name, 0) + count
                if self._partly[name] >= self._workers and (event := self._told.pop(name, None)) is not None:
                    self._events.append(event)
            gone = []
            for name, count in meta.gone.items():
                before = self._partly.pop(name, 0)
                if before > count:
                    self._partly[name] = before - count
                if before >= self._workers:
                    gone.append(name)
            if gone:
                names = [maybe_convert_block_hash(name) for name in gone]
                self._events.append(BlockRemoved(block_hashes=names, medium=MEDIUM_CPU))

    def events(self) -> Iterable[KVCacheEvent]:
        """Events since the last call."""
        out, self._events = self._events, []
        return out

    def reset(self) -> bool:
        """Has the workers forget everything."""
        for known in self._known.values():
            known.saved = 0
        return self._ranks.reset(self._number)

    def close(self) -> None:
        """Ends the connections."""
        self._ranks.close()
