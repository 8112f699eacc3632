"""The tier that nodes share, on real servers: what one stored another hits, and no fault of it reaches a request.

Where ``STRATAKV_TEST_REDIS_URL`` names a server, what needs no control over one runs against that alone.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stratakv
from servers import GIVEN, Proxy, certificate, cluster, free_port, redis
from stores import assert_right, assert_sums, config, geometry, kv_of, loaded, tokens_of

SHAPE = geometry(block_tokens=8, head_dim=32)
TOKENS = 64
# Blocks of 1 MiB.
LARGE = geometry(layers=8, kv_heads=8, head_dim=128, block_tokens=16)
# What is written to a server that stays is found by this run alone, and expires.
RUN, TTL_S = uuid.uuid4().hex, 600.0


@dataclass
class Given:
    url: str


@pytest.fixture(scope="module", params=["given"] if GIVEN else ["redis", "valkey"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if GIVEN:
        yield Given(GIVEN)
        return
    with redis(tmp_path_factory.mktemp(request.param), kind=request.param) as running:
        yield running


def node(url: str, *, run: str = RUN, **more: object) -> stratakv.CacheManager:
    options = {"deadline_s": 2.0, "ttl_s": TTL_S} | more
    secret, ram = f"{run} {options.pop('secret', 'shared')}", options.pop("ram", "4MiB")
    shared = stratakv.DragonflyConfig(url=url, **options)
    return stratakv.open(replace(config(None, secret=secret, ram=ram), dragonfly=shared))


def put(cache: stratakv.ModelCache, seed: int, **more: str) -> None:
    tokens = tokens_of(seed, TOKENS)
    assert cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND", **more) == TOKENS


def keys_of(cache: stratakv.ModelCache, tokens: np.ndarray) -> list[str]:
    names = [name.hex() for name in cache.match(tokens)._lease.names]
    start = f"stratakv:{cache._model.fingerprint.hex()}:{cache._model.space('', '').hex()}"
    return [f"{start}:{{{names[n - n % 64]}}}:{name}" for n, name in enumerate(names)]


def assert_counted(caches: stratakv.CacheManager) -> None:
    stats = caches.status().dragonfly
    assert stats.asked_blocks == stats.hit_blocks + stats.miss_blocks


def until_served(cache: stratakv.ModelCache, tokens: np.ndarray) -> None:
    for _ in range(100):
        if assert_right(cache, tokens).loaded_tokens == len(tokens):
            return
        time.sleep(0.1)
    raise AssertionError("it is not asked again")


def test_what_one_node_stored_another_hits(server: Any) -> None:
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
        assert_sums(b.stats())
        assert (b.stats().hit_blocks, b.stats().miss_blocks) == (240, 0), "those that were not loaded, too"
        two.flush()
        stats = two.status().dragonfly
        assert (stats.written_blocks, stats.known_blocks) == (0, 80), "what came from there is not sent back"


def test_a_prefix_that_is_here_goes_on_there(server: Any) -> None:
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


def test_a_store_that_is_closed_under_a_match_is_a_miss(server: Any) -> None:
    with node(server.url, secret="closing") as one:
        put(one.register("m", SHAPE), 1)
    with node(server.url, secret="closing") as two:
        hit = two.register("m", SHAPE).match(tokens_of(1, TOKENS))
        assert hit.tokens == TOKENS
    out = np.zeros((3, 2, 2, TOKENS, 32), np.float32)
    assert hit.load(out, layout="LKHND") == 0
    assert hit.explain().reason in ("closed", "error")


def test_a_match_that_was_released_loads_nothing_from_there_either(server: Any) -> None:
    with node(server.url, secret="released") as one, node(server.url, secret="released") as two:
        put(one.register("m", SHAPE), 1)
        one.flush()
        hit = two.register("m", SHAPE).match(tokens_of(1, TOKENS))
        hit.release()
        with pytest.raises(stratakv.ClosedError):
            hit.load(kv_of(tokens_of(1, TOKENS), SHAPE), layout="LKHND")
        assert two.status().dragonfly.asked_blocks == 0


def test_tenants_models_and_secrets_share_nothing(server: Any) -> None:
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


def test_a_value_that_is_not_right_is_a_miss_and_never_a_wrong_byte(server: Any) -> None:
    import redis as library

    client = library.Redis.from_url(server.url)
    with node(server.url, secret="hostile") as one:
        a = one.register("m", SHAPE)
        put(a, 1)
        put(a, 2)
        one.flush()
        names = [keys_of(a, tokens_of(seed, TOKENS)) for seed in (1, 2)]
    names, foreign = names[0], client.get(names[1][3])
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


def test_blocks_expire_there_if_they_are_to(server: Any) -> None:
    import redis as library

    client = library.Redis.from_url(server.url)
    with node(server.url, secret="expiry", ttl_s=1000) as one:
        a = one.register("m", SHAPE)
        put(a, 1)
        one.flush()
        keys = list(client.scan_iter(match=f"stratakv:{a._model.fingerprint.hex()}:*"))
        assert len(keys) == 8
        assert all(900 < client.ttl(key) <= 1000 for key in keys)
        assert one.dragonfly.forget(a._model.fingerprint)
        assert one.dragonfly.leading(
            a._model.fingerprint + a._model.space("", ""), a.match(tokens_of(1, TOKENS))._lease.names
        ) == (0, None)


@pytest.mark.parametrize("mode", ["blackhole", "reset", "refuse", "truncate"])
def test_a_network_that_fails_is_a_miss_within_the_deadline_and_recovers(server: Any, mode: str) -> None:
    proxy = Proxy(server.url)
    secret = f"proxy {mode}"
    with node(server.url, secret=secret) as one:
        put(one.register("m", SHAPE), 1)
        one.flush()
    try:
        with node(proxy.url, secret=secret, deadline_s=0.2) as two:
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
            until_served(b, tokens)
            assert two.status().dragonfly.guard.state == "closed"
            assert_counted(two)
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("mode", "changes", "deadline_s", "served"),
    [
        ("latency", {}, 5.0, True),
        ("latency", {"latency_s": 0.3, "jitter_s": 0.1}, 0.2, False),
        ("throttle", {}, 5.0, True),
        ("throttle", {}, 0.1, False),
    ],
)
def test_a_network_that_is_slow_is_waited_for_until_the_deadline_and_no_longer(
    server: Any, mode: str, changes: dict[str, float], deadline_s: float, served: bool
) -> None:
    proxy, secret = Proxy(server.url), f"slow {mode} {served}"
    vars(proxy).update(changes)
    # At 50 MB/s these 8 MiB take 0.17 s.
    tokens = tokens_of(1, 8 * LARGE.block_tokens)
    kv = kv_of(tokens, LARGE)
    with node(server.url, secret=secret, ram="32MiB", deadline_s=5.0) as one:
        assert one.register("m", LARGE).put(tokens, kv, layout="LKHND") == len(tokens)
        one.flush()
        assert one.status().dragonfly.written_blocks == 8
    try:
        with node(proxy.url, secret=secret, ram="32MiB", deadline_s=deadline_s) as two:
            b = two.register("m", LARGE)
            hit = b.match(tokens)
            assert hit.tokens == len(tokens)
            proxy.mode = mode
            out = np.zeros_like(kv)
            for _ in range(1 if served else 6):
                started = time.monotonic()
                loaded_tokens = hit.load(out, layout="LKHND")
                assert time.monotonic() - started < deadline_s + 1.0
                reason = hit.explain().reason
                hit.release()
                assert (loaded_tokens, reason) == ((len(tokens), None) if served else (0, "timeout"))
                assert not out.any() or np.array_equal(out, kv)
                started = time.monotonic()
                hit = b.match(tokens)
                assert time.monotonic() - started < deadline_s + 1.0
                if not served and not hit.tokens:
                    break
            hit.release()
            proxy.mode = "pass"
            until_served(b, tokens)
            assert_counted(two)
            assert_sums(b.stats())
            assert (b.stats().missed["timeout"] > 0) == (b.stats().miss_blocks > 0) == (not served)
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
    import redis as library

    # Ten blocks behind a run of 64.
    chain, prompts = 74 * SHAPE.block_tokens, range(48)
    # Where keys lie depends on the secret: with this one always alike.
    fixed = {"run": "", "cluster": True, "ram": "64MiB", "username": "kv", "password": "hush-hush"}
    may = ["on", ">hush-hush", "~stratakv:*", "+ping", "+exists", "+get", "+set", "+command", "+cluster|slots"]
    with cluster(tmp_path) as servers:
        for each in servers:
            library.Redis(port=each.port).execute_command("ACL", "SETUSER", "kv", *may)
        url = f"redis://127.0.0.1:{servers[0].port}"
        with node(url, **fixed) as one, node(url, **fixed) as two, node(url, **fixed) as three:
            a, b, c = (each.register("m", SHAPE) for each in (one, two, three))
            for seed in prompts:
                tokens = tokens_of(seed, chain)
                assert a.put(tokens, kv_of(tokens, SHAPE), layout="LKHND") == chain
            one.flush()
            assert one.status().dragonfly.written_blocks == 48 * 74
            assert all(assert_right(b, tokens_of(seed, chain)).loaded_tokens == chain for seed in prompts)
            servers[2].kill()
            started = time.monotonic()
            explained = [assert_right(c, tokens_of(seed, chain)) for seed in prompts]
            assert time.monotonic() - started < 48 * 2.0
            loaded_blocks = [each.loaded_tokens // SHAPE.block_tokens for each in explained]
            assert set(loaded_blocks) == {0, 64, 74}, "whole runs are there, or none of it"
            assert loaded_blocks.count(0) <= 48 // 2, "a third of them, by chance more"
            assert {each.reason for each in explained if each.loaded_tokens < chain} == {"error"}
            assert three.status().dragonfly.guard.state == "closed"
            assert_counted(three)
            before = one.status().dragonfly.written_blocks
            for seed in range(100, 120):
                put(a, seed)
            one.flush()
            assert before < one.status().dragonfly.written_blocks < before + 160
            assert sum(assert_right(c, tokens_of(seed, TOKENS)).loaded_tokens for seed in range(100, 120)) > 0


def test_a_node_of_a_cluster_that_is_replaced_is_asked_again_without_help(tmp_path: Path) -> None:
    with cluster(tmp_path, replicas=1) as servers:
        url = f"redis://127.0.0.1:{servers[0].port}"
        with node(url, cluster=True) as one, node(url, cluster=True) as two:
            a, b = one.register("m", SHAPE), two.register("m", SHAPE)
            for seed in range(24):
                put(a, seed)
            one.flush()
            assert b.match(tokens_of(0, TOKENS)).tokens == TOKENS
            servers[2].kill()
            for seed in range(24):
                until_served(b, tokens_of(seed, TOKENS))
            assert_counted(two)


def test_a_full_server_refuses_and_requests_do_not_notice(tmp_path: Path) -> None:
    with redis(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as server, node(server.url) as one:
        a = one.register("m", SHAPE)
        for seed in range(30):
            put(a, seed)
        one.flush()
        stats = one.status().dragonfly
        assert stats.dropped_blocks > 0
        assert assert_right(a, tokens_of(29, TOKENS)).loaded_tokens == TOKENS
        assert stats.guard.state == "closed", "what is there can be had"


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


def test_an_acl_user_needs_few_commands_and_its_own_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    may = ["on", ">hush-hush", "~stratakv:*", "+ping", "+exists", "+get", "+set", "+unlink", "+scan"]
    with redis(tmp_path, "--user", "default", "off", "--user", "kv", *may) as server:
        with node(server.url, username="kv", password="wrong-word") as one:
            a = one.register("m", SHAPE)
            put(a, 1)
            one.flush()
            assert (a.match(tokens_of(2, TOKENS)).tokens, one.status().dragonfly.written_blocks) == (0, 0)
            assert one.status().dragonfly.guard.last_error == "AuthenticationError"
            assert_counted(one)
            with pytest.raises(stratakv.StoreError) as refused:
                node(server.url, username="kv", password="wrong-word", required=True)
            shown = caplog.text + repr(one.config) + repr(one.status()) + repr(refused.value)
            assert not any(secret in shown for secret in ("hush", "wrong-word"))
        given = {"username": "kv", "password": "hush-hush"}
        in_url = {"url": server.url.replace("//", "//kv:hush-hush@")}
        with node(**{"url": server.url} | given, required=True) as one, node(**in_url, required=True) as two:
            put(one.register("m", SHAPE), 1)
            one.flush()
            b = two.register("m", SHAPE)
            assert assert_right(b, tokens_of(1, TOKENS)).blocks == ("dragonfly",) * 8
            assert two.dragonfly.forget(b._model.fingerprint)
            assert "hush" not in caplog.text + repr(two.config) + repr(two.status()) + repr(two.dragonfly)


def test_tls_is_verified_by_the_certificate_and_the_name(tmp_path: Path) -> None:
    (right, key), (other, _) = certificate(tmp_path, "right"), certificate(tmp_path, "other")
    elsewhere, its_key = certificate(tmp_path, "elsewhere", "127.0.0.2")
    for made, its in ((right, key), (elsewhere, its_key)):
        port = free_port()
        options = ["--tls-port", str(port), "--tls-cert-file", str(made), "--tls-key-file", str(its)]
        url = f"rediss://127.0.0.1:{port}/0"
        with redis(tmp_path, *options, "--tls-auth-clients", "no"):
            # What is not the certificate's authority, the system's authorities, and what is, but for another address.
            for refused in (other, None, elsewhere) if made is right else (elsewhere,):
                with node(url, ca_file=refused) as one:
                    put(one.register("m", SHAPE), 1)
                    one.flush()
                    assert assert_right(one["m"], tokens_of(2, TOKENS)).loaded_tokens == 0
                    assert one.status().dragonfly.written_blocks == 0
                with pytest.raises(stratakv.StoreError, match="does not answer"):
                    node(url, ca_file=refused, required=True)
            if made is right:
                with node(url, ca_file=right, required=True) as one, node(url, ca_file=right, ram="32MiB") as two:
                    tokens = tokens_of(1, 4 * LARGE.block_tokens)
                    a = one.register("m", LARGE)
                    assert a.put(tokens, kv_of(tokens, LARGE), layout="LKHND") > 0
                    one.flush()
                    b = two.register("m", LARGE)
                    assert assert_right(b, tokens).blocks == ("dragonfly",) * one.status().dragonfly.written_blocks


def test_a_socket_of_the_same_machine_serves_too(tmp_path: Path) -> None:
    with redis(tmp_path, "--unixsocket", str(tmp_path / "s")):
        url = f"unix://{tmp_path / 's'}"
        with node(url, required=True) as one, node(url, required=True) as two:
            put(one.register("m", SHAPE), 1)
            one.flush()
            assert assert_right(two.register("m", SHAPE), tokens_of(1, TOKENS)).blocks == ("dragonfly",) * 8


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
        ({"url": "redis://host", "ca_file": "ca.crt"}, "dragonfly.ca_file is for rediss://"),
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


def on_disk(url: str, path: Path, **more: object) -> stratakv.CacheManager:
    shared = stratakv.DragonflyConfig(url=url, **{"deadline_s": 2.0} | more)
    return stratakv.open(replace(config(path, secret="drops"), dragonfly=shared))


def test_what_was_dropped_is_never_found_again_by_whoever_dropped_it(server: Any, tmp_path: Path) -> None:
    tokens, other = tokens_of(1, TOKENS), tokens_of(2, TOKENS)
    for life in range(3):
        with on_disk(server.url, tmp_path / "a") as one:
            a = one.register("m", SHAPE)
            found = a.match(tokens, adapter="lora").tokens
            assert found == (0 if life == 0 else TOKENS), "what was put last is here"
            put(a, 1, adapter="lora")
            put(a, 2)
            one.flush()
            for _ in range(2):
                a.drop(adapter="lora")
                assert a.match(tokens, adapter="lora").tokens == 0
            assert a.match(other).tokens == TOKENS
            put(a, 1, adapter="lora")
            one.flush()
    # Two that dropped it, each when it had other weights, share nothing of it: how often they did says nothing.
    for name in ("b", "c"):
        with on_disk(server.url, tmp_path / name) as two:
            b = two.register("m", SHAPE)
            b.drop(adapter="lora")
            assert b.match(tokens, adapter="lora").tokens == 0
            put(b, 1, adapter="lora")
            assert b.match(other).tokens == TOKENS
            two.flush()


def test_a_store_that_cannot_remember_a_drop_refuses_it(server: Any) -> None:
    with node(server.url, secret="forgetful") as one:
        a = one.register("m", SHAPE)
        put(a, 1)
        with pytest.raises(stratakv.StoreError, match="cannot remember a drop"):
            a.drop()
        assert a.match(tokens_of(1, TOKENS)).tokens == TOKENS


def test_a_drop_that_the_tier_does_not_hear_of_says_so_and_is_made_good(tmp_path: Path) -> None:
    with redis(tmp_path) as server:
        proxy = Proxy(server.url)
        try:
            one, two = on_disk(proxy.url, tmp_path / "a", deadline_s=0.2), on_disk(server.url, tmp_path / "b")
            with one, two:
                a, b = one.register("m", SHAPE), two.register("m", SHAPE)
                put(a, 1)
                one.flush()
                proxy.mode = "blackhole"
                with pytest.raises(stratakv.StoreError, match="unlinked as soon as it does"):
                    a.drop()
                assert a.match(tokens_of(1, TOKENS)).tokens == 0
                proxy.mode = "pass"
                for _ in range(100):
                    if b.match(tokens_of(1, TOKENS)).tokens == 0:
                        break
                    time.sleep(0.1)
                assert b.match(tokens_of(1, TOKENS)).tokens == 0
        finally:
            proxy.close()


def test_what_was_stored_while_the_tier_was_away_is_written_when_it_is_back(tmp_path: Path) -> None:
    with redis(tmp_path) as server:
        proxy = Proxy(server.url)
        try:
            with node(proxy.url, deadline_s=0.2) as one, node(server.url) as two:
                a, b = one.register("m", SHAPE), two.register("m", SHAPE)
                proxy.mode = "reset"
                put(a, 1)
                time.sleep(0.5)
                assert one.status().dragonfly.written_blocks == 0
                proxy.mode = "pass"
                for _ in range(100):
                    if one.status().dragonfly.written_blocks == 8:
                        break
                    time.sleep(0.1)
                assert assert_right(b, tokens_of(1, TOKENS)).loaded_tokens == TOKENS
                assert one.status().dragonfly.dropped_blocks == 0
        finally:
            proxy.close()


def test_a_load_that_takes_longer_than_computing_is_not_made_and_says_so(tmp_path: Path) -> None:
    with redis(tmp_path) as server:
        proxy = Proxy(server.url)
        try:
            with node(server.url) as one, node(proxy.url) as two:
                a, b = one.register("m", SHAPE), two.register("m", SHAPE)
                for seed in range(40):
                    put(a, seed)
                    one.flush()
                # What the tier takes is not known before the first load.
                b.set_prefill_rate(1e6)
                proxy.mode, proxy.latency_s, proxy.jitter_s = "latency", 0.05, 0.0
                assert assert_right(b, tokens_of(0, TOKENS)).loaded_tokens == TOKENS
                found = [assert_right(b, tokens_of(seed, TOKENS)) for seed in range(1, 33)]
                made = [explanation for explanation in found if explanation.loaded_tokens]
                assert len(made) == 2, "one of sixteen is"
                assert {e.reason for e in found if not e.loaded_tokens} == {"not_worth_it"}
                stats = two.status().dragonfly
                assert stats.not_worth_it_loads == 30
                assert_sums(b.stats())
                assert b.stats().missed["not_worth_it"] == b.stats().miss_blocks == 240
                assert stats.bytes_per_s is not None
                # An engine that is slow is helped all the same; and a tier that has recovered is used again.
                b.set_prefill_rate(10)
                assert assert_right(b, tokens_of(33, TOKENS)).loaded_tokens == TOKENS
                proxy.mode = "pass"
                b.set_prefill_rate(5e3)
                assert any(assert_right(b, tokens_of(seed, TOKENS)).loaded_tokens for seed in [*range(1, 40)] * 2)
        finally:
            proxy.close()


def test_a_prefill_rate_that_is_learned_counts_as_one_that_is_told(server: Any) -> None:
    with node(server.url, secret="learned") as one:
        a = one.register("m", SHAPE)
        a.set_prefill_rate("learned")
        assert a.prefill_tokens_per_s is None
        for seed in range(5):
            assert a.match(tokens_of(seed, TOKENS)).tokens == 0
            time.sleep(0.05)
            put(a, seed)
        rate = a.prefill_tokens_per_s
        assert rate is not None
        assert 0.3 * TOKENS / 0.05 < rate <= TOKENS / 0.05
        with pytest.raises(stratakv.InputError, match="'learned' or None"):
            a.set_prefill_rate("fast")


def test_a_block_on_ssd_is_read_from_the_tier_where_that_is_quicker_and_from_ssd_where_it_is_not(
    server: Any, tmp_path: Path
) -> None:
    def opened() -> stratakv.CacheManager:
        shared = stratakv.DragonflyConfig(url=server.url, deadline_s=2.0)
        return stratakv.open(replace(config(tmp_path, secret="quicker"), dragonfly=shared))

    with opened() as one:
        a = one.register("m", SHAPE)
        for seed in range(6):
            put(a, seed)
        one.flush()
    with opened() as two:
        a = two.register("m", SHAPE)
        # Both are known after a load from each.
        assert set(assert_right(a, tokens_of(0, TOKENS)).blocks) == {"ssd"}
        two.dragonfly.fetch(a._model.fingerprint + a._model.space("", ""), [bytes(16)], 1)
        for _ in range(20):
            two.dragonfly.cost.note(1 << 20, 10.0)
        assert set(assert_right(a, tokens_of(1, TOKENS)).blocks) == {"ssd"}
        for _ in range(200):
            two.dragonfly.cost.note(1 << 20, 1e-9)
        explanation = assert_right(a, tokens_of(2, TOKENS))
        assert (explanation.loaded_tokens, set(explanation.blocks)) == (TOKENS, {"dragonfly"})
        assert set(assert_right(a, tokens_of(2, TOKENS)).blocks) == {"ram"}
        stats = two.status().dragonfly
        assert (stats.asked_blocks, stats.hit_blocks) == (8, 8)
