"""The tier that nodes share, on a real server: what one stored another hits, and no fault of it reaches a request."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import stratakv
from servers import Proxy, Redis, cluster, redis
from stores import assert_right, config, geometry, kv_of, loaded, tokens_of

SHAPE = geometry(block_tokens=8, head_dim=32)
TOKENS = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


def node(url: str, **more: object) -> stratakv.CacheManager:
    options = {"deadline_s": 2.0} | more
    secret = str(options.pop("secret", "shared"))
    shared = stratakv.DragonflyConfig(url=url, **options)
    return stratakv.open(replace(config(None, secret=secret), dragonfly=shared))


def put(cache: stratakv.ModelCache, seed: int, **more: str) -> None:
    tokens = tokens_of(seed, TOKENS)
    assert cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND", **more) == TOKENS


def test_what_one_node_stored_another_hits(server: Redis) -> None:
    with node(server.url) as one, node(server.url) as two:
        a, b = one.register("m", SHAPE), two.register("m", SHAPE)
        for seed in range(10):
            put(a, seed)
        one.flush()
        for seed in range(10):
            with b.match(tokens_of(seed, TOKENS)) as hit:
                assert hit.tokens == TOKENS
                assert set(hit.explain().blocks) == {"dragonfly"}
            explanation = assert_right(b, tokens_of(seed, TOKENS))
            assert (explanation.loaded_tokens, set(explanation.blocks)) == (TOKENS, {"dragonfly"})
            # Now it is here.
            again = assert_right(b, tokens_of(seed, TOKENS))
            assert (again.loaded_tokens, set(again.blocks), again.reason) == (TOKENS, {"ram"}, None)
        stats = two.status().dragonfly
        assert (stats.asked_blocks, stats.hit_blocks, stats.miss_blocks) == (80, 80, 0)
        assert b.stats().hit_blocks + b.stats().miss_blocks == b.stats().asked_blocks
        two.flush()
        stats = two.status().dragonfly
        assert (stats.written_blocks, stats.known_blocks) == (0, 80), "what came from there is not sent back"


def test_a_prefix_that_is_here_goes_on_there(server: Redis) -> None:
    with node(server.url, secret="halves") as one, node(server.url, secret="halves") as two:
        a, b = one.register("m", SHAPE), two.register("m", SHAPE)
        put(a, 1)
        one.flush()
        tokens = tokens_of(1, TOKENS)
        b.put(tokens[:24], kv_of(tokens[:24], SHAPE), layout="LKHND")
        explanation = assert_right(b, tokens)
        assert explanation.blocks == ("ram",) * 3 + ("dragonfly",) * 5
        with b.match([*tokens, *range(16)]) as hit:
            assert (hit.tokens, hit.explain().reason) == (TOKENS, "never_stored")


def test_a_store_that_is_closed_under_a_match_is_a_miss(server: Redis) -> None:
    import numpy as np

    with node(server.url, secret="closing") as one:
        put(one.register("m", SHAPE), 1)
    with node(server.url, secret="closing") as two:
        hit = two.register("m", SHAPE).match(tokens_of(1, TOKENS))
        assert hit.tokens == TOKENS
    out = np.zeros((3, 2, 2, TOKENS, 32), np.float32)
    assert hit.load(out, layout="LKHND") == 0
    assert hit.explain().reason in ("closed", "error")


def test_a_match_that_was_released_loads_nothing_from_there_either(server: Redis) -> None:
    with node(server.url, secret="released") as one, node(server.url, secret="released") as two:
        put(one.register("m", SHAPE), 1)
        one.flush()
        hit = two.register("m", SHAPE).match(tokens_of(1, TOKENS))
        hit.release()
        with pytest.raises(stratakv.ClosedError):
            hit.load(kv_of(tokens_of(1, TOKENS), SHAPE), layout="LKHND")
        assert two.status().dragonfly.asked_blocks == 0


def test_tenants_models_and_secrets_share_nothing(server: Redis) -> None:
    with node(server.url, secret="apart") as one, node(server.url, secret="apart") as two:
        put(one.register("m", SHAPE), 1, tenant="t")
        one.flush()
        b, other = two.register("m", SHAPE), two.register("n", SHAPE)
        tokens = tokens_of(1, TOKENS)
        assert b.match(tokens, tenant="t").tokens == TOKENS
        assert [b.match(tokens, tenant=tenant).tokens for tenant in ("", "u")] == [0, 0]
        assert other.match(tokens, tenant="t").tokens == 0
    with node(server.url, secret="another") as three:
        assert three.register("m", SHAPE).match(tokens, tenant="t").tokens == 0


def test_a_value_that_is_not_right_is_a_miss_and_never_a_wrong_byte(server: Redis) -> None:
    import redis as library

    client = library.Redis.from_url(server.url)
    with node(server.url, secret="hostile") as one:
        a = one.register("m", SHAPE)
        put(a, 1)
        put(a, 2)
        one.flush()
        prefix = f"stratakv:{a._model.fingerprint.hex()}:"
        names = [prefix + name.hex() for name in a.match(tokens_of(1, TOKENS))._lease.names]
        foreign = client.get(prefix + a.match(tokens_of(2, TOKENS))._lease.names[3].hex())
    right = client.get(names[3])
    for value in (right[:-1], right[:100], b"", right[:50] + b"\1" + right[51:], right + b"\0", foreign):
        client.set(names[3], value)
        with node(server.url, secret="hostile") as two:
            explanation = assert_right(two.register("m", SHAPE), tokens_of(1, TOKENS))
            assert (explanation.loaded_tokens, explanation.reason) == (24, "corrupt")
            assert two.stats().corrupt_blocks == 1
    client.delete(names[3])
    with node(server.url, secret="hostile") as two:
        assert assert_right(two.register("m", SHAPE), tokens_of(1, TOKENS)).loaded_tokens == 24


def test_blocks_expire_there_if_they_are_to(server: Redis) -> None:
    import redis as library

    client = library.Redis.from_url(server.url)
    with node(server.url, secret="expiry", ttl_s=1000) as one:
        a = one.register("m", SHAPE)
        put(a, 1)
        one.flush()
        keys = list(client.scan_iter(match=f"stratakv:{a._model.fingerprint.hex()}:*"))
        assert len(keys) == 8
        assert all(900 < client.ttl(key) <= 1000 for key in keys)
        assert one.dragonfly.forget(a._model.fingerprint) == 8
        assert one.dragonfly.leading(a._model.fingerprint, a.match(tokens_of(1, TOKENS))._lease.names) == (0, None)


@pytest.mark.parametrize("mode", ["blackhole", "reset", "refuse", "truncate"])
def test_a_network_that_fails_is_a_miss_within_the_deadline_and_recovers(server: Redis, mode: str) -> None:
    proxy = Proxy(server.port)
    secret = f"proxy {mode}"
    with node(server.url, secret=secret) as one:
        put(one.register("m", SHAPE), 1)
        one.flush()
    try:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        with node(url, secret=secret, deadline_s=0.2) as two:
            b = two.register("m", SHAPE)
            tokens = tokens_of(1, TOKENS)
            hit = b.match(tokens)
            assert hit.tokens == TOKENS
            proxy.most_bytes = 2000
            proxy.mode = mode
            if mode == "refuse":
                proxy.cut()
            took = []
            for _ in range(6):
                started = time.monotonic()
                got, explanation = loaded(b, tokens_of(1, TOKENS))
                took.append(time.monotonic() - started)
                assert got.shape[3] == explanation.loaded_tokens == 0
                assert explanation.reason in ("timeout", "error", "evicted")
            assert max(took) < 0.2 * 2 + 1.0, took
            assert two.status().dragonfly.guard.state in ("open", "half_open")
            assert b.put(tokens_of(2, TOKENS), kv_of(tokens_of(2, TOKENS), SHAPE), layout="LKHND") == TOKENS
            assert assert_right(b, tokens_of(2, TOKENS)).loaded_tokens == TOKENS, "what is here is served"
            hit.release()
            proxy.mode = "pass"
            for _ in range(100):
                if assert_right(b, tokens).loaded_tokens == TOKENS:
                    break
                time.sleep(0.1)
            assert two.status().dragonfly.guard.state == "closed"
    finally:
        proxy.close()


def test_a_server_that_stops_dies_and_comes_back_costs_hits_alone(tmp_path: Path) -> None:
    with redis(tmp_path) as server, node(server.url, deadline_s=0.2) as one:
        a = one.register("m", SHAPE)
        put(a, 1)
        one.flush()
        os.kill(server.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        put(a, 2)
        assert assert_right(a, tokens_of(3, TOKENS)).loaded_tokens == 0
        assert time.monotonic() - started < 1.5
        os.kill(server.process.pid, signal.SIGCONT)
        server.kill()
        for seed in range(4, 9):
            put(a, seed)
            assert assert_right(a, tokens_of(seed, TOKENS)).loaded_tokens == TOKENS
            assert assert_right(a, tokens_of(seed + 100, TOKENS)).loaded_tokens == 0
        server.start()
        for seed in range(200, 400):
            put(a, seed)
            one.flush()
            if one.status().dragonfly.written_blocks > 8:
                break
            time.sleep(0.05)
        assert one.status().dragonfly.written_blocks > 8, "it is written to again, without help"


def test_nodes_share_a_cluster_and_go_on_with_what_is_left_of_it(tmp_path: Path) -> None:
    with cluster(tmp_path) as servers:
        url = f"redis://127.0.0.1:{servers[0].port}"
        with node(url, cluster=True) as one, node(url, cluster=True) as two:
            a, b = one.register("m", SHAPE), two.register("m", SHAPE)
            for seed in range(24):
                put(a, seed)
            one.flush()
            assert one.status().dragonfly.written_blocks == 192
            assert all(assert_right(b, tokens_of(seed, TOKENS)).loaded_tokens == TOKENS for seed in range(10))
            servers[2].kill()
            started = time.monotonic()
            found = [assert_right(b, tokens_of(seed, TOKENS)).loaded_tokens for seed in range(10, 24)]
            assert time.monotonic() - started < 14 * 2.0
            # Of each prompt what lies before the first block that was on the node that is gone.
            assert 0 < sum(found) < 14 * TOKENS
            for seed in range(100, 120):
                put(a, seed)
            one.flush()
            assert 192 < one.status().dragonfly.written_blocks < 192 + 160
            assert sum(assert_right(b, tokens_of(seed, TOKENS)).loaded_tokens for seed in range(100, 120)) > 0


def test_a_full_server_refuses_and_requests_do_not_notice(tmp_path: Path) -> None:
    with redis(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as server, node(server.url) as one:
        a = one.register("m", SHAPE)
        for seed in range(30):
            put(a, seed)
        one.flush()
        stats = one.status().dragonfly
        assert stats.dropped_blocks > 0
        assert assert_right(a, tokens_of(29, TOKENS)).loaded_tokens == TOKENS


def test_a_password_is_needed_and_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with redis(tmp_path, "--requirepass", "hush-hush") as server:
        with node(server.url, password="wrong-word") as one:
            put(one.register("m", SHAPE), 1)
            one.flush()
            assert one.status().dragonfly.written_blocks == 0
            shown = caplog.text + repr(one.config) + repr(one.status())
            assert "hush" not in shown
            assert "wrong-word" not in shown
        with node(server.url, password="hush-hush", required=True) as one:
            put(one.register("m", SHAPE), 1)
            one.flush()
            assert one.status().dragonfly.written_blocks == 8


def test_a_server_that_is_not_there_is_said_once_or_refused_if_it_is_required(caplog: pytest.LogCaptureFixture) -> None:
    with node("redis://127.0.0.1:1/0", deadline_s=0.2) as one:
        assert "dragonfly does not answer" in caplog.text
        put(one.register("m", SHAPE), 1)
        assert assert_right(one["m"], tokens_of(1, TOKENS)).loaded_tokens == TOKENS
    with pytest.raises(stratakv.StoreError, match="start the server, or do not require it"):
        node("redis://127.0.0.1:1/0", deadline_s=0.2, required=True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"url": "http://host"}, "begins with 'http'"),
        ({"url": 7}, "dragonfly.url is no text"),
        ({"ttl_s": 0}, "dragonfly.ttl_s is 0"),
        ({"ttl_s": -1}, "dragonfly.ttl_s is -1"),
        ({"deadline_s": 0}, "dragonfly.deadline_s is 0"),
        ({"cluster": 1}, "dragonfly.cluster is 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(stratakv.ConfigError, match=says):
        stratakv.DragonflyConfig(**wrong)


def test_nodes_share_by_a_secret() -> None:
    with pytest.raises(stratakv.ConfigError, match="the same secret"):
        stratakv.Config(dragonfly=stratakv.DragonflyConfig(url="redis://host"))
