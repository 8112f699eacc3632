"""Databases for the tests of the catalog."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from servers import Postgres, postgres


@pytest.fixture(scope="module")
def sql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres(tmp_path_factory.mktemp("postgres")) as running:
        yield running


@pytest.fixture
def database(sql_server: Postgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """One of its own for each test."""
    name = f"test_{abs(hash(request.node.name)) % 10**12}"
    with psycopg.connect(sql_server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield sql_server.url(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
