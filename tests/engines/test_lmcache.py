"""LMCache: what its engine's storage manager puts through the plug-in or the connector comes back, or is a miss.

Everything is driven by LMCache's own storage manager on the CPU, with its own buffer and its own keys. Its connectors
to the memory of a GPU are not run.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
# Both warn about themselves and the hardware that is missing; nothing of it is about the cache.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lmcache")
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.event_manager import EventManager
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.storage_manager import StorageManager
    from lmcache.v1.token_database import ChunkedTokenDatabase

    from stratakv.integrations import lmcache as adapter
    from stratakv.integrations.lmcache import chunks

import stratakv  # noqa: E402 (after the skips)
from stratakv.integrations.engine import EngineVersionError  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

LAYERS, TOKENS, HEADS, DIM = 4, 32, 2, 16
PLUGIN, REMOTE = "stratakv", "RemoteBackend-stratakv"


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As operators of LMCache have to set it."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")


def store_options(folder: Path, **changes: Any) -> dict[str, Any]:
    ssd = {"path": str(folder), "capacity_bytes": "64MiB", "segment_bytes": "1MiB", "policy": "write_through"}
    return {
        "ram": {"capacity_bytes": "8MiB", "eviction": "lru"},
        "ssd": ssd,
        "store": {"threads": 2},
        **changes,
    }


def metadata(**changes: Any) -> LMCacheMetadata:
    latent = changes.get("use_mla", False)
    plain: dict[str, Any] = {
        "model_name": "some/model",
        "world_size": 1,
        "local_world_size": 1,
        "worker_id": 0,
        "local_worker_id": 0,
        "kv_dtype": torch.bfloat16,
        "kv_shape": (LAYERS, 1, TOKENS, 1, 48) if latent else (LAYERS, 2, TOKENS, HEADS, DIM),
        "chunk_size": TOKENS,
        "role": "worker",
    }
    return LMCacheMetadata(**{**plain, **changes})


def engine_config(options: dict[str, Any], remote: bool = False, **changes: Any) -> LMCacheEngineConfig:
    kind, name = ("remote_storage", "StrataConnectorAdapter") if remote else ("storage", "StrataStoragePlugin")
    extra = {
        f"{kind}_plugin.stratakv.module_path": "stratakv.integrations.lmcache",
        f"{kind}_plugin.stratakv.class_name": name,
        "stratakv": options,
        **changes.pop("extra", {}),
    }
    plain = {"chunk_size": TOKENS, "local_cpu": False, "max_local_cpu_size": 0.01, f"{kind}_plugins": ["stratakv"]}
    return LMCacheEngineConfig.from_defaults(**{**plain, **changes}, extra_config=extra)


@contextmanager
def serving(options: dict[str, Any], meta: Any = None, **changes: Any) -> Iterator[StorageManager]:
    """LMCache's storage manager, as its engine makes it."""
    manager = StorageManager(engine_config(options, **changes), meta or metadata(), EventManager())
    try:
        yield manager
    finally:
        manager.close()
        # LMCache stops its loop and leaves it open.
        manager.loop.close()


def keys_of(meta: Any, count: int, seed: int = 0, **changes: Any) -> list[CacheEngineKey]:
    config = LMCacheEngineConfig.from_defaults(chunk_size=TOKENS, **changes)
    tokens = [seed * 1_000_000 + n for n in range(count * TOKENS)]
    return [key for _, _, key in ChunkedTokenDatabase(config, meta).process_tokens(tokens=tokens)]


def put(manager: StorageManager, keys: list[Any], meta: Any = None, seed: int = 0) -> list[Any]:
    """Puts random chunks; returns what they hold, as bytes."""
    meta, chance, wanted = meta or metadata(), torch.Generator().manual_seed(seed), []
    form = MemoryFormat.KV_MLA_FMT if meta.use_mla else MemoryFormat.KV_2LTD
    for key in keys:
        obj = manager.allocate(meta.get_shapes(), meta.get_dtypes(), fmt=form)
        content = torch.randint(0, 256, (obj.get_size(),), dtype=torch.uint8, generator=chance)
        obj.raw_tensor[: len(content)].copy_(content)
        wanted.append(content)
        manager.batched_put([key], [obj])
        assert obj.get_ref_count() == 0 or REMOTE in manager.storage_backends
    return wanted


def one(manager: StorageManager, key: Any, where: str = PLUGIN) -> Any:
    """A single chunk from where it is stored; the manager itself would keep it in its CPU cache as well."""
    return manager.storage_backends[where].get_blocking(key)


def taken(found: list[Any]) -> list[Any]:
    """What objects hold, as bytes; they are given back."""
    held = []
    for obj in found:
        if obj is not None:
            assert obj.get_ref_count() == 1
            held.append(obj.raw_tensor[: obj.get_size()].clone())
            obj.ref_count_down()
        else:
            held.append(None)
    return held


def same(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        got is not None and torch.equal(got, want) for got, want in zip(found, wanted, strict=True)
    )


def buffer_bytes(manager: StorageManager) -> int:
    """Bytes of LMCache's buffer that are free."""
    held = []
    shape = torch.Size([4096])
    while (obj := manager.allocate(shape, torch.uint8, eviction=False, busy_loop=False)) is not None:
        held.append(obj)
    for obj in held:
        obj.ref_count_down()
    return 4096 * len(held)


@pytest.mark.parametrize(
    ("where", "latent", "dtype"),
    [
        (PLUGIN, False, torch.bfloat16),
        (PLUGIN, False, torch.float16),
        (PLUGIN, False, torch.float32),
        (PLUGIN, False, torch.float8_e4m3fn),
        (PLUGIN, True, torch.bfloat16),
        (REMOTE, False, torch.bfloat16),
        (REMOTE, True, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_chunks_come_back_byte_for_byte_after_a_restart_too(
    tmp_path: Path, dtype: Any, latent: bool, where: str
) -> None:
    meta = metadata(kv_dtype=dtype, use_mla=latent)
    keys = keys_of(meta, 6)
    with serving(store_options(tmp_path), meta, remote=where == REMOTE) as manager:
        assert where in manager.list_backends()
        assert manager.batched_contains(keys) == (0, {})
        wanted = put(manager, keys, meta)
        wait_for_puts(manager, where)
        assert manager.batched_contains([*keys, *keys_of(meta, 1, 9)])[0] == 6
        assert same(taken(manager.batched_get(keys, location=where)), wanted)
    with serving(store_options(tmp_path), meta, remote=where == REMOTE) as manager:
        free = buffer_bytes(manager)
        assert manager.batched_contains(keys)[0] == 6
        for _ in range(3):
            assert same(taken(manager.batched_get(keys, location=where)), wanted)
            assert same(taken([one(manager, keys[2], where)]), wanted[2:3])
        assert one(manager, keys_of(meta, 1, 9)[0], where) is None
        assert manager.memcheck()
        assert buffer_bytes(manager) == free


def test_a_chunk_that_is_served_under_another_key_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A control: keys that leave out the prefix.
    monkeypatch.setattr(chunks.Chunks, "key", staticmethod(lambda key: key.model_name.encode()))
    keys = keys_of(metadata(), 3)
    with serving(store_options(tmp_path)) as manager:
        wanted = put(manager, keys)
        assert not same(taken(manager.batched_get(keys, location=PLUGIN)), wanted)


def test_memory_that_is_not_given_back_is_seen(tmp_path: Path) -> None:
    # A control, too.
    keys = keys_of(metadata(), 1)
    with serving(store_options(tmp_path)) as manager:
        put(manager, keys)
        free = buffer_bytes(manager)
        kept = one(manager, keys[0])
        assert buffer_bytes(manager) < free
        kept.ref_count_down()
        assert buffer_bytes(manager) == free


def wait_for_puts(manager: StorageManager, where: str) -> None:
    """The remote backend puts behind: what was submitted to LMCache's loop before is done once all its tasks are."""

    async def settle() -> None:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    if where == REMOTE:
        asyncio.run_coroutine_threadsafe(settle(), manager.loop).result(10)


SENTINEL = CacheEngineKey("none", 1, 0, 1, torch.bfloat16)


def test_the_interface_of_the_plug_in_is_complete(tmp_path: Path) -> None:
    with serving(store_options(tmp_path)) as manager:
        plugin = manager.storage_backends[PLUGIN]
        assert type(plugin).__name__ == "StrataStoragePlugin"
        assert not type(plugin).__abstractmethods__
        assert plugin.get_allocator_backend() is manager.allocator_backend
        [key] = keys_of(metadata(), 1)
        assert not plugin.exists_in_put_tasks(key)
        plugin.touch_cache()
        plugin.cancel_request("r")
        manager.touch_cache()
        done: list[Any] = []
        obj = manager.allocate(metadata().get_shapes(), metadata().get_dtypes())
        plugin.batched_submit_put_task([key], [obj], on_complete_callback=done.append)
        assert done == [key]
        assert obj.get_ref_count() == 1
        obj.ref_count_down()


def test_what_the_plug_in_stored_the_connector_finds(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 3)
    with serving(store_options(tmp_path)) as manager:
        wanted = put(manager, keys)
    with serving(store_options(tmp_path), remote=True) as manager:
        assert same(taken(manager.batched_get(keys, location=REMOTE)), wanted)
        connector = manager.storage_backends[REMOTE].connection
        assert connector.support_ping()
        ask = lambda coro: asyncio.run_coroutine_threadsafe(coro, manager.loop).result(10)  # noqa: E731
        assert ask(connector.ping()) == 0
        assert ask(connector.list()) == []
        assert ask(connector.batched_async_contains("r", keys, True)) == 3
        assert same(taken(ask(connector.batched_get_non_blocking("r", [*keys, SENTINEL]))), wanted)
        assert connector.exists_sync(keys[0])
        assert connector.remove_sync(keys[1])
        assert not connector.exists_sync(keys[1])
        assert connector.batched_contains(keys) == 1


def test_lookups_and_loads_that_do_not_block_find_the_leading_chunks(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 5)
    with serving(store_options(tmp_path)) as manager:
        plugin, wanted = manager.storage_backends[PLUGIN], put(manager, keys)
        free = buffer_bytes(manager)
        assert plugin.remove(keys[3])
        ask = lambda coro: asyncio.run_coroutine_threadsafe(coro, manager.loop).result(10)  # noqa: E731
        assert ask(plugin.batched_async_contains("r", keys, True)) == 3
        found = ask(plugin.batched_get_non_blocking("r", keys))
        assert same(taken(found), wanted[:3])
        manager.batched_unpin(keys, [PLUGIN])
        assert buffer_bytes(manager) == free
        obj = manager.allocate(metadata().get_shapes(), metadata().get_dtypes())
        ask(plugin.async_batched_submit_put_task([keys[3]], [obj]))
        obj.ref_count_down()
        assert manager.batched_contains(keys)[0] == 5


def test_chunks_of_single_layers_are_served(tmp_path: Path) -> None:
    meta = metadata()
    layers = [key.split_layers(LAYERS) for key in keys_of(meta, 2)]
    shape = torch.Size([TOKENS, 2, HEADS * DIM])
    with serving(store_options(tmp_path), use_layerwise=True) as manager:
        wanted: dict[Any, Any] = {}
        for keys in layers:
            objs = manager.batched_allocate(shape, meta.kv_dtype, batch_size=LAYERS, fmt=MemoryFormat.KV_T2D)
            for key, obj in zip(keys, objs, strict=True):
                obj.tensor.copy_(torch.randn(shape))
                wanted[key] = obj.tensor.clone()
            manager.batched_put(keys, objs)
    with serving(store_options(tmp_path), use_layerwise=True) as manager:
        assert manager.contains(layers[0][0]) == PLUGIN
        by_layer = [list(row) for row in zip(*layers, strict=True)]
        for keys, task in zip(by_layer, manager.layerwise_batched_get(by_layer, location=PLUGIN), strict=True):
            objs = task.result(10)
            assert all(torch.equal(obj.tensor, wanted[key]) for key, obj in zip(keys, objs, strict=True))
            taken(objs)


def test_layers_of_several_shapes_make_one_chunk(tmp_path: Path) -> None:
    groups = [
        SimpleNamespace(dtype=dtype, shape_desc=SimpleNamespace(kv_size=2), num_layers=layers, hidden_dim_size=width)
        for dtype, layers, width in ((torch.bfloat16, 3, 32), (torch.float32, 2, 8))
    ]
    meta = metadata()
    meta.kv_layer_groups_manager = SimpleNamespace(kernel_groups=groups, num_kernel_groups=2)
    keys = keys_of(meta, 3)
    with serving(store_options(tmp_path), meta) as manager:
        wanted = put(manager, keys, meta)
    with serving(store_options(tmp_path), meta) as manager:
        found = manager.batched_get(keys, location=PLUGIN)
        assert [obj.get_tensor(1).shape for obj in found] == [torch.Size([2, 2, TOKENS, 8])] * 3
        assert same(taken(found), wanted)


def test_only_whole_chunks_are_stored_and_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    meta = metadata()
    keys = keys_of(meta, 4)
    with serving(store_options(tmp_path)) as manager, caplog.at_level(logging.WARNING, "stratakv"):
        short = [torch.Size([2, LAYERS, TOKENS - 5, HEADS * DIM])]
        others = [
            (short, [meta.kv_dtype], MemoryFormat.KV_2LTD),
            (meta.get_shapes(), [torch.float16], MemoryFormat.KV_2LTD),
            (meta.get_shapes(), meta.get_dtypes(), MemoryFormat.KV_MLA_FMT),
            ([torch.Size([100])], [torch.uint8], MemoryFormat.BINARY_BUFFER),
        ]
        for key, (shapes, dtypes, form) in zip(keys, others, strict=True):
            obj = manager.allocate(shapes, dtypes, fmt=form)
            manager.batched_put([key], [obj])
            # Bytes alone are not counted.
            assert obj.get_ref_count() == (1 if form == MemoryFormat.BINARY_BUFFER else 0)
            assert manager.contains(key) is None
        counts = manager.storage_backends[PLUGIN]._chunks.said.counts
        assert list(counts.values()) == [4]
    assert sum("only whole chunks" in record.message for record in caplog.records) == 1


def test_what_is_pinned_stays_until_it_is_unpinned(tmp_path: Path) -> None:
    alone = store_options(tmp_path, ssd={"enabled": False}, ram={"capacity_bytes": "2MiB", "eviction": "lru"})
    keys = keys_of(metadata(), 4)
    with serving(alone) as manager:
        wanted = put(manager, keys)
        assert manager.contains(keys[0], pin=True) == PLUGIN
        assert manager.batched_contains(keys[:2], pin=True)[0] == 2
        plugin = manager.storage_backends[PLUGIN]
        put(manager, keys_of(metadata(), 200, 1))
        assert [plugin.contains(key) for key in keys] == [True, True, False, False]
        assert same(taken(manager.batched_get(keys[:2], location=PLUGIN)), wanted[:2])
        # The first was pinned twice.
        assert plugin.unpin(keys[0])
        put(manager, keys_of(metadata(), 200, 2))
        assert [plugin.contains(key) for key in keys[:2]] == [True, True]
        manager.batched_unpin(keys[:2])
        assert not plugin.unpin(keys[0])
        put(manager, keys_of(metadata(), 200, 3))
        assert [plugin.contains(key) for key in keys[:2]] == [False, False]
        assert not plugin.pin(keys[0])


def test_the_head_of_a_prompt_outlives_its_tail(tmp_path: Path) -> None:
    alone = store_options(tmp_path, ssd={"enabled": False}, ram={"capacity_bytes": "2MiB", "eviction": "lru"})
    mine = keys_of(metadata(), 80)
    with serving(alone, max_local_cpu_size=0.02) as manager:
        for use in (
            lambda: None,
            lambda: manager.batched_contains(mine),
            lambda: taken(manager.batched_get(mine, location=PLUGIN)),
        ):
            assert manager.clear([PLUGIN]) >= 0
            objs = [manager.allocate(metadata().get_shapes(), metadata().get_dtypes()) for _ in mine]
            manager.batched_put(mine, objs)
            use()
            put(manager, keys_of(metadata(), 80, 1))
            there = [manager.contains(key) == PLUGIN for key in mine]
            assert 0 < sum(there) < 80
            assert there == sorted(there, reverse=True)


def test_removed_and_cleared_chunks_are_not_found_until_they_are_put_again(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 3)
    with serving(store_options(tmp_path)) as manager:
        wanted = put(manager, keys)
        assert manager.batched_remove(keys[1:2], [PLUGIN]) == 1
        assert manager.remove(keys[1], [PLUGIN]) == 0
        assert manager.batched_contains(keys)[0] == 1
        assert one(manager, keys[1]) is None
        assert same(put(manager, keys), wanted)
        assert manager.batched_contains(keys)[0] == 3
        assert manager.clear([PLUGIN]) == 3 * TOKENS
        assert manager.batched_contains(keys)[0] == 0
    with serving(store_options(tmp_path)) as manager:
        assert manager.batched_contains(keys)[0] == 0


def test_a_full_buffer_is_a_miss_and_nothing_leaks(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 8)
    with serving(store_options(tmp_path)) as manager:
        wanted = put(manager, keys)
        free = buffer_bytes(manager)
        held = []
        while (obj := manager.allocate(metadata().get_shapes(), metadata().get_dtypes(), busy_loop=False)) is not None:
            held.append(obj)
        assert manager.batched_get(keys, location=PLUGIN) == [None] * 8
        for obj in held[:3]:
            obj.ref_count_down()
        found = manager.batched_get(keys, location=PLUGIN)
        assert found[3:] == [None] * 5
        assert same(taken(found)[:3], wanted[:3])
        for obj in held[3:]:
            obj.ref_count_down()
        assert buffer_bytes(manager) == free


def test_a_damaged_record_is_a_miss_and_can_be_stored_again(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 10)
    with serving(store_options(tmp_path)) as manager:
        wanted = put(manager, keys)
    damaged = 0
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            content = bytearray(file.read_bytes())
            for number in range(4, 10, 2):
                # The first tokens of one head stand as they were.
                at = content.find(wanted[number].numpy().tobytes()[: DIM * 2])
                if at >= 0:
                    content[at + 5] ^= 0x40
                    damaged += 1
            file.write_bytes(content)
    assert damaged == 3
    with serving(store_options(tmp_path)) as manager:
        found = [taken([one(manager, key)])[0] for key in keys]
        assert [got is None for got in found] == [number in (4, 6, 8) for number in range(10)]
        assert all(got is None or torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
        assert manager.batched_contains(keys)[0] == 4
        assert same(put(manager, keys), wanted)
        assert same(taken(manager.batched_get(keys, location=PLUGIN)), wanted)


def test_with_too_little_ram_threads_see_right_chunks_from_ssd(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 200)
    wrong, right = [], []
    with serving(store_options(tmp_path, ram={"capacity_bytes": "2MiB"}), max_local_cpu_size=0.02) as manager:
        wanted = []
        for first in range(0, 200, 20):
            wanted += put(manager, keys[first : first + 20], seed=first)
            manager.storage_backends[PLUGIN]._chunks.caches.flush()

        def load(thread: int) -> None:
            for number in range(thread, 200, 3):
                [got] = taken([one(manager, keys[number])])
                (right if got is not None and torch.equal(got, wanted[number]) else wrong).append(number)

        def store() -> None:
            put(manager, keys_of(metadata(), 60, 5), seed=5)

        threads = [threading.Thread(target=load, args=(n,)) for n in range(3)] + [threading.Thread(target=store)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = manager.storage_backends[PLUGIN]._chunks.caches.stats()
    assert not wrong
    assert sorted(right) == list(range(200))
    assert stats.tiers["ssd"].hit_blocks > 100


def test_nothing_is_shared_between_keys_that_differ_in_anything(tmp_path: Path) -> None:
    base = {"model_name": "m", "world_size": 2, "worker_id": 0, "chunk_hash": 7, "dtype": torch.bfloat16}
    changes: list[dict[str, Any]] = [
        {},
        {"model_name": "n"},
        {"world_size": 1},
        {"worker_id": 1},
        {"chunk_hash": 8},
        {"chunk_hash": -7},
        {"dtype": torch.float16},
        {"request_configs": {"lmcache.tag.user": "a@b%c"}},
        {"request_configs": {"lmcache.tag.user": "a", "lmcache.tag.b": "c"}},
    ]
    keys = [CacheEngineKey(**{**base, **change}) for change in changes]
    keys += keys[0].split_layers(2)
    with serving(store_options(tmp_path)) as manager:
        for number, key in enumerate(keys):
            assert manager.contains(key) is None
            [want] = put(manager, [key], seed=number)
            assert same(taken([one(manager, key)]), [want])


@pytest.mark.parametrize(
    "change",
    [{"kv_dtype": torch.float16}, {"kv_shape": (LAYERS, 2, TOKENS, 1, 32)}, {"chunk_size": 64}, {"worker_id": 1}],
    ids=str,
)
def test_a_directory_with_chunks_of_another_shape_serves_none_of_them(tmp_path: Path, change: dict[str, Any]) -> None:
    keys = keys_of(metadata(), 2)
    with serving(store_options(tmp_path)) as manager:
        wanted = put(manager, keys)
    with serving(store_options(tmp_path), metadata(**change)) as manager:
        assert PLUGIN in manager.list_backends()
        assert manager.batched_contains(keys)[0] == 0
    with serving(store_options(tmp_path)) as manager:
        assert same(taken(manager.batched_get(keys, location=PLUGIN)), wanted)


def test_a_closed_store_is_a_miss(tmp_path: Path) -> None:
    keys = keys_of(metadata(), 2)
    with serving(store_options(tmp_path)) as manager:
        plugin = manager.storage_backends[PLUGIN]
        put(manager, keys)
        plugin.close()
        plugin.close()
        assert manager.batched_contains(keys)[0] == 0
        assert manager.batched_get(keys, location=PLUGIN) == [None, None]
        put(manager, keys)
        assert not plugin.pin(keys[0])
        assert not plugin.remove(keys[0])
        assert plugin.clear() == 0
        ask = lambda coro: asyncio.run_coroutine_threadsafe(coro, manager.loop).result(10)  # noqa: E731
        assert ask(plugin.batched_async_contains("r", keys)) == 0
        assert ask(plugin.batched_get_non_blocking("r", keys)) == []


# What is refused at the start.


def refused(said: str, options: dict[str, Any], meta: Any = None, **changes: Any) -> None:
    allocator = changes.pop("allocator", object())
    with pytest.raises((stratakv.StrataKVError), match=said):
        adapter.StrataStoragePlugin("cpu", engine_config(options, **changes), meta or metadata(), allocator, None)


def test_a_configuration_that_makes_no_sense_is_refused_with_a_sentence(tmp_path: Path) -> None:
    good = store_options(tmp_path)
    refused("enable_scheduler_bypass_lookup", good, metadata(role="scheduler"))
    refused("max_local_cpu_size", good, allocator=None)
    refused("enable_blending", good, enable_blending=True)
    refused("set kv_cache_dtype", good, metadata(kv_dtype=torch.uint8))
    refused("rams.*ram", {**good, "rams": {}})
    refused(r"extra_config\.stratakv is 'fast', expected a table", "fast")  # type: ignore[arg-type]  # that is the point
    refused("weights_version is 7, expected text", {**good, "weights_version": 7})
    large = metadata(kv_shape=(64, 2, 256, 8, 128), chunk_size=256)
    refused("one block", {**good, "ram": {"capacity_bytes": "1MiB"}}, large)
    latent = metadata(use_mla=True, world_size=2, worker_id=1)
    with pytest.raises(stratakv.ConfigError, match="remote_enable_mla_worker_id_as0"):
        adapter.StrataConnector(engine_config(good), latent, object())
    with pytest.raises(stratakv.ConfigError, match="remote_serde is 'cachegen'"):
        adapter.StrataConnector(engine_config(good, remote_serde="cachegen"), metadata(), object())


def test_keys_that_no_other_process_makes_again_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find, there = importlib.util.find_spec, True
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: (there or None) if name == "vllm" else find(name, *of)
    )
    for there in (True, False):
        for seed in (None, "random"):
            monkeypatch.delenv("PYTHONHASHSEED") if seed is None else monkeypatch.setenv("PYTHONHASHSEED", seed)
            if there:
                refused("PYTHONHASHSEED is not set", store_options(tmp_path))
            else:
                plugin = adapter.StrataStoragePlugin(
                    "cpu", engine_config(store_options(tmp_path)), metadata(), object(), None
                )
                plugin.close()
            monkeypatch.setenv("PYTHONHASHSEED", "0")
    # What LMCache hashes without vLLM needs no seed: integers, and tuples of them.
    program = "print(hash((0, tuple(range(50)), ())))"
    hashes = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True).stdout
        for seed in ("random", "1", "2")
    }
    assert len(hashes) == 1


def test_with_a_directory_in_use_lmcache_goes_on_without(tmp_path: Path) -> None:
    with serving(store_options(tmp_path)) as manager, serving(store_options(tmp_path)) as second:
        assert PLUGIN in manager.list_backends()
        assert PLUGIN not in second.list_backends()
        refused("worker0of1", store_options(tmp_path))
        with serving(store_options(tmp_path), metadata(world_size=2, worker_id=1)) as third:
            assert PLUGIN in third.list_backends()


def test_another_version_of_lmcache_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("stratakv.integrations.lmcache")
    assert spec is not None
    assert spec.loader is not None
    real, found = importlib.metadata.version, ["0.5.5", "0.5.7", "0.6.0", "0.5.6"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found[0] if name == "lmcache" else real(name))
    while found[0] != "0.5.6":
        with pytest.raises(EngineVersionError, match=r"pip install 'lmcache>=0\.5\.6,<0\.5\.7'"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        del found[0]
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
