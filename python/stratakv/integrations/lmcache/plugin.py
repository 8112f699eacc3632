"""The storage plug-in of LMCache's engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from stratakv.integrations.engine import guarded
from stratakv.integrations.lmcache.chunks import Chunks
from stratakv.integrations.lmcache.objects import leading_objects

__all__ = ["StrataStoragePlugin"]

_T = TypeVar("_T")


class StrataStoragePlugin(StoragePluginInterface):
    """A storage plug-in of LMCache's engine, beside its CPU and disk backends.

    Options stand in ``extra_config["stratakv"]``: sections of `stratakv.Config` (``ram``, ``ssd``, ...), ``config``, a
    TOML file that is read first, ``weights_version`` and, where keys and values are bytes, ``kv_cache_dtype``.

    Raises:
        ConfigError: an option makes no sense, or nothing that is stored could be found again.
        StoreLockedError: another process holds the directory.
        StrataKVError: as `stratakv.open`.
    """

    def __init__(
        self,
        dst_device: str = "cpu",
        config: LMCacheEngineConfig | None = None,
        metadata: LMCacheMetadata | None = None,
        local_cpu_backend: Any = None,  # noqa: ANN401 - LMCache's
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        self._chunks = Chunks(config, metadata, local_cpu_backend)

    def __str__(self) -> str:
        return "StrataStoragePlugin"

    def contains(self, key: CacheEngineKey, pin: bool = False) -> bool:
        """Whether a chunk is cached; it is leased if it is to be pinned."""
        return self._chunks.count([key], pin=pin) == 1

    def batched_contains(self, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """How many leading chunks are cached."""
        return self._chunks.count(keys, pin=pin)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """As `batched_contains`, in a thread."""
        del lookup_id
        return await self._aside(lambda: self._chunks.count(keys, pin=pin), 0)

    def exists_in_put_tasks(self, key: CacheEngineKey) -> bool:
        """Never: a put is done when it returns."""
        del key
        return False

    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,  # noqa: ANN401 - LMCache's
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> None:
        """Stores whole chunks: they are in RAM when this returns, and the objects are the caller's again."""
        del transfer_spec
        self._chunks.put(keys, objs)
        for key in keys if on_complete_callback is not None else ():
            guarded(None, lambda key=key: on_complete_callback(key))  # type: ignore[misc]  # bound as it is now

    async def async_batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,  # noqa: ANN401 - LMCache's
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> None:
        """As `batched_submit_put_task`, in a thread."""
        await self._aside(lambda: self.batched_submit_put_task(keys, objs, transfer_spec, on_complete_callback), None)

    def get_blocking(self, key: CacheEngineKey) -> MemoryObj | None:
        """A chunk, in memory of LMCache's buffer; the caller counts its reference down. ``None`` is a miss."""
        return self._chunks.get([key])[0]

    def batched_get_blocking(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """As `get_blocking`, of several chunks of a prompt: behind the first that is missing none is returned."""
        return self._chunks.get(keys)

    async def batched_get_non_blocking(
        self,
        lookup_id: str,
        keys: list[CacheEngineKey],
        transfer_spec: Any = None,  # noqa: ANN401 - LMCache's
    ) -> list[MemoryObj]:
        """The leading chunks that are cached, loaded in a thread."""
        del lookup_id, transfer_spec
        return await self._aside(lambda: leading_objects(self._chunks.get(keys)), [])

    async def _aside(self, work: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._chunks.threads, work)
        except RuntimeError:
            # The storage was closed.
            return otherwise

    def pin(self, key: CacheEngineKey) -> bool:
        """Leases a chunk; whether it is cached."""
        return self._chunks.pin(key)

    def unpin(self, key: CacheEngineKey) -> bool:
        """Gives a lease free; whether there was one."""
        return self._chunks.unpin(key)

    def remove(self, key: CacheEngineKey, force: bool = True) -> bool:
        """Has a chunk not be found any more until it is put again; whether it was cached. Its bytes are evicted."""
        del force
        return self._chunks.remove(key)

    def clear(self) -> int:
        """Forgets all chunks of the model on every tier; how many tokens that were, at least."""
        return self._chunks.clear()

    def touch_cache(self) -> None:
        """Nothing: each use counts when it happens."""

    def get_allocator_backend(self) -> Any:  # noqa: ANN401 - LMCache's
        """LMCache's CPU backend."""
        return self._chunks.allocator

    def close(self) -> None:
        """Writes what is not on SSD yet, and gives the directory free; again does nothing."""
        self._chunks.close()
