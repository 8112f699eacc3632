"""What a store runs without is told, costs no request and comes back without help; `stratakv status` tells it too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import stratakv
from qdrant_server import qdrant
from servers import free_port, postgres, redis
from stores import assert_right, config, geometry, kv_of, tokens_of
from stratakv import cli
from stratakv.status import degraded

SHAPE = geometry(block_tokens=8, head_dim=32)
TOKENS = 64


def serve(cache: stratakv.ModelCache, seeds: range) -> None:
    begun = time.monotonic()
    for seed in seeds:
        tokens = tokens_of(seed, TOKENS)
        cache.match(tokens).release()
        assert cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND") == TOKENS
        assert assert_right(cache, tokens).loaded_tokens == TOKENS
    # The breakers open after three calls that last a deadline.
    assert time.monotonic() - begun < 4


def wait(condition: Callable[[], object], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)


def test_each_mode_is_told_costs_no_request_and_ends_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("redis", "postgres", "qdrant"):
        (tmp_path / name).mkdir()
    with redis(tmp_path / "redis") as hot, postgres(tmp_path / "postgres") as sql, qdrant(tmp_path / "qdrant") as near:
        settings = replace(
            config(None, secret="x"),
            dragonfly=stratakv.DragonflyConfig(url=hot.url, deadline_s=0.3),
            postgres=stratakv.PostgresConfig(url=sql.url(), deadline_s=0.5, interval_s=0.02),
            qdrant=stratakv.QdrantConfig(url=near.url, deadline_s=0.5),
        )
        file = tmp_path / "stratakv.toml"
        file.write_text(
            f"""
[ssd]
enabled = false
[store]
secret = "x"
[dragonfly]
url = "{hot.url}"
[postgres]
url = "{sql.url()}"
[qdrant]
url = "{near.url}"
"""
        )

        def told() -> tuple[int, list[str]]:
            done = cli.main(["status", "--config", str(file), "--json"])
            return done, json.loads(capsys.readouterr().out)["degraded"]

        with stratakv.open(settings) as caches:
            a = caches.register("m", SHAPE)
            serve(a, range(3))
            caches.flush()
            assert caches.status().degraded == ()
            assert told() == (0, [])
            cases = (
                (hot, ("no_hot_cache", "ram_only"), range(10, 16)),
                (sql, ("no_catalog",), range(20, 26)),
                (near, ("no_vector_index",), range(30, 36)),
            )
            for server, modes, seeds in cases:
                server.kill()
                serve(a, seeds)
                wait(lambda modes=modes: caches.status().degraded == modes)
                serve(a, seeds)
                assert told() == (1, list(modes))
                server.start()
                wait(lambda: not _degraded_after_a_request(caches, a))
                assert told() == (0, [])
            for server in (hot, sql, near):
                server.kill()
            serve(a, range(40, 46))
            wait(lambda: len(caches.status().degraded) == 4)
            serve(a, range(50, 53))


def _degraded_after_a_request(caches: stratakv.CacheManager, cache: stratakv.ModelCache) -> tuple[str, ...]:
    # Whoever asks a tier sees that it is back.
    cache.match(tokens_of(int(time.monotonic() * 10) % 20_000 + 1000, TOKENS)).release()
    return caches.status().degraded


def test_what_is_not_configured_is_not_missed_and_a_disk_that_takes_no_writes_leaves_ram_alone(tmp_path: Path) -> None:
    for path in (tmp_path, None):
        with stratakv.open(config(path)) as caches:
            assert caches.status().degraded == ()
    assert degraded(None, None, None, ssd_serves=False) == ("ram_only",)
    assert degraded(None, None, None, ssd_serves=True) == ()


def test_status_says_what_is_wrong_with_each_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text(
        f"""
[ssd]
path = "{tmp_path / "store"}"
[store]
secret = "x"
[dragonfly]
url = "redis://:hunter2@127.0.0.1:{free_port()}"
required = true
"""
    )
    assert cli.main(["status", "--config", str(file)]) == 1
    out = capsys.readouterr().out
    assert "dragonfly  fails: why ConnectionError" in out
    assert "degraded   no_hot_cache" in out
    assert "postgres   off" in out
    assert "hunter2" not in out
    file.write_text("[dragonfly]\nurl = 'http://x'\n")
    assert cli.main(["status", "--config", str(file)]) == 2
    assert "expected redis://" in capsys.readouterr().err


def test_a_store_that_cannot_be_opened_says_why_whatever_was_opened_before() -> None:
    settings = replace(
        config(None, secret="x"),
        qdrant=stratakv.QdrantConfig(path=":memory:"),
        postgres=stratakv.PostgresConfig(url=f"postgresql://127.0.0.1:{free_port()}/x", required=True),
    )
    with pytest.raises(stratakv.StoreError, match=r"postgres\.url cannot be used: it does not answer"):
        stratakv.open(settings)
