"""SGLang: the storage behind HiCache, loaded by name as its ``dynamic`` backend.

    device pool ◀─▶ host pool of SGLang ──set──▶ RAM ──▶ SSD, and the tier that nodes share
                        ▲                          │
                        └──────────get─────────────┘

A page of SGLang is a block here, under the key that SGLang made of it, which names the whole prefix, its extra key and
its salt. Bytes go between the pool's memory and the store without a copy in between: a pool is a strided tensor, and
its layout only says in which order the axes stand, so what was stored from one layout loads into any other.

The invariant: what a page holds after a get that says true is what was put under that key by a process with the same
model, shard, format and page size. Anything else is a miss. A problem of the cache is logged and is a miss, too; only
what is wrong with the configuration raises, and that when the backend is attached.

A pool that is not plain keys and values, such as the states of Mamba or the index of sparse attention, is kept as the
bytes that SGLang itself says a page consists of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from stratakv.integrations.engine import KeyedBlocks, close, guarded, leading, require, settings, text_option

VERSION = require("sglang", "0.5.23", "0.5.24")

import ctypes  # noqa: E402 - another version of SGLang is refused before it is imported
import time  # noqa: E402
from collections import deque  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.observability.metrics_collector import StorageMetrics  # noqa: E402
from sglang.srt.runtime_context import get_model, get_parallel  # noqa: E402

from stratakv import CacheManager, ConfigError, Geometry, log  # noqa: E402
from stratakv import open as open_store  # noqa: E402

__all__ = ["StrataHiCache"]

_log = log.of(__name__)

# Axes of a host pool's memory, outermost first; without P those of the flat page that the older calls pass.
_AXES = {
    "layer_first": "KLPNHD",
    "page_first": "KPNLHD",
    "page_first_direct": "KPLNHD",
    "page_head": "KPHNLD",
    "page_unified": "PLKNHD",
}

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# What SGLang itself reads from the table of options.
_ENGINE_OPTIONS = {
    "backend_name",
    "class_name",
    "hicache_storage_pass_prefix_keys",
    "interface_v1",
    "module_path",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "tp_lcm_size",
}

# Transfers whose figures are kept until SGLang asks for them.
_KEPT_FIGURES = 1024


class _Piece:
    """What of each page is one block: its cache, and where it lies."""

    def __init__(self, name: str, version: str, geometry: Geometry, layout: str, suffix: bytes = b"") -> None:
        self.name, self.version, self.geometry, self.layout, self.suffix = name, version, geometry, layout, suffix
        self.blocks: KeyedBlocks | None = None

    def open(self, caches: CacheManager) -> None:
        """Registers it."""
        cache = caches.register(self.name, self.geometry, weights_version=self.version)
        self.blocks = KeyedBlocks(cache, self.layout)


class _Pool(ABC):
    """A host pool: the pieces of its pages, and where they lie."""

    def __init__(self, pool: Any, pieces: Sequence[_Piece], *, replicated: bool) -> None:  # noqa: ANN401 - SGLang's
        self.pool = pool
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        self.size = int(pool.size)
        self.pieces = pieces
        # Whether every rank of tensor parallelism holds the same.
        self.replicated = replicated
        self.page_bytes = sum(piece.geometry.block_bytes for piece in pieces)

    @abstractmethod
    def tensors(self, start: int) -> Iterator[tuple[object, object]]:
        """Of the page that begins at a slot: for each piece the tensors, and the page table where they have one."""

    def starts(self, slots: torch.Tensor | None, pages: int) -> list[int]:
        """The first slot of each page.

        Raises:
            ValueError: the slots are not whole pages of this pool, one after the other.
        """
        size = self.page_size
        if slots is None or slots.numel() != pages * size:
            raise ValueError(f"{0 if slots is None else slots.numel()} slots for {pages} pages of {size}")
        if not pages:
            return []
        table = slots.detach().to("cpu", torch.int64).reshape(pages, size)
        first = table[:, 0]
        whole = (table == first[:, None] + torch.arange(size)).all() and (first % size == 0).all()
        if not whole or int(first.min()) < 0 or int(first.max()) + size > self.size:
            raise ValueError(f"slots that are no whole pages of {size}, or lie outside of {self.size}")
        starts: list[int] = first.tolist()
        return starts

    def has(self, key: bytes) -> bool:
        """Whether all of a page is cached."""
        return all(piece.blocks is not None and piece.blocks.has(key + piece.suffix) for piece in self.pieces)

    def load(self, key: bytes, start: int) -> bool:
        """Copies a page into the pool; false is a miss, after which what it holds is undefined."""
        return all(
            piece.blocks is not None and piece.blocks.load(key + piece.suffix, kv, table)
            for piece, (kv, table) in zip(self.pieces, self.tensors(start), strict=True)
        )

    def put(self, key: bytes, start: int) -> bool:
        """Stores a page; false if there was no room."""
        return all(
            piece.blocks is not None and piece.blocks.put(key + piece.suffix, kv, table)
            for piece, (kv, table) in zip(self.pieces, self.tensors(start), strict=True)
        )


class _Planes(_Pool):
    """Keys and values, or one latent plane, in one tensor whose axes are known."""

    def __init__(self, pool: Any, name: str, version: str, shards: tuple[int, int, int], *, replicated: bool) -> None:  # noqa: ANN401
        """`shards`: the number of the first piece, how many there are in this pool, and in the whole model."""
        latent = isinstance(pool, MLATokenToKVPoolHost)
        first, pieces, _ = shards
        heads = 1 if latent else int(pool.head_num)
        self._sizes = {
            "K": 1 if latent else 2,
            "L": int(pool.layer_num),
            "P": int(pool.page_num),
            "N": int(pool.page_size),
            "H": heads,
            "D": int(pool.kv_cache_dim if latent else pool.head_dim),
        }
        self._axes = _AXES[pool.layout]
        self._dtype = pool.kv_buffer.dtype
        self._own = self._view(pool.kv_buffer, self._axes)
        geometry = Geometry(
            layers=self._sizes["L"],
            kv_heads=heads // pieces,
            head_dim=self._sizes["D"],
            dtype=_DTYPES.get(self._dtype, "uint8"),  # type: ignore[arg-type]  # they are its names
            block_tokens=self._sizes["N"],
            planes=self._sizes["K"],
        )
        suffixes = [b"/heads%d" % number if shards[2] else b"" for number in range(first, first + pieces)]
        super().__init__(
            pool,
            [_Piece(name, version, geometry, self._axes, suffix) for suffix in suffixes],
            replicated=replicated,
        )
        self._pieces = self._split(self._own, self._axes)

    def _view(self, buffer: torch.Tensor, axes: str) -> torch.Tensor:
        """Memory as a tensor of these axes, of a type that the store knows."""
        if self._dtype not in _DTYPES:
            buffer = buffer.view(torch.uint8)
        return buffer.view([self._sizes[axis] for axis in axes])

    def _split(self, whole: torch.Tensor, axes: str) -> list[torch.Tensor]:
        """The heads of each piece."""
        return list(whole.tensor_split(len(self.pieces), dim=axes.index("H")))

    def tensors(self, start: int) -> Iterator[tuple[object, object]]:
        """As declared."""
        table = (start // self.page_size,)
        return ((piece, table) for piece in self._pieces)

    def flat(self, page: torch.Tensor) -> list[torch.Tensor] | None:
        """A flat page of the older calls as tensors of `flat_axes`; ``None`` if it is none of this pool."""
        if page.device.type != "cpu" or not page.is_contiguous() or page.dtype != self._dtype:
            return None
        if page.numel() * page.element_size() != self.page_bytes:
            return None
        axes = self.flat_axes
        return self._split(self._view(page, axes), axes)

    @property
    def flat_axes(self) -> str:
        """Axes of a flat page."""
        return self._axes.replace("P", "")


class _Extents(_Pool):
    """Stretches of memory, as SGLang lists them for one page: what a page consists of, whatever it is."""

    def __init__(self, pool: Any, name: str, version: str, *, replicated: bool) -> None:  # noqa: ANN401 - SGLang's
        """Asks for the first page.

        Raises:
            ConfigError: SGLang does not list the memory of this pool's pages, or not all of it.
        """
        self.pool, self.page_size = pool, int(getattr(pool, "page_size", 1) or 1)
        try:
            self._extent_bytes = self._list(0)[1]
        except (NotImplementedError, ValueError, AssertionError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"the pool {name!r} of SGLang ({type(pool).__name__}, layout {getattr(pool, 'layout', None)}) cannot be"
                f" stored: {str(error) or 'it lists no memory'}; start SGLang with --hicache-mem-layout"
                " page_first_direct, or without this storage"
            ) from error
        told = int(getattr(pool, "size_per_token", 0)) * self.page_size
        if not self._extent_bytes or told != sum(self._extent_bytes):
            raise ConfigError(
                f"the pool {name!r} of SGLang ({type(pool).__name__}) lists {sum(self._extent_bytes)} bytes of a page"
                f" that has {told}: it cannot be stored; start SGLang without this storage"
            )
        # Neighbours of one size share a block, each as one of its layers.
        self._runs: list[tuple[int, int]] = []
        for number, size in enumerate(self._extent_bytes):
            if number and size == self._extent_bytes[number - 1]:
                self._runs[-1] = (self._runs[-1][0], number + 1)
            else:
                self._runs.append((number, number + 1))
        pieces = []
        for number, (first, end) in enumerate(self._runs):
            width = self._width(self._extent_bytes[first])
            geometry = Geometry(
                layers=end - first,
                kv_heads=1,
                head_dim=width,
                dtype="uint8",
                block_tokens=self._extent_bytes[first] // width,
                planes=1,
            )
            title = name if len(self._runs) == 1 else f"{name}.{number}"
            pieces.append(_Piece(title, version, geometry, "HND"))
        super().__init__(pool, pieces, replicated=replicated)

    @staticmethod
    def _width(size: int) -> int:
        """Bytes that count as one token: as many tokens as a key has words, where that divides."""
        return size // 16 if size % 16 == 0 else size

    def _list(self, start: int) -> tuple[list[int], list[int]]:
        """Addresses and bytes of one page."""
        addresses, sizes = self.pool.get_page_buffer_meta(torch.arange(start, start + self.page_size))
        return list(addresses), [int(size) for size in sizes]

    def tensors(self, start: int) -> Iterator[tuple[object, object]]:
        """As declared."""
        addresses, sizes = self._list(start)
        if sizes != self._extent_bytes:
            raise ValueError(f"a page of {sizes} bytes, where the first had {self._extent_bytes}")
        for first, end in self._runs:
            yield [[self._array(addresses[number], sizes[number])] for number in range(first, end)], None

    def _array(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Memory of the pool, as one head of some tokens."""
        memory = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(memory).reshape(1, -1, self._width(size))


class StrataHiCache(HiCacheStorage):
    """The L3 storage of HiCache in a stratakv store.

    Args:
        storage_config: SGLang's: model, ranks and ``extra_config``, the table of
            ``--hicache-storage-backend-extra-config``. In it stand sections of `stratakv.Config` (``ram``, ``ssd``,
            ``dragonfly``, ...), ``config``, a TOML file that is read first, ``weights_version``, which names the
            weights where the model's name does not, and ``kv_cache_dtype``, where SGLang does not tell which 8-bit
            format it holds.
        kwargs: what SGLang passes on; it is not used.

    Raises:
        ConfigError: an option makes no sense, or nothing that is stored could be found again.
        StoreLockedError: another process holds the directory.
        StrataKVError: as `stratakv.open`.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        del kwargs
        self._config = storage_config
        options = {k: v for k, v in (storage_config.extra_config or {}).items() if k not in _ENGINE_OPTIONS}
        self._weights_version = text_option(options, "weights_version")
        self._format = text_option(options, "kv_cache_dtype")
        if storage_config.dcp_size > 1:
            raise ConfigError("decode context parallelism is not supported by this storage: use --dcp-size 1")
        ranks = f"tp{storage_config.tp_rank}of{storage_config.tp_size}-pp{storage_config.pp_rank}"
        ranks += f"-cp{storage_config.attn_cp_rank}-dp{_replica()}.{storage_config.dp_rank}"
        config = settings(options, "sglang", ranks)
        if storage_config.is_mla_model and storage_config.tp_size > 1 and config.dragonfly.url is None:
            raise ConfigError(
                f"of {storage_config.tp_size} ranks that hold the same latent planes SGLang has one store them, and a"
                " prefix counts as found where all of them find it: a directory of their own each is not enough. Set"
                " dragonfly.url and store.secret, a tier that they share, or serve with --tp-size 1"
            )
        if not (storage_config.extra_config or {}).get("interface_v1"):
            _log.warning(
                "interface_v1_not_set", '"interface_v1": 1 is not set: SGLang copies every page once more on its way'
            )
        self._pools: dict[str, _Pool] = {}
        self._figures: dict[str, deque[tuple[int, float]]] = {
            way: deque(maxlen=_KEPT_FIGURES) for way in ("get", "set")
        }
        self._caches: CacheManager | None = open_store(config)

    # What SGLang registers.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:  # noqa: ANN401 - a pool of SGLang
        """Takes the geometry of blocks from the pool of keys and values.

        Raises:
            ConfigError: the pool cannot be stored, a page has more than 4096 tokens, or a tier is smaller than one.
            InputError: likewise.
        """
        super().register_mem_pool_host(mem_pool_host)
        self._register(PoolName.KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:  # noqa: ANN401 - likewise
        """Takes a further pool of a hybrid model; errors as for `register_mem_pool_host`."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        known = self._pools.get(str(host_pool_name))
        if known is None or known.pool is not host_pool:
            self._register(host_pool_name, host_pool)

    def _register(self, name: str, pool: Any) -> None:  # noqa: ANN401 - likewise
        if self._caches is None:
            raise ConfigError("the storage was closed; attach it anew")
        made = self._describe(str(name), pool)
        for piece in made.pieces:
            piece.open(self._caches)
        self._pools[str(name)] = made
        _log.info(
            "pool_registered",
            "%s %s: pages of %d bytes, %s",
            made.pieces[0].name,
            name,
            made.page_bytes,
            made.pieces[0].version,
            model=made.pieces[0].name,
        )

    def _describe(self, name: str, pool: Any) -> _Pool:  # noqa: ANN401 - likewise
        """What of a pool is stored, and under which namespace."""
        config = self._config
        if getattr(pool, "shared_allocation_domain", None) is not None or getattr(pool, "stores_page_envelope", False):
            raise ConfigError(
                f"the pool {name!r} of SGLang moves its pages about ({type(pool).__name__}): it cannot be stored;"
                " start SGLang without unified memory, or without this storage"
            )
        if getattr(pool, "dcp_size", 1) > 1:
            raise ConfigError("decode context parallelism is not supported by this storage: use --dcp-size 1")
        plain = type(pool) in (MHATokenToKVPoolHost, MLATokenToKVPoolHost) and pool.layout in _AXES
        if plain and pool.layout == "page_unified":
            plain = getattr(pool, "head_group_num", 1) == 1
        if plain and (pool.kv_buffer is None or pool.kv_buffer.device.type != "cpu"):
            raise ConfigError(f"the pool {name!r} of SGLang is not in the memory of the host: it cannot be stored")
        # Where attention is latent, all ranks hold the same of it; but not of states, nor of keys and values beside it.
        replicated = config.is_mla_model and name != PoolName.MAMBA and type(pool) is not MHATokenToKVPoolHost
        pieces, total = 1, 0
        if plain and type(pool) is MHATokenToKVPoolHost and pool.layout == "page_head" and config.tp_lcm_size:
            # Ranks of another number find them: of each page a block for each share of heads.
            total = int(config.tp_lcm_size)
            pieces = total // config.tp_size
            if total % config.tp_size or pool.head_num % pieces:
                raise ConfigError(f"tp_lcm_size is {total}, expected a multiple of {config.tp_size} that divides heads")
        shard = f"heads in {total}" if total else f"tp {config.tp_rank} of {config.tp_size}"
        latent = isinstance(pool, MLATokenToKVPoolHost)
        version = [
            *([self._weights_version] if self._weights_version else []),
            "sglang",
            type(pool).__name__ if not plain else "latent" if latent else "keys and values",
            _format_name(pool, self._format),
            f"page {getattr(pool, 'page_size', 1)}",
            "every tp" if replicated else shard,
            f"pp {config.pp_rank} of {config.pp_size}",
            f"layers {getattr(pool, 'start_layer', None)} to {getattr(pool, 'end_layer', None)}",
            f"cp {config.attn_cp_rank} of {config.attn_cp_size}",
        ]
        title = (config.model_name or "model") + ("" if name == PoolName.KV else f"#{name}")
        if plain:
            shards = (config.tp_rank * pieces, pieces, total)
            return _Planes(pool, title, "; ".join(version), shards, replicated=replicated)
        # Their bytes stand as SGLang has them, so that their order is part of what they are.
        version.append(f"layout {getattr(pool, 'layout', None)}")
        return _Extents(pool, title, "; ".join(version), replicated=replicated)

    # Zero copy.

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many leading pages are stored."""
        del extra_info
        return guarded(0, lambda: self._leading(self._pools[PoolName.KV], keys))

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Reads pages into the pool.

        Args:
            keys: of the pages, in the order of the prompt.
            host_indices: their slots in the pool, all of each.
            extra_info: not used; a key names its prefix.

        Returns:
            Of each page whether it is there now.
        """
        del extra_info
        return self._transfer("get", PoolName.KV, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Stores pages of the pool; arguments as of `batch_get_v1`. Of each whether it is stored."""
        del extra_info
        return self._transfer("set", PoolName.KV, keys, host_indices)

    # Hybrid models.

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """How many leading pages are stored in all pools that a prefix needs, and at which lengths it may end."""
        del extra_info
        return guarded(PoolTransferResult(0, {}, []), lambda: self._restorable(list(keys), list(pool_transfers or ())))

    def _restorable(self, keys: list[str], transfers: list[PoolTransfer]) -> PoolTransferResult:
        found = self._leading(self._pools[PoolName.KV], keys)
        hits: dict[str, int] = {PoolName.KV: found} if found else {}
        ends = set(range(1, found + 1))
        for transfer in transfers:
            pool = self._pools.get(str(transfer.name))
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                # Such a pool never decides how long a prefix is, and nothing of it is offered.
                continue
            there = [False] * found
            if pool is not None:
                for number in reversed(range(found)):
                    there[number] = pool.has(keys[number].encode())
            window = found
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
            good = {end for end in range(1, found + 1) if all(there[max(0, end - window) : end])}
            if good:
                hits[transfer.name] = max(good)
            ends &= good
        return PoolTransferResult(max(ends, default=0), hits, sorted(ends))

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Reads pages of several pools; of each pool and page whether it is there now."""
        del extra_info
        return {each.name: self._transfer("get", each.name, each.keys or [], each.host_indices) for each in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Stores pages of several pools; of each pool and page whether it is stored."""
        del extra_info
        return {each.name: self._transfer("set", each.name, each.keys or [], each.host_indices) for each in transfers}

    # The older calls, which pass flat pages.

    def exists(self, key: str) -> bool:
        """Whether a page is stored."""
        return guarded(False, lambda: self._pools[PoolName.KV].has(key.encode()))

    def get(
        self,
        key: str,
        target_location: torch.Tensor | None = None,
        target_sizes: Any = None,  # noqa: ANN401 - the engine's
    ) -> torch.Tensor | None:
        """Reads a page into a flat tensor, in the order of the pool's layout; ``None`` is a miss."""
        return self.batch_get([key], [target_location], target_sizes)[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor | None] | None = None,
        target_sizes: Any = None,  # noqa: ANN401 - the engine's
    ) -> list[torch.Tensor | None]:
        """As `get`, of several pages."""
        del target_sizes
        found: list[torch.Tensor | None] = [None] * len(keys)
        targets = list(target_locations or [None] * len(keys))
        for number in reversed(range(len(keys))):
            target = targets[number]
            if target is None and self._pools:
                target = guarded(None, self.mem_pool_host.get_dummy_flat_data_page)
            if target is not None and self._flat("load", keys[number], target):
                found[number] = target
        return found

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: torch.Tensor | None = None,
        target_sizes: Any = None,  # noqa: ANN401 - the engine's
    ) -> bool:
        """Stores a flat page; false if there was no room."""
        del target_sizes
        page = target_location if value is None else value
        if not self._config.is_storage_writer:
            return True
        return page is not None and self._flat("put", key, page.contiguous())

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any = None,  # noqa: ANN401 - the engine's
    ) -> bool:
        """As `set`, of several pages; false if one was not stored."""
        del target_sizes
        pages = target_locations if values is None else values
        if pages is None or len(pages) != len(keys):
            return False
        # Whatever becomes of one, the others are stored.
        return sum(self.set(key, page) for key, page in reversed(list(zip(keys, pages, strict=True)))) == len(keys)

    def _flat(self, way: str, key: str, page: torch.Tensor) -> bool:
        """Loads or puts a flat page."""

        def work() -> bool:
            pool = self._pools[PoolName.KV]
            tensors = pool.flat(page) if isinstance(pool, _Planes) else None
            if not isinstance(pool, _Planes) or tensors is None:
                raise ValueError("a page that is none of the pool's: set interface_v1")
            done = True
            for piece, kv in zip(pool.pieces, tensors, strict=True):
                blocks = None if piece.blocks is None else KeyedBlocks(piece.blocks.cache, pool.flat_axes)
                done = done and blocks is not None and bool(getattr(blocks, way)(key.encode() + piece.suffix, kv))
            return done

        return guarded(False, work)

    # What both share.

    def _leading(self, pool: _Pool, keys: Sequence[str]) -> int:
        return leading([key.encode() for key in keys], pool.has)

    def _transfer(self, way: str, name: str, keys: Sequence[str], slots: torch.Tensor | None) -> list[bool]:
        """Gets or sets pages, last to first, so that the head of a prompt is what was used last."""
        done = [False] * len(keys)

        def work() -> None:
            pool = self._pools[str(name)]
            if way == "set" and pool.replicated and not self._config.is_storage_writer:
                # One rank stores what all of them hold.
                done[:] = [True] * len(keys)
                return
            begun = time.perf_counter()
            move = pool.load if way == "get" else pool.put
            starts = pool.starts(slots, len(keys))
            for number in reversed(range(len(keys))):
                done[number] = move(keys[number].encode(), starts[number])
            if self._config.enable_storage_metrics and any(done):
                pages, taken = sum(done), time.perf_counter() - begun
                self._figures[way].append((pages, pages * pool.page_bytes / max(taken, 1e-9) / 1e9))

        guarded(None, work)
        return done

    # The rest of the interface.

    def clear(self) -> bool:
        """Forgets all pages of this model, on every tier; whether that was done."""

        def work() -> bool:
            caches = self._caches
            if caches is None:
                return False
            pieces = [piece for pool in self._pools.values() for piece in pool.pieces]
            try:
                for name in {piece.name for piece in pieces}:
                    caches.unregister(name)
            finally:
                for piece in pieces:
                    piece.open(caches)
            return True

        return guarded(False, work)

    def get_stats(self) -> StorageMetrics:
        """Pages and GB/s of the transfers since the last call, for SGLang's own metrics."""
        metrics = StorageMetrics()
        for way, pages, rates in (
            ("get", metrics.prefetch_pgs, metrics.prefetch_bandwidth),
            ("set", metrics.backup_pgs, metrics.backup_bandwidth),
        ):
            figures = self._figures[way]
            while figures:
                count, rate = figures.popleft()
                pages.append(count)
                rates.append(rate)
        return metrics

    def close(self) -> None:
        """Writes what is not on SSD yet, and gives the directory free; again does nothing."""
        caches, self._caches = self._caches, None
        if caches is not None:
            close(caches)


def _replica() -> int:
    """Which replica of data parallelism this process belongs to."""
    try:
        return int(getattr(get_parallel(), "dp_rank", None) or 0)
    except (RuntimeError, ValueError, AttributeError):
        return 0


def _format_name(pool: Any, stated: str) -> str:  # noqa: ANN401 - a pool of SGLang
    """Names the format of elements: of those that SGLang keeps as bytes, too, of which there is more than one.

    Raises:
        ConfigError: it is not known.
    """
    dtype = getattr(pool, "dtype", None)
    if stated or dtype is not torch.uint8:
        return stated or str(dtype).removeprefix("torch.")
    try:
        return f"kv_cache_dtype {get_model().kv_cache_dtype}"
    except (RuntimeError, ValueError, AttributeError):
        raise ConfigError(
            "SGLang holds keys and values as bytes and does not say in which format: set kv_cache_dtype in"
            " --hicache-storage-backend-extra-config, as fp8_e4m3"
        ) from None
