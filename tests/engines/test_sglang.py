"""SGLang: what a host pool stores comes back byte for byte, into any layout, or is a miss.

The pools are SGLang's own, in the memory of the host; so are the factory, the controller's calls and the transfers of
hybrid models. Its scheduler and its device kernels need a GPU and are not run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
# Both warn about themselves and the hardware that is missing; nothing of it is about the cache.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sglang")
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        HiCacheStorageConfig,
        PoolHitPolicy,
        PoolName,
        PoolTransfer,
    )
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
    from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost, MHATokenToKVPoolHost
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    from host_pools import LAYERS, PAGE, fill, mamba, memory, mha, mla, page_of, same, slots
    from stratakv.integrations import sglang as adapter

import servers  # noqa: E402 (after the skips)
import stratakv  # noqa: E402
from stratakv.integrations.engine import EngineVersionError  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

MHA_LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head", "page_unified"]
MLA_LAYOUTS = ["layer_first", "page_first", "page_first_direct"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]


def names(count: int, seed: int = 0) -> list[str]:
    return [f"{seed:032x}{number:032x}" for number in range(count)]


def config(folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> HiCacheStorageConfig:
    extra = {
        "backend_name": "stratakv",
        "module_path": "stratakv.integrations.sglang",
        "class_name": "StrataHiCache",
        "interface_v1": 1,
        "ram": {"capacity_bytes": "8MiB", "eviction": "lru"},
        "ssd": {"path": str(folder), "capacity_bytes": "64MiB", "segment_bytes": "1MiB", "policy": "write_through"},
        "store": {"threads": 2},
        "kv_cache_dtype": "",
    }
    plain: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "some/model",
        "extra_config": {**extra, **(options or {})},
    }
    return HiCacheStorageConfig(**{**plain, **changes})


def attach(settings: HiCacheStorageConfig, pool: Any) -> Any:
    """As SGLang's controller does."""
    backend = StorageBackendFactory.create_backend("dynamic", settings, pool)
    try:
        backend.register_mem_pool_host(pool)
        backend.register_mem_host_pool_v2(pool, PoolName.KV)
        backend.on_host_pools_registered()
    except BaseException:
        backend.close()
        raise
    return backend


def flush(backend: Any) -> None:
    backend._caches.flush()


@pytest.fixture
def backends() -> Iterator[Any]:
    """Attaches, and closes at the end."""
    opened: list[Any] = []

    def attached(settings: HiCacheStorageConfig, pool: Any) -> Any:
        opened.append(attach(settings, pool))
        return opened[-1]

    yield attached
    for backend in opened:
        backend.close()


FP8 = {"kv_cache_dtype": "fp8_e4m3"}


def assert_carried(tmp_path: Path, source: Any, target: Any, **changes: Any) -> None:
    """Pages that one pool stores are, byte for byte, what another loads, and nothing beside them is written."""
    keys = names(5)
    settings = config(tmp_path, FP8 if source.dtype == torch.uint8 else None, **changes)
    backend = attach(settings, source)
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, slots(3, 4, 5, 9, 7)) == [True] * 5
    assert backend.batch_exists(keys) == 5
    backend.close()
    before = [each.clone() for each in memory(target)]
    backend = attach(settings, target)
    try:
        assert backend.batch_exists([*keys, "missing"]) == 5
        assert backend.batch_get_v1(keys, slots(20, 2, 11, 12, 13)) == [True] * 5
    finally:
        backend.close()
    for stored, loaded in zip((3, 4, 5, 9, 7), (20, 2, 11, 12, 13), strict=True):
        assert same(page_of(target, loaded), page_of(source, stored))
        page_of(target, loaded).zero_()
    for now, was in zip(memory(target), before, strict=True):
        assert same(now[now != 0], was[now != 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MHA_LAYOUTS)
def test_keys_and_values_come_back_into_any_layout(tmp_path: Path, layout: str, dtype: Any) -> None:
    other = MHA_LAYOUTS[(MHA_LAYOUTS.index(layout) + 1 + DTYPES.index(dtype)) % len(MHA_LAYOUTS)]
    assert_carried(tmp_path, mha(layout, dtype), mha(other, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", MLA_LAYOUTS)
def test_latent_planes_come_back_into_any_layout(tmp_path: Path, layout: str, dtype: Any) -> None:
    other = MLA_LAYOUTS[(MLA_LAYOUTS.index(layout) + 1) % len(MLA_LAYOUTS)]
    assert_carried(tmp_path, mla(layout, dtype), mla(other, dtype), is_mla_model=True)


def test_an_axis_that_is_taken_for_another_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A control: the same count of heads and layers, swapped.
    monkeypatch.setitem(adapter._AXES, "page_first", "KPNHLD")
    with pytest.raises(AssertionError):
        assert_carried(tmp_path, mha("page_first", heads=LAYERS), mha("layer_first", heads=LAYERS))


def test_the_interface_of_sglang_is_complete(tmp_path: Path, backends: Any) -> None:
    backend = backends(config(tmp_path), mha())
    assert isinstance(backend, HiCacheStorage)
    assert type(backend).__name__ == "StrataHiCache"
    assert not type(backend).__abstractmethods__


def test_bytes_are_read_where_they_lie_without_a_copy(tmp_path: Path, backends: Any) -> None:
    pool = mha("page_first")
    backend = backends(config(tmp_path), pool)
    [(tensor, table)] = backend._pools[PoolName.KV].tensors(2 * PAGE)
    assert tensor.data_ptr() == pool.kv_buffer.data_ptr()
    assert table == (2,)


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct", "page_head"])
def test_the_older_calls_pass_flat_pages_and_meet_the_newer_ones(tmp_path: Path, layout: str, backends: Any) -> None:
    pool, keys = mha(layout), names(4)
    backend = backends(config(tmp_path), pool)
    assert backend.get("none", pool.get_dummy_flat_data_page()) is None
    assert not backend.exists(keys[0])
    flat = [pool.get_data_page(page * PAGE) for page in range(4)]
    assert backend.set(keys[0], flat[0])
    assert backend.batch_set(keys[1:], flat[1:])
    assert backend.exists(keys[0])
    found = backend.batch_get([*keys, "none"], [pool.get_dummy_flat_data_page() for _ in range(5)])
    assert found[4] is None
    assert all(same(got, put) for got, put in zip(found[:4], flat, strict=True))
    assert same(backend.get(keys[2]), flat[2])
    assert backend.batch_get_v1(keys, slots(8, 9, 10, 11)) == [True] * 4
    assert all(same(page_of(pool, 8 + page), page_of(pool, page)) for page in range(4))
    assert not backend.set("short", flat[0][:-1])
    assert not backend.set("nothing")
    assert not backend.batch_set(keys, flat[:2])


@pytest.mark.parametrize("pool", [mha, mla])
def test_the_calls_of_sglangs_controller_move_pages(tmp_path: Path, pool: Any, backends: Any) -> None:
    host, keys = pool("page_first"), names(6)
    backend = backends(config(tmp_path, is_mla_model=pool is mla), host)
    controller = SimpleNamespace(storage_backend=backend, storage_host_pool=host, page_size=PAGE)
    operation = SimpleNamespace(request_id="r", is_terminated=lambda: False)
    assert HiCacheController._page_set_zero_copy(controller, keys[:3], slots(0, 1, 2))
    assert HiCacheController._generic_page_set(controller, keys[3:5], slots(3, 4))
    assert HiCacheController._page_get_zero_copy(controller, operation, keys, slots(10, 11, 12, 13, 14, 15)) == 5
    assert HiCacheController._generic_page_get(controller, operation, keys[:5], slots(20, 21, 22, 23, 24)) == 5
    for page in range(5):
        assert same(page_of(host, 10 + page), page_of(host, page))
        assert same(page_of(host, 20 + page), page_of(host, page))


def test_ranks_of_another_number_find_their_share_of_heads(tmp_path: Path) -> None:
    lcm = {"tp_lcm_size": 4, "should_split_heads": True}
    whole, keys = mha("page_head", heads=4), names(3)
    backend = attach(config(tmp_path, **lcm), whole)
    assert backend.batch_set_v1(keys, slots(0, 1, 2)) == [True] * 3
    backend.close()
    folder = tmp_path / "sglang"
    for rank in range(2):
        shutil.copytree(folder / "tp0of1-pp0-cp0-dp0.0", folder / f"tp{rank}of2-pp0-cp0-dp0.0")
        half = mha("page_head", heads=2)
        backend = attach(config(tmp_path, tp_rank=rank, tp_size=2, **lcm), half)
        try:
            assert backend.batch_get_v1(keys, slots(5, 6, 7)) == [True] * 3
        finally:
            backend.close()
        for page in range(3):
            wanted = page_of(whole, page)[:, :, :, 2 * rank : 2 * rank + 2]
            assert same(page_of(half, 5 + page), wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": "other/model"},
        {"tp_size": 2},
        {"tp_rank": 1, "tp_size": 2},
        {"pp_size": 2},
        {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_size": 2},
        {"attn_cp_rank": 1, "attn_cp_size": 2},
        {"options": {"weights_version": "2"}},
        {"pool": {"dtype": torch.float16}},
        {"pool": {"heads": 1, "dim": 32}},
        {"pool": {"layers": 2}},
        {"pool": {"page": 8}},
        {"pool": {"dtype": torch.uint8}, "options": {"kv_cache_dtype": "fp8_e5m2"}},
        {"pool": {"dtype": torch.uint8}, "options": {"kv_cache_dtype": "fp8_e4m3"}},
    ],
    ids=str,
)
def test_nothing_is_shared_with_another_namespace_even_in_one_directory(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"kv_cache_dtype": "fp8_e4m3"} if change.get("options") == {"kv_cache_dtype": "fp8_e5m2"} else {}
    before = {"dtype": torch.uint8} if options else {}
    keys, pool = names(2), mha(**before)
    backend = attach(config(tmp_path, options), pool)
    assert backend.batch_set_v1(keys, slots(0, 1)) == [True] * 2
    backend.close()
    [own] = (tmp_path / "sglang").iterdir()
    settings = config(
        tmp_path, change.get("options"), **{k: v for k, v in change.items() if k not in ("pool", "options")}
    )
    other = mha(**change.get("pool", {}))
    attach(settings, other).close()
    [theirs] = [each for each in (tmp_path / "sglang").iterdir() if each != own] or [own]
    if theirs != own:
        shutil.rmtree(theirs)
        shutil.move(own, theirs)
    backend = attach(settings, other)
    was = memory(other)[0].clone()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, slots(0, 1, page=other.page_size)) == [False] * 2
    assert same(memory(other)[0], was)
    backend.close()
    if theirs != own:
        shutil.move(theirs, own)
    # And the first finds its own again.
    backend = attach(config(tmp_path, options), pool)
    assert backend.batch_exists(keys) == 2
    backend.close()


SERVE_UNTIL_KILLED = """
import json, sys
sys.path[:0] = json.loads(sys.argv[2])
import test_sglang as here
here.torch.manual_seed(7)
pool = here.mha("page_first")
backend = here.attach(here.config(here.Path(sys.argv[1])), pool)
assert all(backend.batch_set_v1(here.names(20), here.slots(*range(20))))
here.flush(backend)
print("durable", flush=True)
while True:
    here.fill(pool)
    backend.batch_set_v1(here.names(20, here.random.getrandbits(60)), here.slots(*range(20)))
"""


def test_after_a_sigkill_another_process_finds_what_was_durable(tmp_path: Path, backends: Any) -> None:
    paths = json.dumps([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-W", "ignore", "-c", SERVE_UNTIL_KILLED, str(tmp_path), paths]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "durable\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGKILL)
    torch.manual_seed(7)
    wanted, pool = mha("page_first"), mha("page_first_direct")
    backend = backends(config(tmp_path), pool)
    assert backend.batch_exists(names(20)) == 20
    assert backend.batch_get_v1(names(20), slots(*range(20))) == [True] * 20
    assert all(same(page_of(pool, page), page_of(wanted, page)) for page in range(20))


def test_a_damaged_record_is_a_miss_and_can_be_stored_again(tmp_path: Path) -> None:
    pool, keys = mha(), names(16)
    backend = attach(config(tmp_path), pool)
    assert all(backend.batch_set_v1(keys, slots(*range(16))))
    backend.close()
    damaged = 0
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            content = bytearray(file.read_bytes())
            for page in range(0, 16, 2):
                at = content.find(page_of(pool, page).contiguous().numpy().tobytes()[:32])
                if at >= 0:
                    content[at + 40] ^= 0x10
                    damaged += 1
            file.write_bytes(content)
    assert damaged == 8
    other = mha()
    backend = attach(config(tmp_path), other)
    try:
        found = backend.batch_get_v1(keys, slots(*range(16)))
        assert found == [page % 2 == 1 for page in range(16)]
        for page in range(1, 16, 2):
            assert same(page_of(other, page), page_of(pool, page))
        assert backend.batch_exists(keys) == 0
        other.kv_buffer.copy_(pool.kv_buffer)
        assert all(backend.batch_set_v1(keys, slots(*range(16))))
        fill(other)
        assert backend.batch_get_v1(keys, slots(*range(16))) == [True] * 16
        assert same(other.kv_buffer[:, :, : 16 * PAGE], pool.kv_buffer[:, :, : 16 * PAGE])
    finally:
        backend.close()


def test_with_too_little_ram_pages_come_from_ssd(tmp_path: Path, backends: Any) -> None:
    pool = mha(heads=8, dim=64, pages=96)
    backend = backends(config(tmp_path, {"ram": {"capacity_bytes": "2MiB"}}), pool)
    keys, was = names(96), pool.kv_buffer.clone()
    for first in range(0, 96, 8):
        assert all(backend.batch_set_v1(keys[first : first + 8], slots(*range(first, first + 8))))
        flush(backend)
    fill(pool)
    assert backend.batch_get_v1(keys, slots(*range(96))) == [True] * 96
    assert same(pool.kv_buffer, was)
    assert backend._caches.stats().tiers["ssd"].hit_blocks > 20


def test_the_head_of_a_prompt_outlives_its_tail(tmp_path: Path, backends: Any) -> None:
    pool, mine = mha(heads=8, dim=128), names(32, 1)
    alone = {"ssd": {"enabled": False}, "ram": {"capacity_bytes": "2MiB", "eviction": "lru"}}
    backend = backends(config(tmp_path, alone), pool)
    assert all(backend.batch_set_v1(mine, slots(*range(32))))
    backend.batch_set_v1(names(24, 2), slots(*range(24)))
    there = [backend.exists(key) for key in mine]
    assert 0 < sum(there) < 32
    assert there == sorted(there, reverse=True)
    # Asking and getting count as uses, in the same order.
    for use in (lambda keys: backend.batch_exists(keys), lambda keys: backend.batch_get_v1(keys, slots(*range(32)))):
        assert backend.clear()
        assert all(backend.batch_set_v1(mine, slots(*range(32))))
        use(mine)
        backend.batch_set_v1(names(24, 3), slots(*range(24)))
        there = [backend.exists(key) for key in mine]
        assert 0 < sum(there) < 32
        assert there == sorted(there, reverse=True)


def test_threads_that_store_and_load_at_once_see_right_pages(tmp_path: Path, backends: Any) -> None:
    pool, keys = mha(heads=8, dim=256, pages=32), names(24)
    backend = backends(config(tmp_path, {"ram": {"capacity_bytes": "2MiB"}}), pool)
    wrong: list[object] = []

    def store(thread: int) -> None:
        for number in random.Random(thread).choices(range(24), k=200):
            backend.batch_set_v1([keys[number]], slots(number))

    def load(thread: int) -> None:
        at = 24 + thread
        for number in random.Random(thread).choices(range(24), k=200):
            if backend.batch_get_v1([keys[number]], slots(at)) == [True]:
                if not same(page_of(pool, at), page_of(pool, number)):
                    wrong.append(number)
                loaded.append(number)

    loaded: list[int] = []
    threads = [threading.Thread(target=work, args=(n,)) for n, work in enumerate((store, load, load, store))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert loaded


def test_slots_that_are_no_whole_pages_are_a_miss_and_nothing_is_touched(tmp_path: Path, backends: Any) -> None:
    pool, keys = mha(), names(2)
    backend = backends(config(tmp_path), pool)
    assert all(backend.batch_set_v1(keys, slots(0, 1)))
    was = pool.kv_buffer.clone()
    for bad in (
        torch.arange(1, 1 + 2 * PAGE),
        torch.arange(2 * PAGE - 1),
        slots(0, 1).flip(0),
        slots(31, 32),
        slots(-1, 0),
        None,
    ):
        assert backend.batch_get_v1(keys, bad) == [False, False]
        assert backend.batch_set_v1(names(2, 9), bad) == [False, False]
    assert same(pool.kv_buffer, was)
    assert backend.batch_exists(names(2, 9)) == 0
    assert backend.batch_get_v1([], torch.arange(0)) == []


def test_a_closed_store_is_a_miss(tmp_path: Path) -> None:
    pool, keys = mha(), names(2)
    backend = attach(config(tmp_path), pool)
    assert all(backend.batch_set_v1(keys, slots(0, 1)))
    backend.close()
    backend.close()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, slots(0, 1)) == [False, False]
    assert backend.batch_set_v1(keys, slots(0, 1)) == [False, False]
    assert backend.get(keys[0]) is None
    assert not backend.set(keys[0], pool.get_data_page(0))
    assert backend.batch_exists_v2(keys).kv_hit_pages == 0
    assert not backend.clear()
    with pytest.raises(stratakv.ConfigError, match="closed"):
        backend.register_mem_pool_host(pool)


def test_clear_forgets_all_after_a_restart_too(tmp_path: Path, backends: Any) -> None:
    pool, keys = mha(), names(3)
    backend = attach(config(tmp_path), pool)
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2)))
    flush(backend)
    assert backend.clear()
    assert backend.batch_exists(keys) == 0
    assert all(backend.batch_set_v1(keys[:1], slots(5)))
    backend.close()
    backend = backends(config(tmp_path), pool)
    assert backend.batch_exists(keys) == 1
    assert backend.batch_get_v1(keys[:1], slots(6)) == [True]
    assert same(page_of(pool, 6), page_of(pool, 5))


def test_sglang_gets_the_figures_of_each_transfer_once(tmp_path: Path, backends: Any) -> None:
    pool = mha()
    backend = backends(config(tmp_path), pool)
    backend.batch_set_v1(names(3), slots(0, 1, 2))
    backend.batch_get_v1(names(4), slots(0, 1, 2, 3))
    backend.batch_get_v1(["none"], slots(0))
    stats = backend.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs) == ([3], [3])
    assert stats.prefetch_bandwidth[0] > 0
    assert stats.backup_bandwidth[0] > 0
    assert backend.get_stats().prefetch_pgs == []


# Hybrid models: several pools.


def test_states_and_windows_are_served_beside_keys_and_values(tmp_path: Path, backends: Any) -> None:
    pool, window, states, keys = mha(), mha("page_first", heads=1), mamba(), names(6)
    backend = backends(config(tmp_path), pool)
    backend.register_mem_host_pool_v2(window, PoolName.SWA)
    backend.register_mem_host_pool_v2(states, PoolName.MAMBA)
    temporal, conv = states.temporal_buffer.clone(), states.conv_buffer[0].clone()
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2, 3, 4, 5)))
    stored = backend.batch_set_v2(
        [
            PoolTransfer(name=PoolName.SWA, keys=keys[1:5], host_indices=slots(1, 2, 3, 4)),
            PoolTransfer(name=PoolName.MAMBA, keys=[keys[3]], host_indices=torch.tensor([2])),
        ]
    )
    assert stored == {PoolName.SWA: [True] * 4, PoolName.MAMBA: [True]}
    trailing = [
        PoolTransfer(name=PoolName.SWA, keys=keys[-2:], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        PoolTransfer(name=PoolName.MAMBA, keys=keys[-1:], hit_policy=PoolHitPolicy.TRAILING_PAGES),
    ]
    found = backend.batch_exists_v2([*keys, "none"], trailing)
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [4])
    assert found.extra_pool_hit_pages == {PoolName.KV: 6, PoolName.SWA: 5, PoolName.MAMBA: 4}
    # All pages, or an end that is in no pool: nothing.
    every = PoolTransfer(name=PoolName.SWA, keys=keys)
    assert backend.batch_exists_v2(keys, [every]).kv_hit_pages == 0
    assert backend.batch_exists_v2(keys, [PoolTransfer(name=PoolName.INDEXER)]).kv_hit_pages == 0
    groups = PoolTransfer(name=PoolName.INDEXER, hit_policy=PoolHitPolicy.BLOCK_GROUPS)
    assert backend.batch_exists_v2(keys, [groups]).kv_hit_pages == 6
    loaded = backend.batch_get_v2(
        [
            PoolTransfer(name=PoolName.SWA, keys=keys[2:4], host_indices=slots(20, 21)),
            PoolTransfer(name=PoolName.MAMBA, keys=[keys[3], keys[4]], host_indices=torch.tensor([9, 10])),
            PoolTransfer(name=PoolName.INDEXER, keys=[keys[0]], host_indices=slots(1)),
        ]
    )
    assert loaded == {PoolName.SWA: [True] * 2, PoolName.MAMBA: [True, False], PoolName.INDEXER: [False]}
    assert same(page_of(window, 20), page_of(window, 2))
    assert same(page_of(window, 21), page_of(window, 3))
    assert same(states.temporal_buffer[9], temporal[2])
    assert same(states.conv_buffer[0][9], conv[2])
    rest = [number for number in range(len(temporal)) if number != 9]
    assert same(states.temporal_buffer[rest], temporal[rest])


def test_keys_and_values_of_two_widths_are_kept_as_bytes(tmp_path: Path) -> None:
    pool, keys = mha("page_first", value_dim=8, kind=AsymmetricMHATokenToKVPoolHost), names(3)
    backend = attach(config(tmp_path), pool)
    assert all(backend.batch_set_v1(keys, slots(0, 1, 2)))
    backend.close()
    was = [each.clone() for each in memory(pool)]
    fill(pool)
    backend = attach(config(tmp_path), pool)
    assert backend.batch_get_v1(keys, slots(7, 8, 9)) == [True] * 3
    backend.close()
    for now, before in zip(memory(pool), was, strict=True):
        assert same(now[7 * PAGE : 10 * PAGE], before[: 3 * PAGE])
    # In another order of bytes they are another namespace.
    other = mha("page_first_direct", value_dim=8, kind=AsymmetricMHATokenToKVPoolHost)
    backend = attach(config(tmp_path), other)
    assert backend.batch_exists(keys) == 0
    backend.close()


# Latent attention over several ranks.


def shared(folder: Path, url: str, **changes: Any) -> HiCacheStorageConfig:
    options = {"dragonfly": {"url": url, "deadline_s": 5.0}, "store": {"secret": "same", "threads": 2}}
    return config(folder, options, **changes)


def test_ranks_of_a_latent_model_without_a_shared_tier_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        with pytest.raises(stratakv.ConfigError, match=r"Set dragonfly\.url"):
            attach(config(tmp_path, is_mla_model=True, tp_rank=rank, tp_size=2), mla())
    assert not list(tmp_path.iterdir())
    attach(config(tmp_path, is_mla_model=True), mla()).close()
    attach(config(tmp_path, tp_rank=1, tp_size=2), mha()).close()


def test_what_one_rank_of_a_latent_model_stores_all_ranks_find(tmp_path: Path, backends: Any) -> None:
    pytest.importorskip("redis")
    keys = names(4)
    with servers.redis(tmp_path) as server:
        source, target = mla("page_first"), mla("layer_first")
        latent = {"is_mla_model": True, "tp_size": 2}
        writer = backends(shared(tmp_path / "box", server.url, tp_rank=0, **latent), source)
        reader = backends(shared(tmp_path / "box", server.url, tp_rank=1, **latent), target)
        # The rank that does not write says yes, and stores nothing.
        assert reader.batch_set_v1(keys, slots(0, 1, 2, 3)) == [True] * 4
        assert reader.set(keys[0], target.get_data_page(0))
        assert reader.batch_exists(keys) == 0
        assert all(writer.batch_set_v1(keys, slots(0, 1, 2, 3)))
        flush(writer)
        assert reader.batch_exists(keys) == 4
        assert reader.batch_get_v1(keys, slots(4, 5, 6, 7)) == [True] * 4
        assert all(same(page_of(target, 4 + page), page_of(source, page)) for page in range(4))
        # States beside them are each rank's own.
        ours, theirs = mamba(), mamba()
        writer.register_mem_host_pool_v2(ours, PoolName.MAMBA)
        reader.register_mem_host_pool_v2(theirs, PoolName.MAMBA)
        of = {"name": PoolName.MAMBA, "keys": keys[:1], "host_indices": torch.tensor([0])}
        assert writer.batch_set_v2([PoolTransfer(**of)]) == {PoolName.MAMBA: [True]}
        flush(writer)
        assert reader.batch_get_v2([PoolTransfer(**of)]) == {PoolName.MAMBA: [False]}
        assert reader.batch_set_v2([PoolTransfer(**of)]) == {PoolName.MAMBA: [True]}
        assert reader.batch_get_v2([PoolTransfer(**of)]) == {PoolName.MAMBA: [True]}


def test_ranks_that_hold_heads_of_their_own_share_nothing(tmp_path: Path, backends: Any) -> None:
    pytest.importorskip("redis")
    keys = names(2)
    with servers.redis(tmp_path) as server:
        ours = backends(shared(tmp_path / "box", server.url, tp_rank=0, tp_size=2), mha())
        theirs = backends(shared(tmp_path / "box", server.url, tp_rank=1, tp_size=2), mha())
        same = backends(shared(tmp_path / "other box", server.url, tp_rank=0, tp_size=2), mha())
        assert all(ours.batch_set_v1(keys, slots(0, 1)))
        flush(ours)
        assert theirs.batch_exists(keys) == 0
        assert same.batch_exists(keys) == 2


# What is refused at the start.


def test_a_directory_in_use_is_refused_with_its_name(tmp_path: Path, backends: Any) -> None:
    backends(config(tmp_path), mha())
    with pytest.raises(stratakv.StoreLockedError, match="tp0of1"):
        attach(config(tmp_path), mha())
    backends(config(tmp_path, tp_rank=1, tp_size=2), mha())
    backends(config(tmp_path, dp_rank=1), mha())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rams": {}}, "rams.*ram"),
        ({"ssd": {"paths": "x"}}, r"ssd\.path"),
        ({"ram": {"capacity_bytes": "lots"}}, r"ram\.capacity_bytes"),
        ({"weights_version": 7}, "weights_version is 7, expected text"),
        ({"config": "/nowhere/stratakv.toml"}, "/nowhere/stratakv.toml"),
        ({"dragonfly": {"url": "redis://localhost"}}, r"store\.secret"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_a_sentence(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(stratakv.ConfigError, match=said):
        attach(config(tmp_path, options), mha())


def test_pools_that_cannot_be_stored_are_refused_with_a_sentence(tmp_path: Path) -> None:
    def refused(pool: Any, said: str, options: dict[str, Any] | None = None, **changes: Any) -> None:
        with pytest.raises((stratakv.ConfigError, stratakv.InputError), match=said):
            attach(config(tmp_path, options, **changes), pool)

    refused(LogicalHostPool(64, PAGE), "LogicalHostPool.*cannot be stored", FP8)
    refused(mha(dtype=torch.uint8), "set kv_cache_dtype")
    refused(mha(page=8192, pages=1, layers=1, heads=1), "block_tokens is 8192, expected an integer from 1 to 4096")
    refused(mha(heads=64, dim=512, pages=2, layers=8), "one block", {"ram": {"capacity_bytes": "1MiB"}})
    refused(mha("page_head", heads=2), "tp_lcm_size is 3", tp_lcm_size=3, tp_size=2)
    refused(mha("page_unified", heads=2, kind=Moving), "moves its pages about")
    refused(mla(), "--dcp-size 1", is_mla_model=True, tp_size=2, dcp_size=2, logical_page_size=PAGE)


class Moving(MHATokenToKVPoolHost):  # type: ignore[misc,valid-type]  # SGLang's, which has no types
    """As a pool in unified memory declares itself."""

    stores_page_envelope = True


def test_another_version_of_sglang_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("stratakv.integrations.sglang")
    assert spec is not None
    assert spec.loader is not None
    real, found = importlib.metadata.version, ["0.5.22", "0.5.24", "0.6.0", "0.5.23"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found[0] if name == "sglang" else real(name))
    while found[0] != "0.5.23":
        with pytest.raises(EngineVersionError, match=r"pip install 'sglang>=0\.5\.23,<0\.5\.24'"):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        del found[0]
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
