"""vLLM's native offloading as its scheduler drives it, but for the GPU: what a chunk holds is written by the test."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

ROW = 16 << 10
_numbers = itertools.count()


def key(number: int, group: int = 0) -> OffloadKey:
    """A key as vLLM makes it, of a digest of 32 bytes and a group."""
    return make_offload_key(np.random.default_rng(number).bytes(32), group)


def content(of: OffloadKey, size: int = ROW) -> np.ndarray:
    """What the chunk of a key holds: every byte depends on all of the key."""
    return np.frombuffer(np.random.default_rng(list(of)).bytes(size), np.uint8)


class Engine:
    """One engine: its spec, its manager, and requests that come and go."""

    def __init__(
        self,
        tiers: list[dict[str, Any]],
        *,
        chunks: int = 16,
        row: int = ROW,
        model: str = "some/model",
        dtype: str = "float16",
        tokens: int = 16,
        events: bool = False,
        replica: tuple[int, int] = (0, 1),
        **extra: Any,
    ) -> None:
        """Builds the manager as the connector does; it opens the tiers."""
        self.id = f"test-{os.getpid()}-{next(_numbers)}"
        self.extra = {"cpu_bytes_to_use": chunks * row, "secondary_tiers": tiers, **extra}
        self.row = row
        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(tokens_per_block=tokens, layer_names=("layer.0",), group_id=0),),
            worker_kv_bytes_per_block=row,
            enable_kv_cache_events=events,
            extra_config=self.extra,
            engine_id=self.id,
            model=OffloadingModelConfig(name=model, dtype=dtype),
            cache=OffloadingCacheConfig(tokens_per_hash=tokens, blocks_per_chunk=1),
            parallel=OffloadingParallelConfig(
                rank=0,
                world_size=1,
                tp_size=1,
                pp_size=1,
                pcp_size=1,
                dcp_size=1,
                data_parallel_index=replica[0],
                data_parallel_size=replica[1],
                data_parallel_rank_local=None,
                is_parallelism_agnostic=False,
            ),
        )
        self.spec = TieringOffloadingSpec(config)
        self.manager = self.spec.get_manager()

    @property
    def memory(self) -> str:
        """The file that vLLM's CPU cache lies in."""
        return f"/dev/shm/vllm_offload_{self.id}.mmap"

    @property
    def tier(self) -> Any:
        return self.manager.secondary_tiers[0]

    @property
    def rows(self) -> np.ndarray:
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def request(self) -> ReqContext:
        request = ReqContext(req_id=f"request-{next(_numbers)}")
        self.manager.on_new_request(request)
        return request

    def step(self, *, wait: bool = True) -> None:
        """The end of a step of the scheduler; transfers that it began are over then, unless told otherwise."""
        self.manager.on_schedule_end(ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))
        if wait:
            for tier in self.manager.secondary_tiers:
                tier.drain_jobs()

    def compute(self, keys: Iterable[OffloadKey], *, wait: bool = True) -> bool:
        """A request that finds nothing, and whose chunks come down from the GPU; false if vLLM has no room for them."""
        request, keys = self.request(), list(keys)
        output = self.manager.prepare_store(keys, request)
        if output is not None:
            for stored, row in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
                self.rows[row] = content(stored, self.row)
            self.manager.complete_store(output.keys_to_store, request)
        self.step(wait=wait)
        self.manager.on_request_finished(request)
        return output is not None

    def ask(self, keys: Iterable[OffloadKey], request: ReqContext | None = None) -> int:
        """Leading chunks that a request finds, promoted to the CPU cache; their bytes are right, or this fails."""
        keys, own = list(keys), request or self.request()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            results = []
            for each in keys:
                results.append(self.manager.lookup(each, own))
                if results[-1] is LookupResult.MISS:
                    break
            self.step()
            if not {LookupResult.HIT_PENDING, LookupResult.RETRY} & set(results):
                break
        else:
            raise AssertionError("the lookup never came to an end")
        found = keys[: results.count(LookupResult.HIT)]
        spec = self.manager.prepare_load(found, own)
        for each, row in zip(found, spec.chunk_ids, strict=True):
            assert np.array_equal(self.rows[row], content(each, self.row)), "wrong bytes"
        self.manager.complete_load(found, own)
        if request is None:
            self.manager.on_request_finished(own)
        return len(found)

    def forget(self) -> None:
        """Empties the CPU cache: what is found then was promoted."""
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):
            self.manager.on_reset_flushed()

    def close(self) -> None:
        self.manager.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
