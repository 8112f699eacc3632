"""The catalog in a real PostgreSQL: what it tells is what nodes have."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psycopg
import pytest

import stratakv
from catalogs import SHAPE, TOKENS, node, put, rows, wait
from servers import redis
from stores import assert_right, config, kv_of, tokens_of


def test_the_database_tells_which_node_holds_what_for_whom_and_since_when(database: str, tmp_path: Path) -> None:
    with node(database, tmp_path / "a") as one, node(database, tmp_path / "b", name="b") as two:
        a, b = one.register("m", SHAPE), two.register("m", SHAPE)
        tokens = put(a, 1, tenant="t", adapter="lora")
        put(a, 2)
        put(b, 1, 24, tenant="t", adapter="lora")
        for _ in range(3):
            a.match(tokens, tenant="t", adapter="lora").release()
        one.flush()
        two.flush()
        one.flush()
        found, short, other = sorted(one.catalog.find(model="m"), key=lambda prefix: (-prefix.uses, prefix.tokens))
        assert (short.tokens, short.places) == (24, {"a": {"ram": 24, "ssd": 24}, "b": {"ram": 24, "ssd": 24}})
        assert (found.adapter, found.tenant, found.tokens, found.uses) == ("lora", "t", TOKENS, 3)
        assert found.places == {"a": {"ram": TOKENS, "ssd": TOKENS}, "b": {"ram": 24, "ssd": 24}}
        assert found.heat == pytest.approx(4, rel=0.01)
        assert abs(time.time() - found.since.timestamp()) < 60
        assert (other.tenant, other.places) == ("", {"a": {"ram": TOKENS, "ssd": TOKENS}})
        where = two.catalog.where(tokens, model="m", adapter="lora", tenant="t")
        assert (where.asked_tokens, where.here, where.nodes) == (TOKENS, {"ram": 24}, {"a": (TOKENS, TOKENS)})
        nothing = two.catalog.where(tokens, model="m", tenant="u")
        assert (nothing.here, nothing.nodes, nothing.dragonfly) == ({}, {}, None)
        holdings = rows(database, "SELECT node, tier, blocks FROM stratakv.holdings ORDER BY 1, 2")
        assert holdings == [("a", "ram", 16), ("a", "ssd", 16), ("b", "ram", 3), ("b", "ssd", 3)]


def test_what_the_database_holds_is_what_the_local_index_holds_however_it_came_and_went(
    database: str, tmp_path: Path
) -> None:
    def there(name: str) -> set[tuple[object, ...]]:
        query = "SELECT b.name, b.tier FROM stratakv.blocks b JOIN stratakv.nodes n ON n.id = b.node WHERE n.name = %s"
        return set(rows(database, query, name))

    def here(caches: stratakv.CacheManager) -> set[tuple[object, ...]]:
        _, events, _ = caches._store.events(None)
        from uuid import UUID

        return {(UUID(bytes=name), {"ram": 0, "ssd": 1}[tier]) for _, name, _, tier, _ in events}

    with node(database, tmp_path / "a") as caches:
        a, b = caches.register("m", SHAPE), caches.register("n", SHAPE)
        for seed in range(120):
            put(a if seed % 3 else b, seed, tenant=str(seed % 5))
        a.drop(tenant="3")
        caches.unregister("n")
        wait(lambda: caches.flush() or there("a") == here(caches))
        assert len(there("a")) > 100
        before = here(caches)
    with node(database, tmp_path / "a", warm_start_bytes=0) as caches:
        caches.register("m", SHAPE)
        wait(lambda: caches.flush() or there("a") == here(caches))
        assert {name for name, _ in here(caches)} <= {name for name, _ in before}
        assert {tier for _, tier in there("a")} == {1}, "what was in RAM is not there any more"


def test_a_retired_version_is_dropped_by_every_node_at_once_and_stays_so_until_it_is_restored(
    database: str, tmp_path: Path
) -> None:
    with node(database, tmp_path / "a", poll_s=60.0) as one, node(database, name="b", poll_s=60.0) as two:
        models = [caches.register("m", SHAPE, weights_version="1") for caches in (one, two)]
        others = [caches.register("n", SHAPE, weights_version="1") for caches in (one, two)]
        for cache in (*models, *others):
            put(cache, 1)
        sequence = models[1].sequence(tokens_of(1, TOKENS))
        one.flush()
        two.flush()
        begun = time.monotonic()
        assert one.catalog.retire("m", "1") == 1
        wait(lambda: all(cache.retired for cache in models))
        assert time.monotonic() - begun < 5, "who listens hears of it at once"
        for cache in models:
            hit = cache.match(tokens_of(1, TOKENS))
            assert (hit.tokens, hit.explain().reason) == (0, "dropped")
            assert cache.put(tokens_of(2, TOKENS), kv_of(tokens_of(2, TOKENS), SHAPE), layout="LKHND") == 0
        assert models[1].match(sequence).tokens == 0
        assert all(cache.match(tokens_of(1, TOKENS)).tokens == TOKENS for cache in others)
        assert (one.catalog.retire("m", "1"), one.catalog.retire("m", "9")) == (0, 0)
        wait(lambda: one.flush() or not one.catalog.find(model="m"))
        assert len(one.catalog.find(model="n")) == 1
        # A node that was not there hears of it when it registers.
        with node(database, name="c") as three:
            late = three.register("m", SHAPE, weights_version="1")
            put_all = three.register("m2", SHAPE)
            put(put_all, 3)
            wait(lambda: late.retired)
        assert two.catalog.restore("m", "1") == 1
        wait(lambda: not any(cache.retired for cache in models))
        put(models[0], 1)
        assert assert_right(models[0], tokens_of(1, TOKENS)).loaded_tokens == TOKENS
        assert models[1].match(sequence).tokens == 0
        kinds = rows(database, "SELECT kind, count(*) FROM stratakv.events WHERE model = 1 AND node IS NULL GROUP BY 1")
        assert sorted(kinds) == [("restored", 1), ("retired", 1)]


def test_an_operator_may_retire_in_sql_and_a_notice_that_is_missed_is_found_by_looking(database: str) -> None:
    with node(database) as caches:
        a = caches.register("m", SHAPE, weights_version="1")
        put(a, 1)
        caches.flush()
        # Nobody hears of what is written without a notice.
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE stratakv.models SET retired_at = now()")
        wait(lambda: a.retired, 5.0)
        assert a.match(tokens_of(1, TOKENS)).tokens == 0


def test_a_retired_version_is_unlinked_in_the_tier_that_nodes_share(database: str, tmp_path: Path) -> None:
    import redis as library

    with redis(tmp_path) as shared, node(database, dragonfly=shared.url) as caches:
        a = caches.register("m", SHAPE, weights_version="1")
        put(a, 1)
        caches.flush()
        client = library.Redis.from_url(shared.url)
        assert client.dbsize() == 8
        caches.catalog.retire("m", "1")
        wait(lambda: client.dbsize() == 0)


def test_the_hottest_prefixes_come_up_to_ram_after_a_restart(database: str, tmp_path: Path) -> None:
    with node(database, tmp_path / "a") as caches:
        a = caches.register("m", SHAPE)
        for seed in range(20):
            put(a, seed)
        for seed in (3, 4, 5):
            for _ in range(5):
                a.match(tokens_of(seed, TOKENS)).release()
        caches.flush()
    budget = 3 * 8 * a._model.record_bytes
    with node(database, tmp_path / "a", warm_start_bytes=budget) as caches:
        a = caches.register("m", SHAPE)
        wait(lambda: caches.status().warm_start.bytes >= budget)
        for seed in range(20):
            with a.match(tokens_of(seed, TOKENS)) as hit:
                assert set(hit.explain().blocks) == ({"ram"} if seed in (3, 4, 5) else {"ssd"})
        assert assert_right(a, tokens_of(4, TOKENS)).loaded_tokens == TOKENS
        warm = caches.status().warm_start
        assert (warm.bytes, warm.hit_bytes) == (budget, budget)


def test_a_node_without_a_disk_is_warmed_up_from_the_tier_that_nodes_share(database: str, tmp_path: Path) -> None:
    with redis(tmp_path) as shared:
        with node(database, dragonfly=shared.url) as caches:
            a = caches.register("m", SHAPE)
            for seed in range(6):
                put(a, seed, tenant="t")
            caches.flush()
        with node(database, name="new", dragonfly=shared.url) as caches:
            a = caches.register("m", SHAPE)
            wait(lambda: caches.status().ram_held.get("m") and caches.status().warm_start.bytes >= 48 * 6144)
            for seed in range(6):
                explanation = assert_right(a, tokens_of(seed, TOKENS), tenant="t")
                assert (explanation.loaded_tokens, set(explanation.blocks)) == (TOKENS, {"ram"})


def test_usage_is_kept_by_hour_model_and_tenant(database: str) -> None:
    with node(database) as one, node(database, name="b") as two:
        for caches in (one, two):
            a, b = caches.register("m", SHAPE), caches.register("n", SHAPE)
            put(a, 1, tenant="t")
            put(b, 1)
            assert a.match(tokens_of(1, TOKENS), tenant="t").tokens == TOKENS
            assert a.match(tokens_of(2, TOKENS), tenant="t").tokens == 0
    with node(database, name="c") as three:
        usage = {(row.model, row.tenant): row for row in three.catalog.usage()}
        assert set(usage) == {("m", "t"), ("n", "")}
        row = usage["m", "t"]
        assert (row.asked_blocks, row.hit_blocks, row.put_blocks) == (32, 16, 16)
        assert row.put_bytes == 16 * SHAPE.block_bytes
        assert [row.model for row in three.catalog.usage(tenant="t")] == ["m"]
        assert three.catalog.usage(model="m", within_s=7200)
        assert three.catalog.usage(model="x") == []


def test_prefixes_are_found_by_each_filter_here_and_in_the_database_alike(database: str, tmp_path: Path) -> None:
    with node(database, tmp_path / "a") as caches:
        a, b = caches.register("m", SHAPE), caches.register("n", SHAPE)
        head = tokens_of(1, 16)
        prompts = [np.concatenate([head, tokens_of(seed, 48)]) for seed in range(2, 5)]
        for n, prompt in enumerate(prompts):
            a.put(prompt, kv_of(prompt, SHAPE), layout="LKHND", tenant="t" if n else "")
        put(b, 9, tenant="t")
        for _ in range(4):
            a.match(prompts[2], tenant="t").release()
        caches.flush()
        asked = {
            "all": {},
            "model": {"model": "m"},
            "tenant": {"tenant": "t"},
            "both": {"model": "m", "tenant": "t"},
            "adapter": {"adapter": "none"},
            "prefix": {"model": "m", "tokens": head, "tenant": "t"},
            "longer": {"model": "m", "tokens": prompts[1][:24], "tenant": "t"},
            "ram": {"tier": "ram"},
            "ssd": {"tier": "ssd", "model": "n"},
            "new": {"stored_within_s": 3600},
            "old": {"unused_for_s": 3600},
            "used": {"used_within_s": 3600},
            "hot": {"least_heat": 3.0},
            "one": {"limit": 1},
        }
        counts = {}
        for name, filters in asked.items():
            here = caches.catalog.find(fleet=False, **filters)
            there = caches.catalog.find(fleet=True, **filters)
            both = [sorted((p.name, p.tokens, repr(p.places), p.uses) for p in found) for found in (here, there)]
            assert both[0] == both[1] or name == "one", name
            counts[name] = len(here)
        assert counts == {
            **{"all": 4, "model": 3, "tenant": 3, "both": 2, "adapter": 0, "prefix": 2, "longer": 1},
            **{"ram": 4, "ssd": 1, "new": 4, "old": 0, "used": 4, "hot": 1, "one": 1},
        }
        assert caches.catalog.find()[0].uses == 4
        for fleet in (True, False):
            path = tmp_path / "export.jsonl"
            assert caches.catalog.export(path, model="m", fleet=fleet) == 3
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert {line["tokens"] for line in lines} == {TOKENS}
            assert len(list(caches.catalog.iterate(fleet=fleet))) == 4


def test_a_box_without_a_database_is_asked_of_its_local_index(tmp_path: Path) -> None:
    with stratakv.open(config(tmp_path)) as caches:
        a = caches.register("m", SHAPE)
        tokens = put(a, 1)
        caches.flush()
        (found,) = caches.catalog.find(model="m", tokens=tokens[:8])
        assert (found.tokens, list(found.places.values())) == (TOKENS, [{"ram": TOKENS, "ssd": TOKENS}])
        assert caches.catalog.where(tokens, model="m").here == {"ram": TOKENS}
        assert a.stats().matches == 0, "who asks the catalog is no request"
        for call in (
            lambda: caches.catalog.find(fleet=True),
            lambda: caches.catalog.usage(),
            lambda: caches.catalog.retire("m", ""),
        ):
            with pytest.raises(stratakv.StoreError, match="database"):
                call()


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"tier": "gpu"}, "expected one of ram, ssd"),
        ({"tokens": [1] * 8}, "model is not"),
        ({"model": "m", "tokens": [1]}, "at least the 8 of a block"),
        ({"used_within_s": -1}, "used_within_s is -1"),
        ({"text": "hello"}, "model is not"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(filters: dict[str, object], message: str) -> None:
    with stratakv.open(config(None)) as caches:
        caches.register("m", SHAPE)
        with pytest.raises(stratakv.InputError, match=message):
            caches.catalog.find(**filters)
        with pytest.raises(stratakv.ModelNotFoundError):
            caches.catalog.where([1] * 8, model="x")
        with pytest.raises(stratakv.InputError, match="no filter"):
            list(caches.catalog.iterate(color="red"))


def test_many_rows_are_looked_up_by_index_alone(database: str) -> None:
    with node(database, warm_start_bytes=0) as caches:
        caches.register("m", SHAPE)
        put(caches["m"], 1)
        caches.flush()
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO stratakv.blocks SELECT 1, md5(n::text)::uuid, 1 + n % 3, n % 2"
                " FROM generate_series(1, 200000) n"
            )
            connection.execute(
                "INSERT INTO stratakv.prefixes SELECT 1, md5(n::text)::uuid, md5('s')::uuid, '', (n % 100)::text, 64,"
                " decode(md5(n::text) || md5(n || 'b'), 'hex'), now() - n * interval '1 s', now() - n * interval '1 s',"
                " 1, 20000 - n"
                " FROM generate_series(1, 100000) n"
            )
            connection.execute(
                "INSERT INTO stratakv.events (at, kind, node, model, tenant)"
                " SELECT now(), 'usage', 1, 1 + n % 50, (n % 100)::text FROM generate_series(1, 100000) n"
            )
            connection.execute("VACUUM ANALYZE")
            asked: list[str] = []

            class Watched:
                """A connection that explains each query instead."""

                def execute(self, query: str, values: object = None) -> Watched:
                    for (line,) in connection.execute(f"EXPLAIN {query}", values).fetchall():
                        asked.append(line)
                    return self

                def fetchall(self) -> list[object]:
                    return []

                def fetchone(self) -> tuple[object, ...]:
                    return (0, False)

            tier = caches._postgres
            real = tier.ask

            def explained(work: Callable[[object], object], **more: float) -> object:
                mine = threading.current_thread() is threading.main_thread()
                return work(Watched()) if mine else real(work, **more)

            tier.ask = explained
            names = [os.urandom(16) for _ in range(128)]
            for filters in (
                {},
                {"model": "m", "limit": 10},
                {"tenant": "7"},
                {"model": "m", "tokens": tokens_of(1, 64)},
                {"used_within_s": 60},
                {"stored_within_s": 60},
                {"unused_for_s": 99_990},
                {"model": "m", "tier": "ram"},
            ):
                asked.clear()
                caches.catalog.find(fleet=True, **filters)
                assert asked, filters
                assert not [line for line in asked if "Seq Scan on blocks" in line or "Seq Scan on prefixes" in line], (
                    filters,
                    asked,
                )
            for call in (
                lambda: tier.hottest(1, 10),
                lambda: tier.usage("tenant = 'x' AND hour > now() - interval '1 hour'", {}),
            ):
                asked.clear()
                call()
                assert asked
                assert not [line for line in asked if "Seq Scan on prefixes" in line or "Seq Scan on blocks" in line], (
                    asked
                )
            tier.ask = real
            # What functions of the schema do is not told: what they run is.
            inner = (
                (
                    "SELECT b.node FROM unnest(%s::uuid[]) WITH ORDINALITY AS asked (name, nth)"
                    " JOIN stratakv.blocks b ON b.name = asked.name AND b.model = 1"
                ),
                (
                    "SELECT FROM stratakv.blocks b"
                    " WHERE b.name = ANY(%s::uuid[]) AND b.node = 1 AND b.tier = 0 AND b.model = 1"
                ),
            )
            for query in inner:
                plan = [line for (line,) in connection.execute(f"EXPLAIN {query}", ([name.hex() for name in names],))]
                assert not [line for line in plan if "Seq Scan on blocks" in line], plan


def test_what_is_too_old_goes(database: str) -> None:
    with node(database) as caches:
        put(caches.register("m", SHAPE), 1)
        caches.flush()
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("UPDATE stratakv.prefixes SET used = now() - interval '31 days'")
            connection.execute("INSERT INTO stratakv.nodes (name, seen_at) VALUES ('gone', now() - interval '40 days')")
            connection.execute(
                "INSERT INTO stratakv.blocks SELECT 1, md5('x')::uuid, (SELECT max(id) FROM stratakv.nodes), 0"
            )
            connection.execute(
                "CREATE TABLE stratakv.events_20200101 PARTITION OF stratakv.events"
                " FOR VALUES FROM ('2020-01-01') TO ('2020-01-02')"
            )
            assert caches._postgres.beat(upkeep=True)
            assert connection.execute("SELECT count(*) FROM stratakv.prefixes").fetchone() == (0,)
            assert connection.execute("SELECT name FROM stratakv.nodes").fetchall() == [("a",)]
            assert connection.execute("SELECT count(DISTINCT node) FROM stratakv.blocks").fetchone() == (1,)
            days = connection.execute(
                "SELECT count(*) FROM pg_inherits WHERE inhparent = 'stratakv.events'::regclass"
            ).fetchone()
            assert days == (3,), "today and two days to come"


def test_two_processes_of_one_name_are_told_apart(database: str) -> None:
    with node(database, name="x") as one, node(database, name="x") as two:
        assert (one.status().postgres.node, two.status().postgres.node) == ("x", "x#2")
    with node(database, name="x") as three:
        assert three.status().postgres.node == "x"


def test_a_newer_or_another_schema_is_not_touched(database: str) -> None:
    with node(database):
        pass
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("INSERT INTO stratakv.migrations (number, checksum) VALUES (99, 'x')")
        before = connection.execute("SELECT count(*) FROM stratakv.nodes").fetchone()
        with node(database, name="b") as caches:
            put(caches.register("m", SHAPE), 1)
            caches.flush()
            status = caches.status().postgres
            assert status.refused is not None
            assert "version 99, this stratakv knows up to 1: upgrade it" in status.refused
            assert caches.catalog.find()[0].tokens == TOKENS, "the local index answers"
        with pytest.raises(stratakv.StoreError, match="upgrade"):
            node(database, required=True)
        connection.execute("DELETE FROM stratakv.migrations WHERE number = 99")
        connection.execute("UPDATE stratakv.migrations SET checksum = 'x'")
        with pytest.raises(stratakv.StoreError, match=r"another 0001_catalog\.sql"):
            node(database, required=True)
        assert connection.execute("SELECT count(*) FROM stratakv.nodes").fetchone() == before


def test_many_processes_may_make_the_schema_at_once(database: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda n: node(database, name=f"n{n}", required=True), range(6)))
    try:
        assert {caches.status().postgres.node for caches in opened} == {f"n{n}" for n in range(6)}
    finally:
        for caches in opened:
            caches.close()
