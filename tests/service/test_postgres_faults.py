"""No fault of PostgreSQL reaches a request, and what happened meanwhile is told later."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psycopg
import pytest

import stratakv
from catalogs import SHAPE, TOKENS, node, put, rows, wait
from servers import Proxy, postgres
from stores import assert_right, geometry, tokens_of


@pytest.mark.parametrize("mode", ["blackhole", "reset", "refuse", "truncate", "latency"])
def test_a_network_that_fails_costs_no_request_and_what_happened_meanwhile_is_told_later(
    database: str, mode: str
) -> None:
    proxy = Proxy(database)
    try:
        with node(proxy.url, deadline_s=0.5) as caches:
            a = caches.register("m", SHAPE)
            put(a, 1)
            wait(lambda: caches.flush() or caches.catalog.find(fleet=True))
            # Late is as good as never.
            proxy.most_bytes, proxy.latency_s, proxy.jitter_s = 500, 0.6, 0.2
            proxy.mode = mode
            if mode == "refuse":
                proxy.cut()
            begun = time.monotonic()
            for seed in range(2, 12):
                put(a, seed)
                assert assert_right(a, tokens_of(seed, TOKENS)).loaded_tokens == TOKENS
            assert time.monotonic() - begun < 2, "no request waits for the database"
            wait(lambda: caches.status().postgres.guard.state != "closed", 30.0)
            assert len(caches.catalog.find(fleet=None)) == 11, "the local index answers"
            with pytest.raises(stratakv.StoreError, match="does not answer"):
                caches.catalog.find(fleet=True)
            proxy.mode = "pass"
            counted = "SELECT count(*) FROM stratakv.blocks"
            wait(lambda: rows(database, counted) == [(88,)], 60.0)
            wait(lambda: caches.status().postgres.guard.state == "closed")
            assert rows(database, "SELECT count(*) FROM stratakv.blocks") == [(88,)], "nothing twice"
    finally:
        proxy.close()


def test_a_server_that_stops_dies_and_comes_back_is_told_all(tmp_path: Path) -> None:
    with postgres(tmp_path) as server, node(server.url(), deadline_s=0.5) as caches:
        a = caches.register("m", SHAPE)
        put(a, 1)
        caches.flush()
        for pid in server.all_pids():
            os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        put(a, 2)
        assert assert_right(a, tokens_of(2, TOKENS)).loaded_tokens == TOKENS
        assert time.monotonic() - begun < 1
        time.sleep(1)
        for pid in server.all_pids():
            os.kill(pid, signal.SIGCONT)
        wait(lambda: rows(server.url(), "SELECT count(*) FROM stratakv.blocks") == [(16,)], 30.0)
        server.kill()
        put(a, 3)
        assert assert_right(a, tokens_of(3, TOKENS)).loaded_tokens == TOKENS
        time.sleep(1)
        server.start()

        def told() -> bool:
            try:
                return rows(server.url(), "SELECT count(*) FROM stratakv.blocks") == [(24,)]
            except psycopg.OperationalError:
                return False

        wait(told, 60.0)
        assert caches.catalog.retire("m", "") == 1
        wait(lambda: a.retired, 30.0)


def test_a_database_that_is_not_there_degrades_the_store_or_fails_if_it_is_required(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    from servers import free_port

    absent = f"postgresql://someone:hunter2@127.0.0.1:{free_port()}/x"
    with node(absent) as caches:
        a = caches.register("m", SHAPE)
        put(a, 1)
        assert assert_right(a, tokens_of(1, TOKENS)).loaded_tokens == TOKENS
        assert caches.catalog.find()[0].tokens == TOKENS
        assert caches.status().postgres.node is None
        assert "hunter2" not in repr(caches.config) + repr(caches.status()) + caplog.text
    with pytest.raises(stratakv.StoreError, match="or do not require it") as error:
        node(absent, required=True)
    assert "hunter2" not in str(error.value)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN")
    # Who may not make a schema there.
    with node(database.replace("postgres@", "reader@")) as caches:
        put(caches.register("m", SHAPE), 1)
        assert caches.status().postgres.guard.errors > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "mysql://x"}, "expected postgresql://"),
        ({"url": 7}, "url is no text"),
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"keep_days": 0}, "keep_days is 0"),
        ({"required": "yes"}, "required is 'yes'"),
        ({"warm_start_bytes": "much"}, "warm_start_bytes is 'much'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(stratakv.ConfigError, match=message):
        stratakv.PostgresConfig(**settings)


def test_nodes_that_share_a_catalog_share_a_secret() -> None:
    with pytest.raises(stratakv.ConfigError, match="secret"):
        stratakv.Config(postgres=stratakv.PostgresConfig(url="postgresql://x/y"))


def test_what_a_node_has_is_told_again_when_its_connection_broke_or_the_database_was_emptied(database: str) -> None:
    with node(database, poll_s=0.2) as caches:
        a = caches.register("m", SHAPE)
        put(a, 1)
        counted = (
            "SELECT count(*) FROM stratakv.blocks b JOIN stratakv.nodes n ON n.id = b.node WHERE n.closed_at IS NULL"
        )
        wait(lambda: caches.flush() or rows(database, counted) == [(8,)])
        with (
            psycopg.connect(database, autocommit=True) as connection,
            psycopg.connect(database, autocommit=True) as other,
        ):
            # While it is away, another is called as it was.
            call = "SELECT pg_advisory_lock(hashtext('stratakv.nodes'), hashtext('a'))"
            waiting = threading.Thread(target=other.execute, args=(call,))
            waiting.start()
            time.sleep(0.5)
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND pid <> %s",
                (other.info.backend_pid,),
            )
            waiting.join()
            wait(lambda: caches.flush() or caches.status().postgres.node == "a#2", 20.0)
            named = counted.replace("n.closed_at IS NULL", "n.name = 'a#2'")
            wait(lambda: caches.flush() or rows(database, named) == [(8,)], 20.0)
            connection.execute("DROP SCHEMA stratakv CASCADE")
        put(a, 2)

        def told() -> bool:
            caches.flush()
            try:
                return rows(database, counted) == [(16,)]
            except psycopg.Error:
                return False

        wait(told, 30.0)
        assert caches.catalog.retire("m", "") == 1
        wait(lambda: a.retired)


def test_names_that_the_database_does_not_take_stop_nothing(database: str) -> None:
    with node(database) as caches:
        a = caches.register("m", SHAPE)
        for n, tenant in enumerate(("a\0b", "x" * 10_000, "ok")):
            put(a, n, tenant=tenant, adapter="é" * 3000 if n == 1 else "")
        wait(lambda: caches.flush() or len(caches.catalog.find(fleet=True)) == 3)
        assert {p.tenant for p in caches.catalog.find(fleet=True)} == {None, "ok"}
        assert caches.status().postgres.guard.errors == 0
        for filters in (
            {"limit": 2**70},
            {"used_within_s": float("inf")},
            {"tenant": "a\0"},
            {"stored_within_s": 1e300},
        ):
            with pytest.raises(stratakv.InputError):
                caches.catalog.find(**filters)
        with pytest.raises(stratakv.InputError, match="NUL"):
            caches.register("m\0", SHAPE)


def test_a_retirement_is_remembered_where_the_database_is_away(database: str, tmp_path: Path) -> None:
    from servers import free_port

    with node(database, tmp_path / "a") as caches:
        a = caches.register("m", SHAPE, weights_version="1")
        put(a, 1)
        caches.flush()
        caches.catalog.retire("m", "1")
        wait(lambda: a.retired)
        # Another shape of that version is, too.
        other = caches.register("m2", SHAPE, weights_version="1")
        caches.unregister("m")
        late = caches.register("m", geometry(block_tokens=16, head_dim=32), weights_version="1")
        wait(lambda: late.retired)
        assert not other.retired
    with node(f"postgresql://x@127.0.0.1:{free_port()}/x", tmp_path / "a", deadline_s=0.2) as caches:
        a = caches.register("m", SHAPE, weights_version="1")
        assert a.match(tokens_of(1, TOKENS)).tokens == 0


def test_a_retirement_waits_for_no_reader(database: str) -> None:
    with node(database) as caches:
        put(caches.register("m", SHAPE), 1)
        caches.flush()
        with psycopg.connect(database) as reader:
            reader.execute("SELECT count(*) FROM stratakv.blocks")
            begun = time.monotonic()
            assert caches.catalog.retire("m", "") == 1
            assert time.monotonic() - begun < 3


def test_a_server_that_is_silent_from_the_start_hangs_nothing(database: str) -> None:
    proxy = Proxy(database)
    proxy.mode = "blackhole"
    try:
        begun = time.monotonic()
        with node(proxy.url, deadline_s=0.5) as caches:
            put(caches.register("m", SHAPE), 1)
            assert caches.catalog.find()[0].tokens == TOKENS
            proxy.mode = "pass"
            wait(lambda: caches.catalog._holders("m", caches["m"].names(tokens_of(1, TOKENS), "", "")), 30.0)
            proxy.mode = "blackhole"
            time.sleep(0.3)
        assert time.monotonic() - begun < 40
    finally:
        proxy.close()
    import threading

    for _ in range(100):
        if not [thread for thread in threading.enumerate() if thread.name.startswith("stratakv-postgres")]:
            break
        time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stratakv-postgres")]


def test_who_asks_for_the_status_is_no_node(database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stratakv import cli

    with node(database, name="x") as caches:
        put(caches.register("m", SHAPE), 1)
        caches.flush()
    before = rows(database, "SELECT name, closed_at IS NULL FROM stratakv.nodes")
    file = tmp_path / "stratakv.toml"
    file.write_text(f"[ssd]\nenabled = false\n[store]\nsecret = 'x'\n[postgres]\nurl = '{database}'\nnode = 'x'\n")
    assert cli.main(["status", "--config", str(file)]) == 0
    assert "postgres   ok" in capsys.readouterr().out
    assert rows(database, "SELECT name, closed_at IS NULL FROM stratakv.nodes") == before == [("x", False)]


@pytest.mark.parametrize(
    ("url", "verified"),
    [
        ("postgresql://localhost/x", False),
        ("postgresql:///x", False),
        ("postgresql:///x?host=/var/run", False),
        ("postgresql://db.example/x", True),
        ("postgresql://localhost/x?host=db.example", True),
        ("postgresql:///x?hostaddr=10.0.0.1", True),
        ("postgresql://db.example/x?sslmode=disable", False),
        ("postgresql:///?service=there", True),
    ],
)
def test_tls_is_verified_wherever_another_host_may_be_asked(
    url: str, verified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stratakv.tiers import postgres as tier

    asked: dict[str, object] = {}

    def connect(_: str, **options: object) -> None:
        asked.update(options)
        raise psycopg.OperationalError

    monkeypatch.setattr(psycopg, "connect", connect)
    tier.Postgres.check(stratakv.PostgresConfig(url=url))
    assert (asked.get("sslmode") == "verify-full") == verified


def test_a_database_whose_disk_is_full_is_told_all_when_it_has_room(tmp_path: Path) -> None:
    with postgres(tmp_path, size="160m") as server, node(server.url(), deadline_s=1.0, ram="16MiB") as caches:
        a = caches.register("m", SHAPE)
        put(a, 1)
        wait(lambda: caches.flush() or caches.catalog.find(fleet=True))
        filler = server.folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        # What the server had in reserve goes, too.
        with contextlib.suppress(psycopg.Error), psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE TABLE junk (x text)")
            while True:
                connection.execute("INSERT INTO junk SELECT repeat(md5(n::text), 30) FROM generate_series(1, 5000) n")
        for seed in range(2, 100):
            begun = time.monotonic()
            put(a, seed)
            assert assert_right(a, tokens_of(seed, TOKENS)).loaded_tokens == TOKENS
            assert time.monotonic() - begun < 1, "no request waits for the database"
        wait(lambda: caches.status().postgres.guard.errors)
        filler.unlink()
        counted = "SELECT count(*) FROM stratakv.blocks"

        def told() -> bool:
            try:
                return rows(server.url(), counted) == [(99 * 8,)]
            except psycopg.OperationalError:
                return False

        wait(told, 60.0)


def test_a_wrong_password_degrades_the_store_and_is_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with postgres(tmp_path) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE ROLE locked LOGIN SUPERUSER PASSWORD 'right'")
            rules = server.data / "pg_hba.conf"
            rules.write_text("host all locked 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
            connection.execute("SELECT pg_reload_conf()")
            time.sleep(0.2)
        url = server.url().replace("postgres@", "locked@")
        with node(url, password="hunter2") as caches:
            put(caches.register("m", SHAPE), 1)
            assert caches.status().degraded == ("no_catalog",)
            assert "hunter2" not in repr(caches.config) + repr(caches.status()) + caplog.text
        with node(url, password="right") as caches:
            put(caches.register("m", SHAPE), 1)
            wait(lambda: caches.flush() or caches.catalog.find(fleet=True))
            assert caches.status().degraded == ()
