"""The remote connector of LMCache's engine, for those who have its remote backend in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from stratakv import ConfigError
from stratakv.integrations.lmcache.chunks import Chunks, store_of
from stratakv.integrations.lmcache.objects import leading_objects

__all__ = ["StrataConnector", "StrataConnectorAdapter"]

_T = TypeVar("_T")


class StrataConnector(RemoteConnector):
    """A remote connector of LMCache's engine.

    Args:
        config: LMCache's; options as of `StrataStoragePlugin`.
        metadata: LMCache's: model, ranks, and the shape of a chunk.
        allocator: LMCache's CPU backend.

    Raises:
        ConfigError: an option makes no sense, or nothing that is stored could be found again.
        StrataKVError: as `StrataStoragePlugin`.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheMetadata,
        allocator: Any,  # noqa: ANN401 - LMCache's
    ) -> None:
        super().__init__(config, metadata)
        if config.remote_serde not in (None, "naive"):
            raise ConfigError(f"remote_serde is {config.remote_serde!r}, expected 'naive': the store has codecs itself")
        # Such workers ask for what worker 0 has stored.
        mirrored = metadata.use_mla and metadata.world_size > 1 and metadata.worker_id != 0
        mirrored = mirrored and config.get_extra_config_value("remote_enable_mla_worker_id_as0", True)
        if mirrored and store_of(config, metadata).dragonfly.url is None:
            raise ConfigError(
                "workers of a latent model ask for what worker 0 stores, which is in a directory of its own: set"
                " extra_config.remote_enable_mla_worker_id_as0 to false, or dragonfly.url, a tier that they share"
            )
        self._chunks = Chunks(config, metadata, allocator)

    async def _aside(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._chunks.threads, work)

    async def exists(self, key: CacheEngineKey) -> bool:
        """Whether a chunk is cached."""
        return await self._aside(lambda: self.exists_sync(key))

    def exists_sync(self, key: CacheEngineKey) -> bool:
        """Whether a chunk is cached."""
        return self._chunks.count([key]) == 1

    def support_batched_contains(self) -> bool:
        """Yes."""
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        """How many leading chunks are cached."""
        return self._chunks.count(keys)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """As `batched_contains`, in a thread. LMCache's remote backend never unpins, so nothing is pinned."""
        del lookup_id, pin
        return await self._aside(lambda: self._chunks.count(keys))

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        """A chunk, in memory of LMCache's buffer; ``None`` is a miss."""
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        """Yes."""
        return True

    async def batched_get(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """Chunks of a prompt: behind the first that is missing none is returned."""
        return await self._aside(lambda: self._chunks.get(keys))

    async def batched_get_non_blocking(self, lookup_id: str, keys: list[CacheEngineKey]) -> list[MemoryObj]:
        """The leading chunks that are cached."""
        del lookup_id
        return leading_objects(await self.batched_get(keys))

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        """Stores a whole chunk; LMCache counts the object's reference down afterwards."""
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        """Yes."""
        return True

    async def batched_put(self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]) -> None:
        """Stores whole chunks; LMCache counts their references down afterwards."""
        await self._aside(lambda: self._chunks.put(keys, memory_objs))

    def remove_sync(self, key: CacheEngineKey) -> bool:
        """Has a chunk not be found any more until it is put again; whether it was cached."""
        return self._chunks.remove(key)

    def support_ping(self) -> bool:
        """Yes."""
        return True

    async def ping(self) -> int:
        """0 while the store is open."""
        return await self._aside(self._chunks.ping)

    async def list(self) -> list[str]:
        """Nothing: of a key only its digest is kept."""
        return []

    async def close(self) -> None:
        """Writes what is not on SSD yet, and gives the directory free."""
        await asyncio.get_running_loop().run_in_executor(None, self._chunks.close)


class StrataConnectorAdapter(ConnectorAdapter):
    """Makes the connector, for a remote storage plug-in whose name begins with ``stratakv``."""

    def __init__(self) -> None:
        super().__init__("plugin://stratakv")

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """A connector with what LMCache knows; errors as of the plug-in."""
        return StrataConnector(context.config, context.metadata, context.local_cpu_backend)
