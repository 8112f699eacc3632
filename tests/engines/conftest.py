"""What tests in transformers share: a small model, and a store for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import stratakv


@pytest.fixture(scope="module")
def model() -> Any:
    from llamas import llama

    return llama()


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[stratakv.CacheManager]:
    from llamas import settings

    with stratakv.open(settings(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def cache(caches: stratakv.CacheManager, model: Any) -> stratakv.ModelCache:
    from stratakv.integrations.transformers import geometry

    return caches.register("llama", geometry(model))
