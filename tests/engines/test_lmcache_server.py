"""LMCache's server: what its storage manager stores through the L2 adapter, its prefetches find again.

The storage manager, its controllers and the memory of L1 are LMCache's own; the adapter is loaded as its plug-ins are.
"""

from __future__ import annotations

import json
import select
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
# Both warn about themselves and the hardware that is missing; nothing of it is about the cache.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lmcache")
    from lmcache.cli.commands.bench.l2_adapter_bench.data import make_memory_objects, make_object_keys
    from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
    from lmcache.v1.distributed.config import DRAML1ManagerConfig, EvictionConfig, StorageManagerConfig
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
    from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
    from lmcache.v1.distributed.storage_manager import StorageManager
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
    from lmcache.v1.platform import consume_fd

import stratakv  # noqa: E402 (after the skips)

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

LAYOUT = MemoryLayoutDesc(shapes=[torch.Size([2, 4, 32, 64])], dtypes=[torch.bfloat16])
HYBRID = MemoryLayoutDesc(
    shapes=[torch.Size([2, 4, 32, 64]), torch.Size([1, 2, 32, 8])], dtypes=[torch.bfloat16, torch.float32]
)


def plugin(folder: Path, **changes: Any) -> PluginL2AdapterConfig:
    options = {
        "ram": {"capacity_bytes": "16MiB", "eviction": "lru"},
        "ssd": {"path": str(folder), "capacity_bytes": "64MiB", "segment_bytes": "1MiB", "policy": "write_through"},
        "store": {"threads": 2},
        **changes,
    }
    told = {
        "module_path": "stratakv.integrations.lmcache",
        "class_name": "StrataL2Adapter",
        "adapter_params": options,
    }
    return PluginL2AdapterConfig.from_dict(json.loads(json.dumps(told)))


@contextmanager
def serving(folder: Path, **changes: Any) -> Iterator[StorageManager]:
    eviction = EvictionConfig(eviction_policy="noop")
    dram = DRAML1ManagerConfig.from_dict({"tag": "_default", "size_gb": 0.03, "use_lazy": False}, eviction)
    manager = StorageManager(
        StorageManagerConfig(
            l1_manager_config=dram,
            eviction_config=eviction,
            l2_adapter_config=L2AdaptersConfig([plugin(folder, **changes)]),
        )
    )
    try:
        yield manager
    finally:
        manager.close()


@contextmanager
def alone(folder: Path, **changes: Any) -> Iterator[Any]:
    adapter = create_l2_adapter(plugin(folder, **changes))
    try:
        yield adapter
    finally:
        adapter.close()


def keys_of(count: int, seed: int = 0, **changes: Any) -> list[Any]:
    plain = {"model_name": "some/model", "kv_rank": 1, "object_group_id": 0, "cache_salt": ""}
    return [
        ObjectKey(chunk_hash=bytes([seed]) * 24 + number.to_bytes(8, "big"), **{**plain, **changes})
        for number in range(count)
    ]


def objects(count: int, layout: Any = LAYOUT, seed: int | None = None) -> list[Any]:
    """Objects in memory of their own, of random bytes if there is a seed."""
    made = []
    size = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))
    chance = torch.Generator().manual_seed(seed or 0)
    for number in range(count):
        raw = torch.zeros(size, dtype=torch.uint8)
        if seed is not None:
            raw.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=chance))
        meta = MemoryObjMetadata(
            shape=layout.shapes[0],
            dtype=layout.dtypes[0],
            address=number * size,
            phy_size=size,
            ref_count=1,
            fmt=MemoryFormat.KV_2LTD,
            shapes=list(layout.shapes),
            dtypes=list(layout.dtypes),
        )
        made.append(TensorMemoryObj(raw_data=raw, metadata=meta, parent_allocator=None))
    return made


def waited(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(10_000)
    consume_fd(fd)


def stored(adapter: Any, keys: list[Any], objs: list[Any]) -> Any:
    task = adapter.submit_store_task(keys, objs)
    done: dict[int, Any] = {}
    while task not in done:
        waited(adapter.get_store_event_fd())
        done |= adapter.pop_completed_store_tasks()
    return done[task]


def looked(adapter: Any, keys: list[Any], layouts: dict[int, Any]) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(keys, layouts)
    while (found := adapter.query_lookup_and_lock_result(task)) is None:
        waited(adapter.get_lookup_and_lock_event_fd())
    assert adapter.query_lookup_and_lock_result(task) is None
    return [found.test(number) for number in range(len(keys))]


def loaded(adapter: Any, keys: list[Any], objs: list[Any]) -> list[bool]:
    task = adapter.submit_load_task(keys, objs)
    while (found := adapter.query_load_result(task)) is None:
        waited(adapter.get_load_event_fd())
    return [found.test(number) for number in range(len(keys))]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(ours, theirs, strict=True))


def until(done: Any) -> None:
    """Waits for what LMCache's own threads do."""
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "LMCache did not come to an end"
        time.sleep(0.01)


def adapter_of(manager: StorageManager) -> Any:
    [(_, adapter)] = manager.l2_adapters()
    return adapter


@pytest.mark.parametrize("layout", [LAYOUT, HYBRID], ids=["one shape", "two shapes"])
def test_what_the_server_stored_another_server_prefetches(tmp_path: Path, layout: Any) -> None:
    keys, wanted = keys_of(5), {}
    with serving(tmp_path) as manager:
        for number, (key, obj) in enumerate(manager.reserve_write(keys, layout).items()):
            chance = torch.Generator().manual_seed(number)
            content = torch.randint(0, 256, (obj.get_size(),), dtype=torch.uint8, generator=chance)
            obj.raw_tensor[: len(content)].copy_(content)
            wanted[key] = content
        assert len(wanted) == 5
        manager.finish_write(keys)
        until(lambda: adapter_of(manager).report_status()["put_blocks"] == 5)
    with serving(tmp_path) as manager:
        row = GroupedObjectKeys(keys=[*keys, *keys_of(1, 9)], object_group_id=0, layout_desc=layout)
        handle = manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
        assert manager.wait_prefetch_status(handle, 20)
        result = manager.query_prefetch_status(handle)
        assert [row.popcount() for row in result.l2_hit_cells] == [5]
        with manager.read_prefetched_results(keys) as found:
            assert found is not None
            for key, obj in zip(keys, found, strict=True):
                assert torch.equal(obj.raw_tensor[: obj.get_size()], wanted[key])
        manager.finish_read_prefetched(keys)
        # Whatever a lookup leased has been unlocked.
        until(lambda: adapter_of(manager).report_status()["leased_keys"] == 0)
        assert manager.get_l2_usages()


def test_each_event_has_a_descriptor_of_its_own_and_each_result_comes_once(tmp_path: Path) -> None:
    keys, objs = keys_of(4), objects(4, seed=1)
    with alone(tmp_path) as adapter:
        descriptors = {
            adapter.get_store_event_fd(),
            adapter.get_lookup_and_lock_event_fd(),
            adapter.get_load_event_fd(),
        }
        assert len(descriptors) == 3
        result = stored(adapter, keys, objs)
        assert result.is_successful()
        assert result.bytes_transferred() == sum(obj.get_size() for obj in objs)
        assert adapter.pop_completed_store_tasks() == {}
        assert looked(adapter, [keys[0], *keys_of(2, 9), keys[3]], {0: LAYOUT}) == [True, False, False, True]
        into = objects(6)
        assert loaded(adapter, [*keys, *keys_of(2, 9)], into) == [True] * 4 + [False] * 2
        assert same(into[:4], objs)
        assert adapter.query_load_result(77) is None
        adapter._caches.flush()
        usage = adapter.get_usage()
        assert 0 < usage.total_bytes_used < usage.total_capacity_bytes == 64 << 20
        assert not adapter.supports_global_eviction


def test_what_a_lookup_found_stays_until_it_is_unlocked(tmp_path: Path) -> None:
    keys, objs = keys_of(3), objects(3, seed=1)
    small = {"ssd": {"enabled": False}, "ram": {"capacity_bytes": "2MiB", "eviction": "lru"}}
    with alone(tmp_path, **small) as adapter:
        assert stored(adapter, keys, objs).is_successful()
        assert looked(adapter, keys[:2], {0: LAYOUT}) == [True, True]
        for seed in range(2, 5):
            stored(adapter, keys_of(40, seed), objects(40, seed=seed))
        assert adapter.report_status()["leased_keys"] == 2
        into = objects(3)
        assert loaded(adapter, keys, into) == [True, True, False]
        assert same(into[:2], objs[:2])
        adapter.submit_unlock(keys[:2])
        adapter.submit_unlock(keys[:2])
        assert adapter.report_status()["leased_keys"] == 0
        for seed in range(5, 8):
            stored(adapter, keys_of(40, seed), objects(40, seed=seed))
        assert looked(adapter, keys, {0: LAYOUT}) == [False] * 3


def test_keys_that_differ_in_anything_share_nothing_nor_do_layouts(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"model_name": "other"},
        {"kv_rank": 2},
        {"object_group_id": 1},
        {"cache_salt": "tenant"},
    ]
    keys = [keys_of(1, **change)[0] for change in changes]
    with alone(tmp_path) as adapter:
        for number, key in enumerate(keys):
            assert looked(adapter, [key], {0: LAYOUT, 1: LAYOUT}) == [False]
            objs = objects(1, seed=number)
            assert stored(adapter, [key], objs).is_successful()
            into = objects(1)
            assert loaded(adapter, [key], into) == [True]
            assert same(into, objs)
        # The same bytes in another type or shape are another object.
        for other in (
            MemoryLayoutDesc(shapes=LAYOUT.shapes, dtypes=[torch.float16]),
            MemoryLayoutDesc(shapes=[torch.Size([2, 4, 64, 32])], dtypes=LAYOUT.dtypes),
        ):
            assert looked(adapter, keys[:1], {0: other}) == [False]
            assert loaded(adapter, keys[:1], objects(1, other)) == [False]
        # Where no layout is told, those that are known are asked.
        assert looked(adapter, keys[:1], {}) == [True]


def test_deleted_objects_are_not_found_until_they_are_stored_again(tmp_path: Path) -> None:
    keys, objs = keys_of(2), objects(2, seed=1)
    with alone(tmp_path) as adapter:
        stored(adapter, keys, objs)
        adapter.delete(keys[:1])
        assert looked(adapter, keys, {0: LAYOUT}) == [False, True]
        assert loaded(adapter, keys, objects(2)) == [False, True]
        assert stored(adapter, keys, objs).is_successful()
        assert looked(adapter, keys, {0: LAYOUT}) == [True, True]


def test_the_objects_of_lmcaches_own_bench_come_back(tmp_path: Path) -> None:
    keys, buffer = make_object_keys(8), torch.zeros(2 * 8 * 65_536, dtype=torch.uint8)
    with alone(tmp_path) as adapter:
        ours = make_memory_objects(buffer, 8, 65_536, 0)
        assert stored(adapter, keys, ours).is_successful()
        into = make_memory_objects(buffer, 8, 65_536, 8 * 65_536, fill_offset=100)
        assert not same(into, ours)
        assert loaded(adapter, keys, into) == [True] * 8
        assert same(into, ours)


def test_objects_that_are_encoded_or_of_an_unknown_format_are_not_stored(tmp_path: Path) -> None:
    eight = MemoryLayoutDesc(shapes=LAYOUT.shapes, dtypes=[torch.uint8])
    with alone(tmp_path) as adapter:
        [narrowed] = objects(1, seed=1)
        narrowed.set_used_size(100)
        assert not stored(adapter, keys_of(1), [narrowed]).is_successful()
        assert not stored(adapter, keys_of(1), objects(1, eight, seed=1)).is_successful()
        assert looked(adapter, keys_of(1), {0: eight}) == [False]
        assert looked(adapter, keys_of(1), {0: LAYOUT}) == [False]
        said = adapter.report_status()["said"]
        assert any("set kv_cache_dtype" in reason for reason in said)
        assert any("encoded" in reason for reason in said)
    with alone(tmp_path, kv_cache_dtype="fp8_e4m3") as adapter:
        objs, into = objects(1, eight, seed=1), objects(1, eight)
        assert stored(adapter, keys_of(1), objs).is_successful()
        assert loaded(adapter, keys_of(1), into) == [True]
        assert same(into, objs)
    with alone(tmp_path, kv_cache_dtype="fp8_e5m2") as adapter:
        assert looked(adapter, keys_of(1), {0: eight}) == [False]


def test_a_closed_adapter_finds_nothing_and_stores_nothing(tmp_path: Path) -> None:
    with alone(tmp_path) as adapter:
        stored(adapter, keys_of(1), objects(1, seed=1))
        adapter.close()
        adapter.close()
        store = adapter.submit_store_task(keys_of(1), objects(1))
        look = adapter.submit_lookup_and_lock_task(keys_of(1), {0: LAYOUT})
        load = adapter.submit_load_task(keys_of(1), objects(1))
        assert not adapter.pop_completed_store_tasks()[store].is_successful()
        assert adapter.query_lookup_and_lock_result(look).popcount() == 0
        assert adapter.query_load_result(load).popcount() == 0
        assert not adapter.report_status()["is_healthy"]


def test_a_configuration_that_makes_no_sense_is_refused_with_a_sentence(tmp_path: Path) -> None:
    for options, said in (
        ({"rams": {}}, "rams.*ram"),
        ({"weights_version": 7}, "weights_version is 7, expected text"),
        ({"ssd": {"path": str(tmp_path), "policy": "never"}}, r"ssd\.policy"),
    ):
        with pytest.raises(stratakv.ConfigError, match=said):
            create_l2_adapter(plugin(tmp_path, **options))
    with alone(tmp_path), pytest.raises(stratakv.StoreLockedError, match="lmcache-server"):
        create_l2_adapter(plugin(tmp_path))
