"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import stratakv
from stores import config, geometry
from stratakv import log


@pytest.fixture(autouse=True)
def _what_one_test_logs_is_no_repeat_in_the_next() -> None:
    log.REPEATS.forget()


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[stratakv.CacheManager]:
    with stratakv.open(config(tmp_path / "store")) as manager:
        yield manager


@pytest.fixture
def cache(caches: stratakv.CacheManager) -> stratakv.ModelCache:
    return caches.register("model", geometry())
