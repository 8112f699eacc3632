"""`StrataTier` under vLLM's own tiering manager: what it promotes is what was stored, or is computed.

The manager, its CPU cache in shared memory and its memoryview are vLLM's; only the GPU is missing, whose place the test
takes. Every promotion is compared byte by byte, in `Engine.ask`.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm.v1.kv_offload.tiering.spec")

from vllm.v1.kv_offload.base import LookupResult, Medium, TierFilter, TierMatcher
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

import stratakv
from offloading import ROW, Engine, content, key
from servers import Redis

pytestmark = [
    pytest.mark.engines,
    # vLLM and torch warn about themselves; nothing of it is about the cache.
    pytest.mark.filterwarnings("default"),
]

KEYS = [key(number) for number in range(12)]
# The least RAM that a store takes holds some hundred chunks.
LITTLE = "2MiB"
LOG = "vllm.stratakv.integrations.vllm.tier"
MANY = 150


def tier(path: Path | None, *, ram: str = "8MiB", **more: Any) -> dict[str, Any]:
    ssd = {"enabled": False} if path is None else {"path": str(path)}
    sizes = {"capacity_bytes": "64MiB", "segment_bytes": "1MiB"}
    return {
        "type": "StrataTier",
        "module_path": "stratakv.integrations.vllm",
        "ram": {"capacity_bytes": ram, "eviction": "lru"},
        "ssd": {**sizes, **ssd},
        **more,
    }


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What goes to vLLM's log goes nowhere else."""
    logging.getLogger(LOG).addHandler(caplog.handler)
    yield
    logging.getLogger(LOG).removeHandler(caplog.handler)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine([tier(tmp_path / "store")]) as one:
        yield one


def stats(engine: Engine) -> dict[str, dict[tuple[str, ...], Any]]:
    counted = engine.manager.get_stats()
    return {} if counted is None else counted.data["data"]


def test_what_left_the_cpu_cache_is_promoted_as_it_was(engine: Engine) -> None:
    assert engine.compute(KEYS)
    others = [key(100 + number) for number in range(16)]
    assert engine.compute(others)
    assert engine.manager.primary_tier.lookup(KEYS[0], engine.request()) is LookupResult.MISS
    assert engine.ask(KEYS) == len(KEYS)
    assert engine.ask([*KEYS[:3], key(999), *KEYS[3:]]) == 3
    assert engine.ask([key(999)]) == 0
    counted = stats(engine)
    assert counted["stratakv_loaded_blocks_total"] == {("ram",): 12}
    assert counted["vllm:kv_offload_tiering_write_bytes"] == {("1:StrataTier",): 28 * ROW}


def test_groups_of_one_hash_are_chunks_of_their_own(engine: Engine) -> None:
    assert engine.compute([key(1, group=0)])
    engine.forget()
    assert engine.ask([key(1, group=1)]) == 0
    assert engine.ask([key(1, group=0)]) == 1


def test_a_new_process_finds_what_the_last_one_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine([tier(tmp_path / "store")]) as engine:
        assert engine.compute(KEYS)
    with caplog.at_level(logging.INFO, LOG), Engine([tier(tmp_path / "store")]) as engine:
        assert "'some/model': chunks of 16384 bytes, 12 of them found again" in caplog.text
        assert engine.ask(KEYS) == len(KEYS)
        assert stats(engine)["stratakv_loaded_blocks_total"] == {("ssd",): 12}


@pytest.mark.parametrize(
    "other",
    [
        {"model": "other/model"},
        {"dtype": "bfloat16"},
        {"tokens": 32},
        {"row": 2 * ROW},
        {"tier": {"weights_version": "2"}},
    ],
    ids=str,
)
def test_another_model_or_layout_finds_nothing_and_takes_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    more = other.pop("tier", {})
    with Engine([tier(tmp_path / "store")]) as engine:
        assert engine.compute(KEYS)
    with Engine([tier(tmp_path / "store", **more)], **other) as engine:
        assert engine.ask(KEYS) == 0
        assert engine.compute(KEYS[:4])
        engine.forget()
        assert engine.ask(KEYS) == 4
    with Engine([tier(tmp_path / "store")]) as engine:
        assert engine.ask(KEYS) == len(KEYS)


def damage(folder: Path, of: bytes) -> None:
    """Flips a bit of the payload that holds these bytes, wherever a file of the store has it."""
    wanted, found = content(of).tobytes(), 0
    for file in folder.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        at = data.find(wanted)
        if at >= 0:
            found += 1
            with file.open("r+b") as opened:
                opened.seek(at + 77)
                opened.write(bytes([data[at + 77] ^ 4]))
    assert found == 1


def test_a_damaged_chunk_fails_alone_and_is_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine([tier(tmp_path / "store")]) as engine:
        assert engine.compute(KEYS)
    damage(tmp_path / "store", KEYS[5])
    damage(tmp_path / "store", KEYS[9])
    with Engine([tier(tmp_path / "store")]) as engine:
        request = engine.request()
        with caplog.at_level(logging.WARNING, LOG):
            assert engine.ask(KEYS, request) == 5
        assert "2 of 12 chunks are not loaded, and are computed: 2 corrupt" in caplog.text
        # What loaded beside them was kept, and the request goes on without those that did not.
        held = [engine.manager.primary_tier.lookup(each, request) is LookupResult.HIT for each in KEYS]
        assert held == [number not in (5, 9) for number in range(12)]
        assert engine.manager.lookup(KEYS[5], request) is LookupResult.MISS
        assert engine.ask(KEYS[6:9]) == 3
        counted = stats(engine)
        assert counted["stratakv_failed_loads_total"] == {("corrupt",): 2}
        assert counted["vllm:kv_offload_tiering_promotion_job_failures"] == {("1:StrataTier",): 1}
        # Computed anew, it is stored anew.
        assert engine.compute([KEYS[5], KEYS[9]])
        engine.forget()
        assert engine.ask(KEYS) == len(KEYS)


def test_a_chunk_that_stays_and_does_not_load_is_promised_to_a_request_once(tmp_path: Path) -> None:
    # No loads at all: what is here is found, and stays.
    none = {"quotas": {"models": {"some/model": {"loads": 0}}}}
    with Engine([tier(tmp_path / "store", **none)]) as engine:
        assert engine.compute(KEYS)
        engine.forget()
        request = engine.request()
        assert engine.ask(KEYS, request) == 0
        assert engine.manager.lookup(KEYS[0], request) is LookupResult.MISS
        assert engine.tier.lookup(KEYS[0], engine.request()) is LookupResult.HIT
        assert stats(engine)["stratakv_failed_loads_total"] == {("quota",): 12}


def test_an_undamaged_directory_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOG):
        with Engine([tier(tmp_path / "store")]) as engine:
            assert engine.compute(KEYS)
        with Engine([tier(tmp_path / "store")]) as engine:
            assert engine.ask(KEYS) == len(KEYS)
            assert "stratakv_failed_loads_total" not in stats(engine)
    assert not caplog.records


def test_many_requests_with_many_chunks_in_flight(tmp_path: Path) -> None:
    keys = [[key(1000 * request + number) for number in range(40)] for request in range(12)]
    with Engine([tier(tmp_path / "store", ram="16MiB", threads=3)], chunks=600) as engine:
        for own in keys:
            assert engine.compute(own, wait=False)
        assert engine.manager.has_pending_work()
        engine.tier.drain_jobs()
        engine.forget()
        requests = [engine.request() for _ in keys]
        for own, request in zip(keys, requests, strict=True):
            for each in own:
                assert engine.manager.lookup(each, request) is LookupResult.HIT_PENDING
        engine.step()
        for own, request in zip(keys, requests, strict=True):
            assert engine.ask(own, request) == 40
            engine.manager.on_request_finished(request)
        assert not engine.manager.has_pending_work()


def test_the_cpu_cache_is_emptied_while_transfers_are_under_way(engine: Engine) -> None:
    assert engine.compute(KEYS[:6], wait=False)
    engine.forget()
    request = engine.request()
    for each in KEYS[:6]:
        assert engine.manager.lookup(each, request) is LookupResult.HIT_PENDING
    engine.step(wait=False)
    engine.forget()
    assert not engine.tier.has_pending_work()
    assert engine.ask(KEYS[:6]) == 6


def test_what_was_found_is_there_until_it_is_loaded() -> None:
    with Engine([tier(None, ram=LITTLE)], chunks=8) as engine:
        assert engine.compute(KEYS[:4])
        request = engine.request()
        flood = iter(range(10_000, 20_000))
        engine.forget()
        # As a lookup of the manager, before the step ends.
        assert [engine.manager.lookup(each, request) for each in KEYS[:4]] == [LookupResult.HIT_PENDING] * 4
        for _ in range(MANY):
            engine.tier._blocks.put(key(next(flood)), engine.tier._rows, pages=[7])
        engine.step()
        assert engine.ask(KEYS[:4], request) == 4
        # The control: what nobody has to load is not held beyond the step.
        engine.forget()
        assert [engine.tier.lookup(each, request) for each in KEYS[:4]] == [LookupResult.HIT] * 4
        for _ in range(MANY):
            engine.tier._blocks.put(key(next(flood)), engine.tier._rows, pages=[7])
        assert [engine.tier.lookup(each, request) for each in KEYS[:4]] == [LookupResult.HIT] * 4
        engine.step()
        for _ in range(MANY):
            engine.tier._blocks.put(key(next(flood)), engine.tier._rows, pages=[7])
        assert [engine.tier.lookup(each, request) for each in KEYS[:4]] == [LookupResult.MISS] * 4


def test_a_request_that_ends_holds_nothing() -> None:
    with Engine([tier(None, ram=LITTLE)]) as engine:
        assert engine.compute(KEYS[:4])
        request = engine.request()
        assert engine.tier.lookup(KEYS[0], request) is LookupResult.HIT
        engine.manager.on_request_finished(request)
        for number in range(MANY):
            engine.tier._blocks.put(key(5000 + number), engine.tier._rows, pages=[7])
        assert engine.tier.lookup(KEYS[0], engine.request()) is LookupResult.MISS


def test_a_full_cpu_cache_promotes_nothing_and_holds_nothing(engine: Engine) -> None:
    assert engine.compute(KEYS)
    engine.forget()
    own = [key(300 + number) for number in range(16)]
    assert engine.compute(own)
    running = engine.request()
    engine.manager.prepare_load(own, running)
    asked = engine.request()
    assert engine.manager.lookup(KEYS[0], asked) is LookupResult.MISS
    engine.step()
    assert not engine.tier._requests[asked.req_id].leases
    engine.manager.complete_load(own, running)
    assert engine.ask(KEYS, asked) == len(KEYS)


def test_what_finds_no_room_is_not_stored_and_vllm_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    with Engine([tier(None, ram=LITTLE)], chunks=200) as engine:
        assert engine.compute([key(1000 + number) for number in range(MANY)])
        # All that is in RAM is in use, so nothing of it makes room.
        found = [engine.tier._blocks.lease(key(1000 + number)) for number in range(MANY)]
        leases = [lease for lease in found if lease is not None]
        assert 50 < len(leases) < MANY
        with caplog.at_level(logging.WARNING, LOG):
            assert engine.compute(KEYS)
        assert "12 of 12 chunks are not stored: 12 no room" in caplog.text
        for lease in leases:
            lease.release()
        assert engine.compute([key(50)])
        counted = stats(engine)
        assert counted["stratakv_refused_blocks_total"] == {(): 12}
        assert counted["vllm:kv_offload_tiering_cascade_job_failures"] == {("1:StrataTier",): 1}
        engine.forget()
        assert engine.ask(KEYS) == 0
        assert engine.ask([key(50)]) == 1


def test_a_tier_that_takes_longer_than_it_may_gets_no_more_stores(tmp_path: Path) -> None:
    # As a disk far too slow: no store is as quick as this asks for.
    slow = {
        "backpressure_cls": "EMABackpressureDetector",
        "policy_cls": "DropStorePolicy",
        "high_water_s": 2e-12,
        "low_water_s": 1e-12,
        "warmup_completions": 1,
        "decay_half_life_s": 0,
    }
    with Engine([tier(tmp_path / "store", backpressure=slow)]) as engine:
        for number in range(6):
            assert engine.compute([KEYS[number]])
        assert engine.tier.bp_detector.is_under_pressure()
        assert stats(engine)["vllm:kv_offload_tiering_backpressure_stores_dropped"][("1:StrataTier",)] >= 1
        engine.forget()
        found = [engine.ask([each]) for each in KEYS[:6]]
        assert found[0] == 1
        assert found[-1] == 0
        # What is here is found and loaded all the same, and after a reset stores go on.
        assert engine.compute([KEYS[7]])
        engine.forget()
        assert engine.ask([KEYS[7]]) == 1


def test_calls_come_back_while_every_worker_is_busy(tmp_path: Path) -> None:
    with Engine([tier(tmp_path / "store", threads=2)], chunks=64) as engine:
        assert engine.compute(KEYS)
        engine.forget()
        # Workers that say what failed stand still, with a job each, as long as the log does.
        reached, go = threading.Event(), threading.Event()

        class Blocked(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                reached.set()
                go.wait()

        handler, log = Blocked(logging.WARNING), logging.getLogger(LOG)
        log.addHandler(handler)
        try:
            # Two jobs that fail at once, since nothing of them is here.
            blank = engine.request()
            for number in range(2):
                engine.manager.primary_tier.prepare_store([key(700 + number)], blank)
                engine.tier.submit_load(promotion(engine, key(700 + number), 900 + number))
            assert reached.wait(30)
            request = engine.request()
            assert [engine.manager.lookup(each, request) for each in KEYS] == [LookupResult.HIT_PENDING] * 12
            assert engine.compute([key(50)], wait=False)
            engine.step(wait=False)
            engine.tier.touch(KEYS, request)
            assert engine.manager.has_pending_work()
        finally:
            go.set()
            log.removeHandler(handler)
        engine.tier.drain_jobs()
        done = {result.job_id: result for result in engine.tier.get_finished_jobs()}
        assert [done.pop(900 + number).success for number in range(2)] == [False, False]
        assert done
        assert all(result.success for result in done.values())


def promotion(engine: Engine, of: bytes, job: int) -> Any:
    return TransferJob(job_id=job, keys=[of], chunk_ids=np.array([0]), is_promotion=True, req_context=engine.request())


def test_a_load_of_what_is_not_here_fails_and_says_so(engine: Engine) -> None:
    engine.tier.submit_load(promotion(engine, key(1), 5))
    engine.tier.drain_jobs()
    (result,) = engine.tier.get_finished_jobs()
    assert (result.job_id, result.success, result.successful_keys) == (5, False, None)
    assert not engine.tier.get_finished_jobs()


def test_an_engine_that_ends_gives_its_memory_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine([tier(tmp_path / "store")])
    memory = engine.memory
    assert engine.compute(KEYS, wait=False)
    request = engine.request()
    engine.manager.lookup(key(77), request)
    assert os.path.exists(memory)
    caplog.clear()
    engine.close()
    assert not os.path.exists(memory)
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert not said, "vLLM could not unmap it"
    assert engine.tier.lookup(KEYS[0], request) is LookupResult.MISS
    engine.tier.shutdown()
    # What waited to be stored was.
    with Engine([tier(tmp_path / "store")]) as again:
        assert again.ask(KEYS) == len(KEYS)


def test_a_directory_that_another_engine_uses_is_refused_at_the_start(tmp_path: Path) -> None:
    with Engine([tier(tmp_path / "store")]) as engine:
        before = set(os.listdir("/dev/shm"))
        with pytest.raises(
            stratakv.StoreLockedError, match=r"in use by another process; close it there or set another"
        ):
            Engine([tier(tmp_path / "store")])
        # vLLM could take back the memory of the one that failed.
        assert set(os.listdir("/dev/shm")) <= before
        assert engine.compute(KEYS)


def test_replicas_have_a_directory_each(tmp_path: Path) -> None:
    with (
        Engine([tier(tmp_path / "store")], replica=(0, 2)) as one,
        Engine([tier(tmp_path / "store")], replica=(1, 2)) as two,
    ):
        assert one.compute(KEYS)
        assert two.ask(KEYS) == 0
        assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["dp0", "dp1"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"threads": 0}, "threads is 0, expected an integer from 1 to 64"),
        ({"threads": "4"}, "threads is '4'"),
        ({"weights_version": 3}, "weights_version is 3, expected text"),
        ({"locality": "HERE"}, "locality is 'HERE', expected one of LOCAL, REMOTE"),
        ({"rams": {}}, "unknown option 'rams', expected one of threads, weights_version"),
        ({"ram": {"capacity": 1}}, "unknown key 'ram.capacity'; did you mean 'ram.capacity_bytes'"),
        ({"ram": {"capacity_bytes": "8MiB", "codec": "int8_sym"}}, "codec"),
        ({"qdrant": {"url": "http://localhost"}}, "qdrant finds prompts by their tokens"),
        ({"config": "/nowhere.toml"}, "nowhere.toml"),
    ],
    ids=str,
)
def test_a_bad_option_is_a_sentence_at_the_start(tmp_path: Path, wrong: dict[str, Any], sentence: str) -> None:
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(stratakv.StrataKVError, match=sentence):
        Engine([{**tier(tmp_path / "store"), **wrong}])
    assert set(os.listdir("/dev/shm")) <= before
    with Engine([tier(tmp_path / "store")]) as engine:
        assert engine.compute(KEYS)


def test_a_tier_smaller_than_one_chunk_is_a_sentence_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(stratakv.ConfigError, match="block"):
        Engine([tier(tmp_path / "store", ram=LITTLE)], row=8 << 20, chunks=1)


def test_a_directory_that_cannot_be_made_is_a_sentence_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(stratakv.StoreError, match=os.strerror(errno.ENOTDIR)):
        Engine([tier(tmp_path / "file" / "store")])


@pytest.mark.parametrize("row", [4096, 4096 * 3, 1 << 20])
def test_rows_of_any_size_that_vllm_makes(tmp_path: Path, row: int) -> None:
    with Engine([tier(tmp_path / "store")], row=row, chunks=4) as engine:
        assert engine.compute(KEYS[:4])
        engine.forget()
        assert engine.ask(KEYS[:4]) == 4
    with Engine([tier(tmp_path / "store")], row=row, chunks=4) as engine:
        assert engine.ask(KEYS[:4]) == 4


def test_a_request_that_asks_for_other_tiers_only_gets_nothing_from_this_one(engine: Engine) -> None:
    assert engine.compute(KEYS)
    engine.forget()
    request = engine.request()
    request.load_tier_filter = TierFilter(matchers=(TierMatcher(medium=Medium.CPU),))
    assert engine.ask(KEYS, request) == 0
    request = engine.request()
    request.load_tier_filter = TierFilter(matchers=(TierMatcher(medium=Medium.STORAGE),))
    assert engine.ask(KEYS, request) == len(KEYS)


def test_what_was_touched_stays_longest() -> None:
    for touched in (False, True):
        with Engine([tier(None, ram=LITTLE, threads=1)], chunks=200) as engine:
            assert engine.compute(KEYS)
            assert engine.compute([key(1000 + number) for number in range(70)])
            if touched:
                engine.manager.touch(KEYS, engine.request())
                # The one worker takes a job when it is done with the touches before.
                while engine.tier._work["touch"]:
                    engine.step()
                assert engine.compute([key(2000)])
            assert engine.compute([key(3000 + number) for number in range(70)])
            engine.forget()
            assert engine.ask(KEYS) == (len(KEYS) if touched else 0)


def test_metrics_are_those_that_are_defined(engine: Engine) -> None:
    defined = TieringOffloadingSpec.build_metric_definitions(engine.extra)
    assert engine.compute(KEYS)
    engine.forget()
    assert engine.ask(KEYS) == len(KEYS)
    engine.tier.submit_load(promotion(engine, key(999), 5))
    engine.tier.drain_jobs()
    engine.tier.get_finished_jobs()
    counted = stats(engine)
    own = {name: values for name, values in counted.items() if name.startswith("stratakv_")}
    assert set(own) == {"stratakv_loaded_blocks_total", "stratakv_failed_loads_total", "stratakv_used_bytes"}
    for name, values in own.items():
        assert all(len(labels) == len(defined[name].labelnames) for labels in values)
    assert own["stratakv_used_bytes"][("ram",)] > 12 * ROW
    assert not any(name.startswith("stratakv_") for name in stats(engine))


def test_events_tell_what_came_and_what_left() -> None:
    with Engine([tier(None, ram=LITTLE, enable_kv_events=True)], chunks=200, events=True) as engine:
        assert engine.compute(KEYS)
        told = [event for event in engine.manager.take_events() if event.medium is Medium.STORAGE]
        assert [(set(event.keys), event.removed, event.ownership) for event in told] == [
            (set(KEYS), False, "StrataTier")
        ]
        assert engine.compute([key(100 + number) for number in range(MANY)])
        told = [event for event in engine.manager.take_events() if event.medium is Medium.STORAGE]
        here = set(KEYS)
        for event in told:
            here = here - set(event.keys) if event.removed else here | set(event.keys)
        engine.forget()
        request = engine.request()
        found = {each for each in here if engine.tier.lookup(each, request) is LookupResult.HIT}
        assert found == here
        assert not here & set(KEYS)


def test_without_events_in_vllm_there_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, LOG),
        Engine([tier(tmp_path / "store", enable_kv_events=True)]) as engine,
    ):
        assert engine.compute(KEYS)
        assert not list(engine.manager.take_events())
    assert "vLLM publishes no events" in caplog.text


def test_what_another_node_has_is_found_behind_the_lookup(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    server = Redis(tmp_path)
    shared = {"dragonfly": {"url": f"redis://127.0.0.1:{server.port}/0"}, "store": {"secret": "of both"}}
    try:
        with Engine([tier(tmp_path / "one", **shared)]) as one:
            assert one.compute(KEYS)
            one.tier._caches.flush()
            request = one.request()
            assert one.tier.lookup(KEYS[0], request) is LookupResult.RETRY
        with Engine([tier(tmp_path / "two", **shared)]) as two:
            assert two.ask(KEYS) == len(KEYS)
            assert two.ask([*KEYS[:2], key(999)]) == 2
            assert stats(two)["stratakv_loaded_blocks_total"] == {("dragonfly",): 12}
            server.kill()
            two.forget()
            assert two.ask([key(998)]) == 0
            assert two.ask(KEYS) == len(KEYS)
    finally:
        server.kill()
