"""What tests of the catalog share: stores that have one, and what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psycopg

import stratakv
from stores import config, geometry, kv_of, tokens_of

SHAPE = geometry(block_tokens=8, head_dim=32)
TOKENS = 64


def node(url: str, path: Path | None = None, *, name: str = "a", **more: object) -> stratakv.CacheManager:
    dragonfly = stratakv.DragonflyConfig(url=more.pop("dragonfly", None), deadline_s=2.0)
    options = {"interval_s": 0.02, "poll_s": 0.5, "node": name, "deadline_s": 10.0} | more
    store = config(path, secret="shared", ram=str(options.pop("ram", "4MiB")))
    return stratakv.open(replace(store, postgres=stratakv.PostgresConfig(url=url, **options), dragonfly=dragonfly))


def put(cache: stratakv.ModelCache, seed: int, count: int = TOKENS, **more: object) -> np.ndarray:
    tokens = tokens_of(seed, count)
    assert cache.put(tokens, kv_of(tokens, SHAPE), layout="LKHND", **more) == count
    return tokens


def wait(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


def rows(url: str, query: str, *values: object) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query, values).fetchall()
