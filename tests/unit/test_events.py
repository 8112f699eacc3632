"""KV events over real sockets: in order, without gaps, and forgotten where something is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import stratakv
from publishers import Engine, batch, stored
from stores import config, geometry, kv_of, tokens_of
from stratakv.events import Cleared, Event, Publisher, Removed, Stored, Subscriber, decode
from stratakv.router import Router

SHAPE = geometry(block_tokens=8, head_dim=32)


def receive(subscriber: Subscriber, enough: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    for _ in range(400):
        events += subscriber.poll(0.05)
        if enough(events):
            return events
    raise AssertionError(events)


def test_both_forms_of_an_event_are_read() -> None:
    as_map = batch(stored([1, 2], None, [5, 6, 7, 8]), {"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU"})
    older = batch(
        ["BlockStored", [1, 2], None, [5, 6, 7, 8], 2, None, "GPU", None],
        ["BlockRemoved", [1], "CPU"],
        ["AllBlocksCleared"],
        {"type": "SomethingNew", "field": 1},
    )
    both = [
        Stored(names=(1, 2), parent=None, tokens=(5, 6, 7, 8), block_tokens=2, place="gpu"),
        Removed(names=(1,), place="ram"),
    ]
    assert decode(as_map) == both
    assert decode(older) == [*both, Cleared()]


def test_what_tokens_do_not_name_is_left_out() -> None:
    image = stored([1, 2, 3], None, [1, 2, 3, 4, 5, 6], extra_keys=[["salt"], None, [["picture", 0]]])
    window = stored([7], None, [1, 2], group_idx=1, kv_cache_spec_kind="sliding_window")
    sglang = stored([b"x" * 16], None, [1, 2], cache_salt="salt", lora_name="a")
    vllm = stored([9], None, [1, 2], extra_keys=[["a", "salt"]], lora_name="a")
    found = decode(batch(image, window, sglang, vllm))
    assert [(event.names, event.tenant, event.adapter) for event in found] == [
        ((1, 2), "salt", ""),
        ((b"x" * 16,), "salt", "a"),
        ((9,), "salt", "a"),
    ]


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff", msgspec.msgpack.encode(7), msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}], 0]),
     batch(stored([1], None, [1, 2, 3])), batch(stored(["x"], None, [1, 2])), batch([])],
)  # fmt: skip
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(stratakv.InputError, match="not a batch of KV events"):
        decode(payload)


def test_what_was_missed_is_asked_for_and_comes_in_order() -> None:
    engine = Engine()
    try:
        engine.send(batch(stored([0], None, [0, 0])), lose=True)
        with Subscriber(*engine.endpoints()) as subscriber:
            # What was there before it began to listen.
            assert [event.names for event in receive(subscriber, lambda events: len(events) >= 1)] == [(0,)]
            for number in range(1, 40):
                engine.send(batch(stored([number], number - 1, [number, 0])), lose=number % 3 == 0)
            engine.send(batch(stored([40], 39, [40, 0])))
            events = receive(subscriber, lambda events: len(events) >= 40)
            assert [event.names for event in events] == [(number,) for number in range(1, 41)]
            assert subscriber.gaps > 0
    finally:
        engine.close()


def test_what_is_not_to_be_had_any_more_is_forgotten() -> None:
    engine = Engine(kept=3)
    try:
        with Subscriber(*engine.endpoints()) as subscriber:
            engine.send(batch(stored([0], None, [0, 0])))
            receive(subscriber, lambda events: len(events) >= 1)
            for number in range(1, 30):
                engine.send(batch(stored([number], None, [number, 0])), lose=True)
            engine.send(batch(stored([30], None, [30, 0])))
            events = receive(subscriber, lambda events: any(getattr(event, "names", 0) == (30,) for event in events))
            assert events[0] == Cleared()
            assert [event.names for event in events[1:]] == [(28,), (29,), (30,)]
            # An engine that began anew counts from 0.
            engine.sequence = 0
            engine.kept.clear()
            engine.send(batch(stored([99], None, [9, 9])))
            assert receive(subscriber, lambda events: len(events) >= 2)[0] == Cleared()
    finally:
        engine.close()


def test_a_publisher_that_began_anew_is_noticed_though_its_first_batches_were_lost() -> None:
    engine = Engine()
    try:
        with Subscriber(*engine.endpoints()) as subscriber:
            for number in range(10):
                engine.send(batch(stored([number], None, [number, 0])))
            receive(subscriber, lambda events: len(events) >= 10)
            engine.send(batch(stored([10], None, [10, 0])))
            receive(subscriber, lambda events: len(events) >= 1)
            engine.sequence = 0
            engine.kept.clear()
            engine.send(batch(stored([50], None, [5, 0])), lose=True)
            engine.send(batch(stored([51], None, [5, 1])), lose=True)
            engine.send(batch(stored([52], None, [5, 2])))
            events = receive(subscriber, lambda events: len(events) >= 4)
            assert events[0] == Cleared()
            assert [event.names for event in events if isinstance(event, Stored)] == [(50,), (51,), (52,)]
    finally:
        engine.close()


def test_what_cannot_be_read_costs_what_was_known_and_nothing_else() -> None:
    engine = Engine()
    try:
        engine.send(batch(stored([1], None, [1, 0])), lose=True)
        engine.send(b"no batch", lose=True)
        engine.send(batch(stored([2], None, [2, 0])), lose=True)
        with Subscriber(*engine.endpoints()) as subscriber:
            events = receive(subscriber, lambda events: len(events) >= 3)
            assert events[1] == Cleared()
            assert [event.names for event in events if isinstance(event, Stored)] == [(1,), (2,)]
    finally:
        engine.close()


def test_one_topic_is_heard_without_gaps_beside_another(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, secret="shared", ram="4MiB")) as caches:
        a, b = caches.register("a", SHAPE), caches.register("b", SHAPE)
        with (
            Publisher(caches, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", interval_s=0.01) as publisher,
            Subscriber(publisher.endpoint, publisher.replay_endpoint, topic="a") as subscriber,
        ):
            names: set[object] = set()

            def heard() -> int:
                for event in subscriber.poll(0.05):
                    names.update(getattr(event, "names", ()))
                return len(names)

            for seed in range(8):
                put(a, seed)
                put(b, seed)
            for _ in range(400):
                if heard() == 64:
                    break
            assert heard() == 64
            assert names == {name for seed in range(8) for name in a.match(tokens_of(seed, 64))._lease.names}


def put(cache: stratakv.ModelCache, seed: int, count: int = 64) -> None:
    tokens = tokens_of(seed, count)
    cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND")


def test_a_router_that_hears_a_store_knows_what_a_match_would_find(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path, secret="shared", ram="4MiB")) as caches:
        cache = caches.register("model", SHAPE)
        for seed in range(5):
            put(cache, seed)
        router = Router()
        router.add_replica("here", cache=(b"shared", "model", "", SHAPE))
        with (
            Publisher(caches, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*", interval_s=0.01, kept=4) as publisher,
            Subscriber(publisher.endpoint, publisher.replay_endpoint) as subscriber,
        ):

            def follow() -> None:
                for _ in range(400):
                    router.apply("here", subscriber.poll(0.02))
                    if router.cached_blocks("here")[0] == caches.status().index_blocks:
                        return
                raise AssertionError((router.cached_blocks("here"), caches.status().index_blocks))

            follow()
            for seed in range(5, 60):
                put(cache, seed, 128)
            caches.flush()
            cache.drop(tenant="nobody")
            follow()
            for seed in range(60):
                count = 64 if seed < 5 else 128
                found = router.route(tokens_of(seed, count)).candidates[0].hit_tokens
                with cache.match(tokens_of(seed, count)) as hit:
                    assert sum(found.values()) == hit.tokens, seed
            # Who comes late asks for more than is kept, and gets all that is there.
            late = Router()
            late.add_replica("here", cache=(b"shared", "model", "", SHAPE))
            with Subscriber(publisher.endpoint, publisher.replay_endpoint) as second:
                for _ in range(400):
                    late.apply("here", second.poll(0.02))
                    if late.cached_blocks("here")[0] == caches.status().index_blocks:
                        break
                assert late.cached_blocks("here")[0] == caches.status().index_blocks
            cache.drop()
            follow()
            assert router.cached_blocks("here")[0] == 0
