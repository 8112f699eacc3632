"""The L2 adapter of LMCache's server: tasks that are submitted, done in threads, and told by event descriptors.

    submit ─▶ a thread ─▶ the result stands where it is asked for ─▶ the descriptor is readable

What a lookup finds is leased until it is unlocked: at most so many keys, the oldest give way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface, L2TaskId
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from stratakv.integrations.engine import KeyedBlocks, close, guarded, open_caches, text_option
from stratakv.integrations.lmcache.objects import Form, Held, Said, layout_of

__all__ = ["StrataL2Adapter"]

# Threads that do what is submitted.
_THREADS = 4
# Layouts of objects that are stored.
_LAYOUTS = 64

_T = TypeVar("_T")


class StrataL2Adapter(L2AdapterInterface):
    """An L2 adapter of LMCache's server, of type ``plugin``.

    Args:
        params: ``adapter_params``: sections of `stratakv.Config`, ``config``, ``weights_version``, ``kv_cache_dtype``.
        l1_memory_desc: where LMCache's L1 lies; not needed.

    Raises:
        ConfigError: an option makes no sense.
        StoreLockedError: another process holds the directory.
        StrataKVError: as `stratakv.open`.
    """

    def __init__(self, params: Mapping[str, Any], l1_memory_desc: object = None) -> None:
        # The store evicts by itself: LMCache is told no capacity that it should keep to.
        super().__init__(max_capacity_bytes=0)
        del l1_memory_desc
        options = dict(params)
        self._version, self._format = text_option(options, "weights_version"), text_option(options, "kv_cache_dtype")
        self._caches = open_caches(options, "lmcache-server")
        self._held, self._said = Held(), Said()
        # By model, shapes and types.
        self._blocks: dict[tuple[str, object], tuple[Form, KeyedBlocks]] = {}
        self._registering = threading.Lock()
        self._lock = threading.Lock()
        self._tasks = 0
        self._stored: dict[L2TaskId, L2StoreResult] = {}
        self._looked: dict[L2TaskId, Bitmap] = {}
        self._loaded: dict[L2TaskId, Bitmap] = {}
        self._store_fd, self._look_fd, self._load_fd = (create_event_notifier() for _ in range(3))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="stratakv-lmcache")
        self._open = True

    def get_store_event_fd(self) -> int:
        """Readable when stores are done."""
        return int(self._store_fd.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when lookups are done."""
        return int(self._look_fd.fileno())

    def get_load_event_fd(self) -> int:
        """Readable when loads are done."""
        return int(self._load_fd.fileno())

    def _submit(self, done: dict[L2TaskId, _T], notifier: Any, otherwise: _T, work: Callable[[], _T]) -> L2TaskId:  # noqa: ANN401
        """Has something done in a thread; its result stands in `done` before the event is seen."""
        with self._lock:
            task = self._tasks
            self._tasks += 1

        def run() -> None:
            result = guarded(otherwise, work)
            with self._lock:
                done[task] = result
            notifier.notify()

        try:
            self._threads.submit(run)
        except RuntimeError:
            # The adapter was closed.
            with self._lock:
                done[task] = otherwise
        return task

    @staticmethod
    def _key(key: ObjectKey) -> bytes:
        told = (key.chunk_hash, key.model_name, key.kv_rank, key.object_group_id, key.cache_salt)
        return repr(told).encode()

    def _place(
        self, model: str, shapes: Sequence[torch.Size], dtypes: Sequence[Any]
    ) -> tuple[Form, KeyedBlocks] | None:
        """Where a model's objects of one layout are stored; ``None`` if they are not."""
        which = (model, (tuple(shapes), tuple(dtypes)))
        known = self._blocks.get(which)
        if known is not None:
            return known
        if torch.uint8 in dtypes and len(shapes[0]) > 1 and not self._format:
            self._said("keys and values are bytes of an unknown format: set kv_cache_dtype to have them stored")
            return None
        form = Form(shapes, dtypes)
        with self._registering:
            if len(self._blocks) >= _LAYOUTS:
                self._said(f"more than {_LAYOUTS} layouts of objects: further ones are not stored")
                return None
            digest = blake2b(form.name.encode(), digest_size=4).hexdigest()
            version = [self._version] if self._version else []
            version += ["lmcache server", self._format or "as typed", form.name]
            cache = self._caches.register(f"{model}#{digest}", form.geometry, weights_version="; ".join(version))
            return self._blocks.setdefault(which, (form, KeyedBlocks(cache, form.layout)))

    def _of(self, key: ObjectKey, obj: MemoryObj) -> tuple[KeyedBlocks, object] | None:
        """Where an object is stored, and its memory; ``None`` if it is not stored."""
        place = self._place(key.model_name, *layout_of(obj))
        tensors = None if place is None else place[0].tensors(obj)
        if place is None or tensors is None:
            self._said("objects that are encoded, or not in the memory of the host, are not stored")
            return None
        return place[1], tensors

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Stores objects; the task fails if one of them was not stored."""

        def work() -> L2StoreResult:
            stored: list[tuple[ObjectKey, int]] = []
            for key, obj in reversed(list(zip(keys, objects, strict=True))):
                of = self._of(key, obj)
                if of is not None and of[0].put(self._key(key), of[1]):
                    self._held.restore(self._key(key))
                    stored.append((key, obj.get_size()))
            sizes = [size for _, size in stored]
            if stored:
                self._notify_keys_stored([key for key, _ in stored], sizes)
            return L2StoreResult(len(stored) == len(keys), sum(sizes))

        return self._submit(self._stored, self._store_fd, L2StoreResult(False, 0), work)

    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]:
        """Stores that are done, each once."""
        with self._lock:
            done = dict(self._stored)
            self._stored.clear()
        return done

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> L2TaskId:
        """Leases those of the objects that are cached, until `submit_unlock`."""

        def work() -> Bitmap:
            found, used = Bitmap(len(keys)), []
            for number in reversed(range(len(keys))):
                key = keys[number]
                name = self._key(key)
                if self._held.is_removed(name):
                    continue
                for blocks in self._candidates(key, group_layout_descs.get(key.object_group_id)):
                    match = blocks.lease(name)
                    if match is not None:
                        self._held.lease(name, match)
                        found.set(number)
                        used.append(key)
                        break
            if used:
                self._notify_keys_accessed(used)
            return found

        return self._submit(self._looked, self._look_fd, Bitmap(len(keys)), work)

    def _candidates(self, key: ObjectKey, told: MemoryLayoutDesc | None) -> list[KeyedBlocks]:
        """Where an object may be: in its layout, if that is told, else in those that are known of its model."""
        if told is not None and told.shapes:
            place = self._place(key.model_name, told.shapes, told.dtypes)
            return [] if place is None else [place[1]]
        return [blocks for (model, _), (_, blocks) in list(self._blocks.items()) if model == key.model_name]

    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None:
        """Which objects of a lookup are cached, once; ``None``: it is not done."""
        with self._lock:
            return self._looked.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Gives the leases of a lookup free."""
        for key in keys:
            self._held.release(self._key(key))

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Loads objects into memory that the caller keeps until the task is done."""

        def work() -> Bitmap:
            found = Bitmap(len(keys))
            for number in reversed(range(len(keys))):
                name = self._key(keys[number])
                of = None if self._held.is_removed(name) else self._of(keys[number], objects[number])
                if of is not None and of[0].load(name, of[1]):
                    found.set(number)
            return found

        return self._submit(self._loaded, self._load_fd, Bitmap(len(keys)), work)

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        """Which objects of a load are there, once; ``None``: it is not done."""
        with self._lock:
            return self._loaded.pop(task_id, None)

    def delete(self, keys: list[ObjectKey]) -> None:
        """Has objects not be found any more until they are stored again; their bytes leave by eviction."""
        for key in keys:
            self._held.remove(self._key(key))
        self._notify_keys_deleted(keys, [0] * len(keys))

    def get_usage(self) -> AdapterUsage:
        """Bytes that the store holds, and may hold: of the SSD where there is one, else of RAM."""
        tier = "ssd" if self._caches.config.ssd.enabled else "ram"
        used = guarded(0, lambda: self._caches.stats().tiers[tier].used_bytes)
        return AdapterUsage(used, int(getattr(self._caches.config, tier).capacity_bytes))

    def report_status(self) -> dict[str, Any]:
        """Whether the store is open, what it did, and what was not stored and why."""
        stats = guarded(None, self._caches.stats) if self._open else None
        if stats is None:
            return {"is_healthy": False, "type": "StrataL2Adapter"}
        return {
            "is_healthy": True,
            "type": "StrataL2Adapter",
            "hit_blocks": stats.hit_blocks,
            "asked_blocks": stats.asked_blocks,
            "put_blocks": stats.put_blocks,
            "leased_keys": len(self._held),
            "said": self._said.counts,
        }

    def close(self) -> None:
        """Ends what is under way, and gives the directory free; again does nothing."""
        if not self._open:
            return
        self._open = False
        self._threads.shutdown()
        self._held.release_all()
        close(self._caches)
        for notifier in (self._store_fd, self._look_fd, self._load_fd):
            notifier.close()
