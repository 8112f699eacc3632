"""What is near to a prompt comes up to RAM, is never a hit by that, and stops coming where it does not pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import stratakv
from qdrant_server import qdrant
from servers import Proxy, redis
from stores import assert_right, config, geometry, kv_of, tokens_of

SHAPE = geometry(block_tokens=8, head_dim=32)
TOKENS = 128


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    with qdrant(tmp_path_factory.mktemp("qdrant")) as running:
        yield running


def node(path: Path | None, vectors: dict[str, object], **more: object) -> stratakv.CacheManager:
    store = config(path, secret="shared", **more)
    return stratakv.open(replace(store, qdrant=stratakv.QdrantConfig(**{"deadline_s": 2.0} | vectors)))


def put(cache: stratakv.ModelCache, tokens: np.ndarray, **more: object) -> None:
    assert cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND", **more) == len(tokens)


def near_to(tokens: np.ndarray) -> np.ndarray:
    """A prompt of which the first token is another: no block is the same, and nearly all of the words are."""
    return np.concatenate([[49_999], tokens[:-1]])


def wait(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def test_what_is_near_is_suggested_and_nothing_of_others(server: object) -> None:
    with node(None, {"url": server.url, "collection": "suggested"}, ram="8MiB") as caches:
        a, b = caches.register("m", SHAPE), caches.register("n", SHAPE)
        for seed in range(20):
            put(a, tokens_of(seed, TOKENS), tenant="t")
        put(b, tokens_of(3, TOKENS), tenant="t")
        caches.flush()
        near = near_to(tokens_of(3, TOKENS))
        wait(lambda: a.suggest(near, tenant="t"))
        first = a.suggest(near, tenant="t")[0]
        assert first.tokens == TOKENS
        assert first.score > 0.7
        (found,) = caches.catalog.find(model="m", tenant="t", tokens=tokens_of(3, TOKENS))
        assert found.name == first.name
        assert a.match(near, tenant="t").tokens == 0, "a near prompt is no hit"
        for tenant, adapter in (("", ""), ("u", ""), ("t", "lora")):
            assert a.suggest(near, tenant=tenant, adapter=adapter) == []
        assert a.suggest(tokens_of(500, TOKENS), tenant="t") == []
        assert a.drop(tenant="t") == 320
        assert a.suggest(near, tenant="t") == []
        for wrong in ({}, {"tokens": near, "text": "x"}, {"text": "x"}, {"tokens": near, "limit": 0}):
            with pytest.raises(stratakv.InputError):
                a.suggest(**wrong)


@pytest.mark.parametrize("local", [False, True])
def test_the_chain_of_a_near_prompt_comes_up_from_ssd_before_it_is_asked_for(
    server: object, tmp_path: Path, local: bool
) -> None:
    vectors = {"path": ":memory:"} if local else {"url": server.url, "collection": "ssd"}
    with node(tmp_path, vectors) as caches:
        a = caches.register("m", SHAPE)
        tokens = tokens_of(1, TOKENS)
        put(a, tokens)
        for seed in range(2, 90):
            if seed % 10 == 2:
                # The disk may be slower than puts are.
                caches.flush()
            put(a, tokens_of(seed, TOKENS))
        caches.flush()
        assert set(a.match(tokens).explain().blocks) == {"ssd"}
        wait(lambda: a.suggest(near_to(tokens)))
        assert a.match(near_to(tokens)).tokens == 0
        wait(lambda: set(a.match(tokens).explain().blocks) == {"ram"})
        assert assert_right(a, tokens).loaded_tokens == TOKENS
        stats = caches.status().semantic_prefetch
        assert stats.prefetching
        assert stats.lifted == stats.hit > 0


def test_the_chain_of_a_near_prompt_comes_up_from_the_tier_that_nodes_share(server: object, tmp_path: Path) -> None:
    with redis(tmp_path) as shared:

        def opened() -> stratakv.CacheManager:
            dragonfly = stratakv.DragonflyConfig(url=shared.url, deadline_s=2.0)
            vectors = stratakv.QdrantConfig(url=server.url, collection="shared", deadline_s=2.0)
            return stratakv.open(replace(config(None, secret="shared"), dragonfly=dragonfly, qdrant=vectors))

        with opened() as one, opened() as two:
            a, b = one.register("m", SHAPE), two.register("m", SHAPE)
            tokens = tokens_of(1, TOKENS)
            put(a, tokens, adapter="lora", tenant="t")
            one.flush()
            wait(lambda: b.suggest(near_to(tokens), adapter="lora", tenant="t"))
            ask = lambda: b.match(near_to(tokens), adapter="lora", tenant="t").release()  # noqa: E731
            wait(lambda: ask() or two.status().semantic_prefetch.lifted)
            explanation = assert_right(b, tokens, adapter="lora", tenant="t")
            assert (explanation.loaded_tokens, set(explanation.blocks)) == (TOKENS, {"ram"})


def test_it_stays_within_its_budget_and_none_is_none(server: object, tmp_path: Path) -> None:
    for budget in (5, 0):
        path, size = tmp_path / str(budget), 6144 * 2
        vectors = {"url": server.url, "collection": f"budget{budget}", "prefetch_bytes": budget * size}
        with node(path, vectors) as caches:
            a = caches.register("m", SHAPE)
            for seed in range(60):
                put(a, tokens_of(seed, TOKENS))
                if seed % 10 == 0:
                    caches.flush()
            caches.flush()
            wait(lambda a=a: a.suggest(near_to(tokens_of(1, TOKENS))))
            held = a._model.record_bytes * 16
            a.match(near_to(tokens_of(1, TOKENS))).release()
            if budget:
                wait(lambda caches=caches: caches.status().semantic_prefetch.lifted)
            time.sleep(0.3)
            assert caches.status().semantic_prefetch.lifted <= min(budget * size, held)
            assert caches.status().semantic_prefetch.prefetching == bool(budget)


def test_it_switches_itself_off_where_it_does_not_pay_and_on_again_after_a_while() -> None:
    from stratakv.near import SemanticIndex
    from stratakv.tiers.qdrant import Qdrant

    now, lifted = [0.0], [0, 0]
    settings = stratakv.QdrantConfig(path=":memory:")
    index = SemanticIndex(Qdrant(settings), settings, "x", lambda: (lifted[0], lifted[1]), list, clock=lambda: now[0])
    try:

        def after(seconds: float, came: int, asked_for: int) -> tuple[bool, int]:
            lifted[0], lifted[1], now[0] = lifted[0] + (came << 20), lifted[1] + (asked_for << 20), now[0] + seconds
            index._judge(now[0])
            return index.stats().prefetching, index.stats().paused

        assert after(60, 100, 0) == (True, 0), "what came just now has its time to be asked for"
        assert after(40, 0, 20) == (True, 0), "it pays"
        assert after(40, 100, 0) == (True, 0)
        assert after(10, 0, 0) == (True, 0)
        assert after(40, 0, 5) == (False, 1), "it does not"
        assert after(500, 0, 0) == (False, 1)
        assert after(110, 0, 0) == (True, 1)
        assert after(40, 100, 0) == (True, 1)
        assert after(40, 0, 0) == (False, 2)
        assert after(700, 0, 0) == (False, 2), "the second pause is longer"
    finally:
        index.close()


def test_texts_are_near_where_texts_are_embedded(server: object) -> None:
    vectors = {"url": server.url, "collection": "texts", "embedding": "text"}
    with node(None, vectors) as caches:
        a = caches.register("m", SHAPE)
        texts = ["What is the capital of France?", "Sort a list in Python.", "How do I bake bread at home?"]
        for seed, text in enumerate(texts):
            put(a, tokens_of(seed, TOKENS), text=text)
        put(a, tokens_of(9, TOKENS))
        caches.flush()
        wait(lambda: a.suggest(text="Which city is the capital of France?"))
        assert caches.status().qdrant.written_points == 3, "what came without a text has no point"
        (found, *_) = caches.catalog.find(model="m", text="Which city is the capital of France?")
        assert found.name == caches.catalog.find(model="m", tokens=tokens_of(0, TOKENS))[0].name
        assert found.score is not None
        assert found.score > 0.5
        with pytest.raises(stratakv.InputError, match="give a text"):
            a.suggest(tokens_of(0, TOKENS))


@pytest.mark.parametrize("mode", ["blackhole", "reset", "refuse", "truncate", "latency"])
def test_a_network_that_fails_costs_no_request(server: object, mode: str) -> None:
    proxy = Proxy(server.url)
    try:
        with node(None, {"url": proxy.url, "collection": f"fails-{mode}", "deadline_s": 0.3}) as caches:
            a = caches.register("m", SHAPE)
            put(a, tokens_of(0, TOKENS))
            caches.flush()
            proxy.mode, proxy.most_bytes, proxy.latency_s = mode, 100, 0.5
            if mode == "refuse":
                proxy.cut()
            begun = time.monotonic()
            for seed in range(1, 15):
                assert a.match(tokens_of(seed, TOKENS)).tokens == 0
                put(a, tokens_of(seed, TOKENS))
                assert assert_right(a, tokens_of(seed, TOKENS)).loaded_tokens == TOKENS
            assert time.monotonic() - begun < 2, "no request waits for the vector index"
            wait(lambda: "no_vector_index" in caches.status().degraded)
            proxy.mode = "pass"
            wait(lambda: a.match(tokens_of(99, TOKENS)) and not caches.status().degraded, 30.0)
            wait(lambda: caches.flush() or a.suggest(near_to(tokens_of(14, TOKENS))))
    finally:
        proxy.close()


def test_a_retired_version_loses_its_points(server: object, tmp_path: Path) -> None:
    from servers import postgres

    with postgres(tmp_path) as database:
        catalog = stratakv.PostgresConfig(url=database.url(), interval_s=0.02)
        vectors = stratakv.QdrantConfig(url=server.url, collection="retired", deadline_s=2.0)
        with stratakv.open(replace(config(None, secret="x"), postgres=catalog, qdrant=vectors)) as caches:
            a = caches.register("m", SHAPE)
            put(a, tokens_of(1, TOKENS))
            caches.flush()
            wait(lambda: caches.semantic.tier.count() == 1)
            wait(lambda: caches.catalog.retire("m", ""))
            wait(lambda: caches.semantic.tier.count() == 0)
