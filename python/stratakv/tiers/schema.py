"""The catalog's schema: the numbered files of ``sql/``, applied forward, with the checksum of each kept."""

from __future__ import annotations

import hashlib
from typing import Any

from stratakv.errors import StoreError


class SchemaError(StoreError):
    """The database's catalog is not one that this version can use."""


def migrate(connection: Any) -> None:  # noqa: ANN401 - of the library
    """Applies the numbered files of ``sql/`` that are missing, each in a transaction, while no other process does.

    Raises:
        SchemaError: the database has files that this version does not, or others of the same number.
    """
    with connection.transaction():
        # One at a time, also of those who find nothing there yet.
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('stratakv.migrations'))")
        if connection.execute("SELECT to_regclass('stratakv.migrations')").fetchone() == (None,):
            connection.execute("CREATE SCHEMA IF NOT EXISTS stratakv")
            connection.execute(
                "CREATE TABLE stratakv.migrations"
                " (number integer PRIMARY KEY, checksum bytea NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
        for number, text, checksum in missing(connection):
            connection.execute(text)
            connection.execute("INSERT INTO stratakv.migrations (number, checksum) VALUES (%s, %s)", (number, checksum))


def missing(connection: Any) -> list[tuple[int, str, bytes]]:  # noqa: ANN401 - of the library
    """Files that were not applied yet: number, content and checksum.

    Raises:
        SchemaError: as `migrate`.
    """
    from importlib import resources

    known = dict(connection.execute("SELECT number, checksum FROM stratakv.migrations").fetchall())
    files = sorted(entry.name for entry in resources.files("stratakv.sql").iterdir() if entry.name.endswith(".sql"))
    newest = max(known, default=0)
    if newest > len(files):
        raise SchemaError(
            f"the catalog's schema is of version {newest}, this stratakv knows up to {len(files)}: upgrade it,"
            " or use another database"
        )
    unknown = []
    for number, name in enumerate(files, start=1):
        text = resources.files("stratakv.sql").joinpath(name).read_text(encoding="utf-8")
        checksum = hashlib.sha256(text.encode()).digest()
        if number not in known:
            unknown.append((number, text, checksum))
        elif bytes(known[number]) != checksum:
            raise SchemaError(
                f"the catalog was made by another {name} than this stratakv has: use the version that made it, or"
                " another database"
            )
    return unknown
