"""`StrataPolicy` in vLLM's own CPU offloading manager: what may not leave stays, and counts and hits are right."""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("vllm.v1.kv_offload.tiering.spec")

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

import stratakv
from offloading import Engine, key
from stratakv.integrations.vllm import StrataPolicy, policy

pytestmark = [
    pytest.mark.engines,
    # vLLM and torch warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]

MODULE = "stratakv.integrations.vllm.policy"
NAMES = policy.__all__
_numbers = itertools.count()


def manager(name: str, chunks: int, **more: Any) -> CPUOffloadingManager:
    own = {} if name in ("lru", "arc") else {"cache_policy_module_path": MODULE}
    return CPUOffloadingManager(num_chunks=chunks, cache_policy=name, **own, **more)


def request(path: Iterable[OffloadKey] = ()) -> ReqContext:
    """As vLLM's scheduler makes it: it notes where each chunk of a request ends."""
    made = ReqContext(req_id=f"request-{next(_numbers)}")
    for at, each in enumerate(path):
        made.set_offload_key_position(each, 16 * (at + 1))
    return made


def serve(cache: CPUOffloadingManager, path: list[OffloadKey]) -> int:
    """One request from its start to its end; how many of its leading chunks were here."""
    own = request(path)
    cache.on_new_request(own)
    found = list(itertools.takewhile(lambda each: cache.lookup(each, own).name == "HIT", path))
    cache.prepare_load(found, own)
    output = cache.prepare_store(path[len(found) :], own)
    if output is not None:
        cache.complete_store(output.keys_to_store, own)
    cache.complete_load(found, own)
    cache.on_request_finished(own)
    return len(found)


@pytest.mark.parametrize("name", NAMES)
def test_vllm_finds_each_policy_by_its_name(name: str) -> None:
    cache = manager(name, 4)
    assert isinstance(cache._policy, StrataPolicy)
    assert cache._policy.running == ("lru" if name == "StrataPolicy" else cache._policy.eviction)
    path = [key(number) for number in range(4)]
    assert [serve(cache, path), serve(cache, path)] == [0, 4]
    assert [serve(cache, [key(9)]), serve(cache, path)] == [0, 3]


def test_every_policy_of_ram_is_there_but_those_by_cost() -> None:
    assert {getattr(policy, name).eviction for name in NAMES} == {
        *("adaptive", "lru", "lfu", "s3fifo", "s3fifo_long", "arc", "wtinylfu")
    }
    with pytest.raises(stratakv.InputError, match="gdsf, adaptive"):
        stratakv._native.EvictionPolicy("fifo", 4)


@pytest.mark.parametrize("name", NAMES)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["store", "fail", "load", "done", "end", "touch", "reset"]),
            st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True),
        ),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_no_step_of_vllm_takes_what_is_held_or_loses_count(name: str, steps: list[tuple[str, list[int]]]) -> None:
    size = 12
    cache = manager(name, size)
    # Chunks that are here, with how many transfers read each; -1: it is being written.
    model: dict[OffloadKey, int] = {}
    reading: list[list[OffloadKey]] = []
    own = request()
    cache.on_new_request(own)
    for action, numbers in steps:
        keys = [make_offload_key(b"%d" % number, number % 2) for number in numbers]
        if action in ("store", "fail"):
            before = dict(model)
            output = cache.prepare_store(keys, own)
            wanted = [each for each in keys if each not in model]
            need = len(wanted) - (size - len(model))
            free = [each for each in model if model[each] == 0 and each not in keys]
            if need > len(free):
                assert output is None
                assert all(cache._policy.get(each) is not None for each in before)
                continue
            assert output is not None
            assert output.keys_to_store == wanted
            gone = output.evicted_keys
            assert len(gone) == len(set(gone)) == max(need, 0)
            assert set(gone) <= set(free)
            for each in gone:
                del model[each]
            cache.complete_store(wanted, own, success=action == "store")
            if action == "store":
                model.update(dict.fromkeys(wanted, 0))
        elif action == "load":
            here = [each for each in keys if model.get(each, -1) >= 0]
            cache.prepare_load(here, own)
            for each in here:
                model[each] += 1
            reading.append(here)
        elif action == "done" and reading:
            here = reading.pop(numbers[0] % len(reading))
            cache.complete_load(here, own)
            for each in here:
                model[each] -= 1
        elif action == "touch":
            cache.touch(keys, own)
        elif action == "end":
            cache.on_request_finished(own)
            own = request()
            cache.on_new_request(own)
        elif action == "reset":
            cache.reset_cache()
            model, reading = {}, []
            own = request()
            cache.on_new_request(own)
        for number in range(31):
            each = make_offload_key(b"%d" % number, number % 2)
            chunk = cache._policy.get(each)
            assert (None if chunk is None else chunk.ref_cnt) == model.get(each)
        assert len(cache._policy._order) == len(model)


@pytest.mark.parametrize("name", NAMES)
def test_an_eviction_that_cannot_be_whole_changes_nothing(name: str) -> None:
    own = getattr(policy, name)(8)
    for number in range(8):
        own.insert(key(number), held(number, 0))
    own.mark_non_evictable(key(0))
    protected = {key(number) for number in range(1, 4)}
    before = [own.get(key(number)) for number in range(8)]
    assert own.evict(5, protected) is None
    assert [own.get(key(number)) for number in range(8)] == before
    gone = own.evict(4, protected)
    assert {each for each, _ in gone} == {key(number) for number in range(4, 8)}
    assert {chunk.chunk_id for _, chunk in gone} == {4, 5, 6, 7}
    assert own.evict(0, set()) == []
    own.mark_evictable(key(0))
    assert [each for each, _ in own.evict(1, protected)] == [key(0)]
    assert own.evict(4, set()) is None
    own.clear()
    assert own.get(key(1)) is None
    assert own.evict(1, set()) is None


def held(slot: int, uses: int) -> ChunkStatus:
    chunk = ChunkStatus(slot)
    chunk.ref_cnt = uses
    return chunk


def test_both_versions_of_insert_are_understood() -> None:
    own = StrataPolicy(4)
    own.insert(key(1), held(0, 0))
    own.insert(key(2), held(1, 0), request())
    assert len(own.evict(2, set())) == 2
    assert "req_context" in inspect.signature(StrataPolicy.insert).parameters


def lru_of_paths(requests: list[list[OffloadKey]], capacity: int) -> list[int]:
    """Hits of least recently used on whole prefixes, the plainest way: what leaves is the end of the coldest path."""
    order: OrderedDict[OffloadKey, OffloadKey | None] = OrderedDict()
    hits = []
    for path in requests:
        found = list(itertools.takewhile(order.__contains__, path))
        hits.append(len(found))
        rest = path[len(found) :]
        for _ in range(len(rest) - (capacity - len(order))):
            own = set(found)
            parents = {parent for parent in order.values() if parent is not None}
            victim = next(each for each in order if each not in parents and each not in own)
            del order[victim]
        for at, each in enumerate(path):
            if at >= len(found):
                order[each] = path[at - 1] if at else None
        # A path is used from its end to its start.
        for each in reversed(path):
            order.move_to_end(each)
    return hits


def talks(seed: int, count: int, *, turns: int = 6, most: int = 40) -> Iterator[list[OffloadKey]]:
    """Conversations that take turns and grow, under a few system prompts."""
    random = np.random.default_rng(seed)
    open_: list[list[int]] = []
    fresh = itertools.count(10_000)
    for _ in range(count):
        if not open_ or random.random() < 1 / turns:
            head = int(random.integers(4))
            open_.append([100 * head + n for n in range(4)])
        at = int(len(open_) - 1 - random.geometric(0.2) % len(open_))
        open_[at] = open_[at] + [next(fresh) for _ in range(random.integers(1, 4))]
        yield [key(number) for number in open_[at][:most]]


def scans(seed: int, count: int) -> Iterator[list[OffloadKey]]:
    """Conversations, and between them documents that are read once."""
    once = itertools.count(1_000_000)
    for number, path in enumerate(talks(seed, count)):
        yield path
        if number % 2:
            yield [key(next(once)) for _ in range(24)]


def test_lru_hits_as_a_plain_simulation_does_request_by_request() -> None:
    for seed in range(3):
        requests = list(talks(seed, 300))
        cache = manager("LruPolicy", 150)
        assert [serve(cache, path) for path in requests] == lru_of_paths(requests, 150)


def test_the_simulation_tells_policies_apart() -> None:
    requests = list(scans(1, 300))
    cache = manager("S3FifoPolicy", 150)
    assert [serve(cache, path) for path in requests] != lru_of_paths(requests, 150)


@pytest.mark.parametrize("load", [talks, scans])
def test_the_default_hits_no_less_than_the_lru_of_vllm(load: Any) -> None:
    hits = dict.fromkeys(["lru", "StrataPolicy"], 0)
    for seed in range(2):
        requests = list(load(seed, 1500))
        for name in hits:
            cache = manager(name, 200)
            hits[name] += sum(serve(cache, path) for path in requests)
    assert hits["StrataPolicy"] >= hits["lru"] > 0


def test_a_prefix_leaves_from_its_end_in_whatever_portions_it_came() -> None:
    for portion in (1, 3, 20):
        cache = manager("LruPolicy", 24)
        path = [key(number) for number in range(20)]
        own = request(path)
        cache.on_new_request(own)
        for at in range(0, 20, portion):
            output = cache.prepare_store(path[at : at + portion], own)
            assert output is not None
            cache.complete_store(output.keys_to_store, own)
        # Before the request ends, too.
        assert serve(cache, [key(100 + number) for number in range(10)]) == 0
        here = [cache._policy.get(each) is not None for each in path]
        assert here == [True] * 14 + [False] * 6
        cache.on_request_finished(own)
        assert serve(cache, path) == 14


def test_a_request_longer_than_the_cache_keeps_its_start() -> None:
    cache = manager("StrataPolicy", 16)
    path = [key(number) for number in range(40)]
    own = request(path)
    cache.on_new_request(own)
    for each in path:
        output = cache.prepare_store([each], own)
        assert output is not None
        cache.complete_store(output.keys_to_store, own)
    cache.on_request_finished(own)
    assert serve(cache, path) == 15


def test_the_tiering_spec_takes_the_policy_beside_the_tier(tmp_path: Any) -> None:
    tier = {
        "type": "StrataTier",
        "module_path": "stratakv.integrations.vllm",
        "ram": {"capacity_bytes": "8MiB"},
        "ssd": {"path": str(tmp_path / "store"), "capacity_bytes": "64MiB", "segment_bytes": "1MiB"},
    }
    names = {"eviction_policy": "StrataPolicy", "cache_policy_module_path": "stratakv.integrations.vllm"}
    with Engine([tier], chunks=16, **names) as engine:
        assert isinstance(engine.manager.primary_tier._policy, StrataPolicy)
        keys = [key(number) for number in range(16)]
        assert engine.compute(keys)
        assert engine.compute([key(100 + number) for number in range(16)])
        assert engine.ask(keys) == 16
