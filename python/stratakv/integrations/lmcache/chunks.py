"""The chunks of one worker of an engine: what the plug-in and the connector have in common.

What is stored is a whole chunk, of the one shape that the engine's metadata tell. A last chunk that is shorter, or what
LMCache has encoded, is not stored, is counted, and is computed again.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.metadata import LMCacheMetadata

from stratakv import Config, ConfigError, log
from stratakv import open as open_store
from stratakv.integrations.engine import KeyedBlocks, close, guarded, leading, settings, text_option
from stratakv.integrations.lmcache.objects import Form, Held, Said, dtype_name

__all__ = ["Chunks", "store_of"]

_log = log.of(__name__)

# Threads that do what LMCache's event loop must not wait for.
_THREADS = 4


class Chunks:
    """The chunks of one worker: what the plug-in and the connector have in common."""

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheMetadata,
        allocator: Any,  # noqa: ANN401 - LMCache's
    ) -> None:
        """Opens the store; `allocator` is LMCache's CPU backend, in whose buffer chunks are returned.

        Raises:
            ConfigError: an option makes no sense, or nothing that is stored could be found again.
            StrataKVError: as `stratakv.open`.
        """
        if metadata is None or metadata.role == "scheduler" or allocator is None:
            raise ConfigError(
                "a store belongs to the process of one worker, the scheduler's cannot look into it: leave"
                " enable_scheduler_bypass_lookup off, and max_local_cpu_size above 0"
            )
        if config.enable_blending:
            raise ConfigError("enable_blending keeps positions beside each chunk, this storage does not: turn it off")
        options = _options(config)
        version, stated = text_option(options, "weights_version"), text_option(options, "kv_cache_dtype")
        self.allocator = allocator
        self.shapes, self.dtypes, self.format = _chunk_of(config, metadata)
        if torch.uint8 in self.dtypes and not stated:
            raise ConfigError(
                "keys and values are bytes, and LMCache does not say in which format: set kv_cache_dtype in"
                " extra_config.stratakv, as fp8_e4m3"
            )
        form = Form(self.shapes, self.dtypes, heads=(metadata.kv_shape[3], metadata.kv_shape[4]))
        self.form, self.chunk_tokens = form, metadata.chunk_size
        store = store_of(config, metadata)
        if store.ssd.enabled or store.dragonfly.url is not None:
            _require_lasting_keys()
        self._name = metadata.model_name or "model"
        self._version = "; ".join(
            [*([version] if version else []), "lmcache", stated or "as typed", self.format.name, form.name]
        )
        self.held, self.said = Held(), Said()
        self.caches = open_store(store)
        try:
            self.blocks = self._registered()
        except BaseException:
            self.caches.close()
            raise
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="stratakv-lmcache")

    def _registered(self) -> KeyedBlocks:
        cache = self.caches.register(self._name, self.form.geometry, weights_version=self._version)
        return KeyedBlocks(cache, self.form.layout)

    @staticmethod
    def key(key: CacheEngineKey) -> bytes:
        """All that a key tells: model, ranks, prefix, type, tags, and the layer where there is one."""
        layer = getattr(key, "layer_id", None)
        told = (
            key.model_name,
            key.world_size,
            key.worker_id,
            key.chunk_hash_hex,
            dtype_name(key.dtype),
            key.tags,
            layer,
        )
        return repr(told).encode()

    def _has(self, key: bytes) -> bool:
        return not self.held.is_removed(key) and self.blocks.has(key)

    def count(self, keys: Sequence[CacheEngineKey], *, pin: bool = False) -> int:
        """How many leading chunks are cached; they are leased if they are to be pinned."""

        def work() -> int:
            names = [self.key(key) for key in keys]
            found = leading(names, self._has)
            if pin:
                for number in reversed(range(found)):
                    if not self._lease(names[number]):
                        found = number
            return found

        return guarded(0, work)

    def _lease(self, name: bytes) -> bool:
        match = None if self.held.is_removed(name) else self.blocks.lease(name)
        if match is not None:
            self.held.lease(name, match)
        return match is not None

    def pin(self, key: CacheEngineKey) -> bool:
        """Leases a chunk; whether it is cached."""
        return guarded(False, lambda: self._lease(self.key(key)))

    def unpin(self, key: CacheEngineKey) -> bool:
        """Gives a lease of a chunk free; whether there was one."""
        return guarded(False, lambda: self.held.release(self.key(key)))

    def get(self, keys: Sequence[CacheEngineKey]) -> list[MemoryObj | None]:
        """The leading chunks that are cached, each in memory of LMCache's buffer that the caller gives back."""
        found: list[MemoryObj | None] = [None] * len(keys)

        def work() -> None:
            names = [self.key(key) for key in keys]
            # Memory in the order of the prompt, so that what there is goes to its head; then from the end to the head,
            # which was used last.
            for number in range(leading(names, self._has)):
                # Waiting for memory could wait for this very call.
                obj = self.allocator.allocate(self.shapes, self.dtypes, self.format, eviction=True, busy_loop=False)
                if obj is None:
                    self.said("LMCache's buffer is full: chunks that are cached count as missing")
                    break
                found[number] = obj
            for number in reversed(range(len(keys))):
                obj = found[number]
                if obj is not None and not self._load(names[number], obj):
                    found[number] = None
                    obj.ref_count_down()

        try:
            work()
        except Exception as problem:
            _log.warning("store_unusable", "a miss: the store could not be used: %s", problem)
            for number, obj in enumerate(found):
                if obj is not None:
                    obj.ref_count_down()
                    found[number] = None
        return found

    def _load(self, name: bytes, obj: MemoryObj) -> bool:
        tensors = self.form.tensors(obj)
        return tensors is not None and self.blocks.load(name, tensors)

    def put(self, keys: Sequence[CacheEngineKey], objs: Sequence[MemoryObj]) -> None:
        """Stores whole chunks, last to first; others are counted."""
        for key, obj in reversed(list(zip(keys, objs, strict=True))):
            guarded(None, lambda key=key, obj=obj: self._put(key, obj))  # type: ignore[misc]  # bound as it is now

    def _put(self, key: CacheEngineKey, obj: MemoryObj) -> None:
        tensors = self.form.tensors(obj) if obj.get_memory_format() == self.format else None
        if tensors is None:
            self.said(f"only whole chunks of {self.form.name} are stored, others are computed again")
            return
        name = self.key(key)
        if self.blocks.put(name, tensors):
            self.held.restore(name)
        else:
            self.said("there is no room in RAM for a chunk: it is not stored")

    def remove(self, key: CacheEngineKey) -> bool:
        """Has a chunk not be found any more in this process, until it is put again; whether it was cached."""

        def work() -> bool:
            name = self.key(key)
            there = self._has(name)
            if there:
                self.held.remove(name)
            return there

        return guarded(False, work)

    def clear(self) -> int:
        """Forgets all chunks of the model, on every tier; how many tokens that were, at least."""

        def work() -> int:
            tiers = self.blocks.cache.stats().tiers
            blocks: int = max(tier.blocks for tier in tiers.values())
            self.held.release_all()
            try:
                self.caches.unregister(self._name)
            finally:
                self.blocks = self._registered()
            return blocks * int(self.chunk_tokens)

        return guarded(0, work)

    def ping(self) -> int:
        """0 while the store is open, else 1."""

        def work() -> int:
            self.caches.status()
            return 0

        return guarded(1, work)

    def close(self) -> None:
        """Writes what is not on SSD yet, and gives the directory free; again does nothing."""
        self.threads.shutdown()
        self.held.release_all()
        close(self.caches)


def _options(config: LMCacheEngineConfig) -> dict[str, Any]:
    """Our table of LMCache's options."""
    options = (config.extra_config or {}).get("stratakv") or {}
    if not isinstance(options, dict):
        raise ConfigError(f"extra_config.stratakv is {options!r}, expected a table")
    return dict(options)


def store_of(config: LMCacheEngineConfig, metadata: LMCacheMetadata) -> Config:
    """The configuration of one worker's store.

    Raises:
        ConfigError: an option makes no sense.
    """
    options = {k: v for k, v in _options(config).items() if k not in ("weights_version", "kv_cache_dtype")}
    return settings(options, "lmcache", f"worker{metadata.worker_id}of{metadata.world_size}")


def _chunk_of(
    config: LMCacheEngineConfig, metadata: LMCacheMetadata
) -> tuple[list[torch.Size], list[torch.dtype], MemoryFormat]:
    """Shapes, types and format of a whole chunk; layer by layer, of one layer of it."""
    tokens, (_, _, _, heads, dim) = metadata.chunk_size, metadata.kv_shape
    if config.use_layerwise:
        shape = torch.Size([tokens, heads * dim] if metadata.use_mla else [tokens, 2, heads * dim])
        return [shape], [metadata.kv_dtype], MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_T2D
    form = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
    return metadata.get_shapes(), metadata.get_dtypes(), form


def _require_lasting_keys() -> None:
    """Refuses keys that another process would not make again.

    LMCache hashes integers, which needs no seed; but beside vLLM its first hash comes from vLLM, which draws it by
    chance unless ``PYTHONHASHSEED`` is set.

    Raises:
        ConfigError: they are drawn by chance.
    """
    seed = os.environ.get("PYTHONHASHSEED", "random")
    if importlib.util.find_spec("vllm") is not None and not seed.isdigit():
        raise ConfigError(
            "PYTHONHASHSEED is not set: vLLM then draws the start of all keys by chance, and after a restart nothing"
            " that is stored would be found; export PYTHONHASHSEED=0 before the engine starts, or set ssd.enabled to"
            " false"
        )
