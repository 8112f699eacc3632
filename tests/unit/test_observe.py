"""Metrics and what a store says over HTTP."""

from __future__ import annotations

import dataclasses
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import stratakv
from stores import config, geometry, kv_of, loaded, tokens_of
from stratakv import cli
from stratakv.observe.exposition import text
from stratakv.observe.metrics import METRICS, MOST_MODELS, OTHER, Collector, table
from stratakv.observe.prometheus import PrometheusCollector


def listening(path: Path | None, **more: Any) -> stratakv.Config:
    observe = stratakv.ObserveConfig(**{"listen": "127.0.0.1:0"} | more)
    return dataclasses.replace(config(path), observe=observe)


def ask(
    address: str | None,
    path: str,
    token: str | None = None,
    method: str = "GET",
    body: bytes | None = None,
    **headers: str,
) -> tuple[int, str]:
    assert address is not None
    link = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        link.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
        answer = link.getresponse()
        return answer.status, answer.read().decode()
    finally:
        link.close()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(found: dict[Any, float], name: str, **labels: str) -> float:
    return sum(value for (each, at), value in found.items() if each == name and labels.items() <= dict(at).items())


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[stratakv.CacheManager]:
    with stratakv.open(listening(tmp_path)) as opened:
        yield opened


def serve(caches: stratakv.CacheManager, *models: str, prompts: int = 4) -> None:
    """Some hits, some misses, of some tenants."""
    for model in models:
        cache = caches.register(model, geometry())
        for seed in range(prompts):
            tokens = tokens_of(seed, 64)
            loaded(cache, tokens, tenant=f"tenant{seed % 2}")
            cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND", tenant=f"tenant{seed % 2}")
            loaded(cache, tokens, tenant=f"tenant{seed % 2}")


def test_what_adds_up_in_the_store_adds_up_in_every_scrape(caches: stratakv.CacheManager) -> None:
    serve(caches, "one", "two")
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            serve(caches, "one", prompts=2)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(20):
            found = samples(ask(caches.address, "/metrics")[1])
            for model in ("one", "two"):
                asked = total(found, "stratakv_asked_blocks_total", model=model)
                assert asked > 0
                hit, miss = (total(found, f"stratakv_{n}_blocks_total", model=model) for n in ("hit", "miss"))
                assert asked == hit + miss
                for tier in ("ram", "ssd"):
                    asked, hit, miss = (
                        total(found, f"stratakv_tier_{n}_blocks_total", model=model, tier=tier)
                        for n in ("asked", "hit", "miss")
                    )
                    assert asked == hit + miss
            tenants = total(found, "stratakv_tenant_asked_blocks_total")
            assert tenants == total(found, "stratakv_asked_blocks_total")
    finally:
        over.set()
        thread.join()


def test_every_metric_has_samples_in_a_store_that_has_everything(caches: stratakv.CacheManager) -> None:
    serve(caches, "one")
    caches["one"].set_prefill_rate(1000)
    loaded(caches["one"], tokens_of(0, 64), tenant="tenant0")
    found = samples(ask(caches.address, "/metrics")[1])
    names = {name for name, _ in found}
    servers = re.compile(r"breaker|calls|remote|catalog_rows")
    ceiling = {"stratakv_hit_ceiling_ratio"}
    for metric in METRICS:
        name = metric.name + ("_bucket" if metric.kind == "histogram" else "")
        assert name in names or servers.search(name) or name in ceiling, name
    assert total(found, "stratakv_prefill_saved_seconds_total") == pytest.approx(0.064)
    assert total(found, "stratakv_miss_blocks_total", reason="never_stored") == 64
    assert total(found, "stratakv_loaded_tokens_total") == 5 * 64
    assert total(found, "stratakv_path_bytes_total", path="put") == 4 * 64 * geometry().token_bytes


def test_names_are_those_of_prometheus_and_of_the_docs() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"stratakv_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".") or metric.help.endswith("1.")
    docs = Path(__file__).parents[2] / "docs" / "metrics.md"
    begin, end = "<!-- metrics -->\n", "<!-- end -->"
    found = docs.read_text().partition(begin)[2].partition(end)[0]
    assert found == table(), (
        "write what `python -m stratakv.observe.metrics` prints between the marks in docs/metrics.md"
    )


def test_labels_are_bounded(tmp_path: Path) -> None:
    """10,000 tenants, each with a match; more models than have names."""
    with stratakv.open(listening(None)) as caches:
        cache = caches.register("model", geometry())
        for n in range(10_000):
            cache.match(tokens_of(n, 4), tenant=f"tenant{n}").release()
        found = samples(ask(caches.address, "/metrics")[1])
        tenants = {dict(at)["tenant"] for name, at in found if "tenant" in dict(at)}
        assert len(tenants) == 101
        assert OTHER in tenants
        assert total(found, "stratakv_tenant_asked_blocks_total") == 10_000
        named = {t for t in tenants if t != OTHER}
        for n in range(MOST_MODELS + 20):
            caches.register(f"model{n}", geometry(layers=1)).match(tokens_of(n, 4)).release()
        found = samples(ask(caches.address, "/metrics")[1])
        models = {dict(at)["model"] for name, at in found if "model" in dict(at)}
        assert len(models) == MOST_MODELS + 1
        assert total(found, "stratakv_asked_blocks_total") == 10_000 + MOST_MODELS + 20
        # Who has a name keeps it.
        assert named == {dict(at)["tenant"] for name, at in found if "tenant" in dict(at)} - {OTHER}
        # Of those that share a name ratios would be no sums.
        assert not [at for name, at in found if name == "stratakv_hit_ceiling_ratio" and dict(at)["model"] == OTHER]
        caches.unregister("model1")
        caches.register("late", geometry(layers=1))
        later = samples(ask(caches.address, "/metrics")[1])
        assert "model1" not in {dict(at).get("model") for _, at in later}


HOSTILE = 'a"} 1\nevil{x="<script>alert(1)</script>\\'


def test_a_hostile_name_is_a_label_and_text(caches: stratakv.CacheManager) -> None:
    serve(caches, HOSTILE)
    found = samples(ask(caches.address, "/metrics")[1])
    assert total(found, "stratakv_asked_blocks_total", model=HOSTILE) > 0
    assert not [name for name, _ in found if name.startswith("evil")]
    assert json.loads(ask(caches.address, "/status")[1])["models"][0]["name"] == HOSTILE
    page = ask(caches.address, "/")[1]
    # Nothing of the page is made of what a request said.
    assert HOSTILE not in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


def test_an_application_has_them_in_its_own_registry(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    caches = stratakv.open(config(tmp_path))
    registry.register(PrometheusCollector(Collector(caches.view)))
    serve(caches, "one")
    found = samples(generate_latest(registry).decode())
    assert total(found, "stratakv_matches_total", model="one") == 8
    # The same as our own text, but for what has changed since.
    own = samples(text(Collector(caches.view).families()))
    assert own.keys() == {key for key in found if not key[0].endswith("_created")}
    assert own == found
    caches.close()
    assert generate_latest(registry) == b""


def test_health(tmp_path: Path) -> None:
    caches = stratakv.open(listening(tmp_path))
    address = caches.address
    assert ask(address, "/livez") == ask(address, "/readyz") == (200, "ok\n")
    assert json.loads(ask(address, "/healthz")[1]) == {"status": "ok", "degraded": []}
    assert ask(address, "/nothing")[0] == 404
    assert ask(address, "/metrics", method="POST")[0] == 405
    assert ask(address, "/metrics", method="HEAD") == (200, "")
    status = json.loads(ask(address, "/status")[1])
    assert [tier["name"] for tier in status["tiers"]] == ["gpu", "ram", "ssd", "dragonfly", "postgres", "qdrant"]
    caches.close()
    with pytest.raises(ConnectionRefusedError):
        ask(address, "/livez")


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with stratakv.open(listening(tmp_path, token="open sesame")) as caches:
        for path in ("/metrics", "/status", "/healthz", "/events", "/nothing"):
            for wrong in (None, "open", "open sesame2", "ö"):
                assert ask(caches.address, path, wrong and wrong.encode().decode("latin-1"))[0] == 401
            assert ask(caches.address, path, "open sesame")[0] == (404 if path == "/nothing" else 200)
        for path in ("/livez", "/readyz", "/"):
            assert ask(caches.address, path)[0] == 200
        assert "sesame" not in repr(caches.config)


def test_who_calls_it_by_another_name_is_not_answered(caches: stratakv.CacheManager) -> None:
    """A page elsewhere, whose name was made to point here, reads nothing."""
    link = http.client.HTTPConnection(urlsplit(str(caches.address)).netloc)
    link.request("GET", "/status", headers={"Host": "evil.example:80"})
    assert link.getresponse().status == 403
    link.close()


def test_a_port_in_use_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(stratakv.ConfigError, match=rf"observe.listen is '{listen}'.*in use"):
            stratakv.open(listening(tmp_path, listen=listen))
        # Nothing is left locked.
        stratakv.open(config(tmp_path)).close()
    for wrong in ("9470", "localhost:http", "127.0.0.1:99999", 9470):
        with pytest.raises(stratakv.ConfigError, match=r"observe\.listen"):
            stratakv.open(listening(tmp_path, listen=wrong))


def test_noise_on_the_port_ends_nothing(caches: stratakv.CacheManager) -> None:
    host, port = urlsplit(str(caches.address)).hostname, urlsplit(str(caches.address)).port
    noises = (
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 70_000,
        b"POST /explain HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    )
    for noise in noises:
        with socket.create_connection((host, port)) as link:
            link.sendall(noise)
    assert ask(caches.address, "/livez")[0] == 200


def process(path: Path, share: Path, listen: str, model: str, ready: Any) -> None:
    observe = stratakv.ObserveConfig(listen=listen, share=share, name=model)
    with stratakv.open(dataclasses.replace(config(path / model), observe=observe)) as caches:
        serve(caches, model)
        ready.set()
        signal.pause()


def test_processes_share_an_address_and_it_outlives_who_had_it(tmp_path: Path) -> None:
    share = tmp_path / "s"
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    address = f"http://{listen}"
    started = []
    try:
        for model in ("first", "second"):
            ready = context.Event()
            each = context.Process(target=process, args=(tmp_path, share, listen, model, ready))
            each.start()
            started.append(each)
            assert ready.wait(60)
        found = samples(ask(address, "/metrics")[1])
        for model in ("first", "second"):
            assert total(found, "stratakv_matches_total", process=model, model=model) == 8
        assert set(json.loads(ask(address, "/status")[1])["processes"]) == {"first", "second"}
        # Whoever had the address is killed: another takes it, and forgets the dead.
        started[0].kill()
        started[0].join()
        until = time.monotonic() + 30
        while True:
            try:
                found = samples(ask(address, "/metrics")[1])
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.1)
        assert {dict(at)["process"] for _, at in found} == {"second"}
        assert len(list(share.glob("*.sock"))) == 1
    finally:
        for each in started:
            each.kill()
            each.join()


def test_events_over_http(caches: stratakv.CacheManager) -> None:
    first = json.loads(ask(caches.address, "/events")[1])
    assert (first["all"], first["events"]) == (True, [])
    serve(caches, "one", prompts=1)
    more = json.loads(ask(caches.address, f"/events?since={first['next']}")[1])
    assert not more["all"]
    assert {(each["tier"], each["stored"]) for each in more["events"]} >= {("ram", True)}
    assert ask(caches.address, "/events?since=x")[0] == 400


# Explain.


def test_explain_tells_block_by_block_and_counts_as_no_use(tmp_path: Path) -> None:
    tokens, other = tokens_of(1, 66), tokens_of(2, 32)
    with stratakv.open(listening(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        for prompt in (tokens[:32], other):
            cache.put(prompt, kv_of(prompt, cache.geometry), layout="LKHND")
        caches.flush()
    with stratakv.open(listening(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        cache.set_prefill_rate(1e6)
        before = caches.stats()
        found = caches.explain("model", tokens)
        assert caches.stats() == before
        assert [(s.first, s.blocks, s.places, s.reason, s.decision) for s in found.stretches] == [
            (0, 8, ("ssd",), None, "load"),
            (8, 8, (), "never_stored", "miss"),
        ]
        assert found.loaded_tokens == 32
        assert found.stretches[0].compute_s == pytest.approx(32e-6)
        # Measured by a load: then it is told what it costs, and whether that is worth it.
        loaded(cache, tokens)
        found = caches.explain("model", tokens)
        assert found.stretches[0].load_s is not None
        assert "blocks 0-7: ssd" in str(found)
        assert "last 2 tokens: no whole block" in str(found)
        # As a load decides.
        for rate, decision in ((1e12, "compute"), (1, "load")):
            cache.set_prefill_rate(rate)
            found = caches.explain("model", other)
            assert [(s.places, s.decision) for s in found.stretches] == [(("ssd",), decision)]
            assert found.stretches[0].load_s is not None
            assert found.loaded_tokens == loaded(cache, other)[1].loaded_tokens == (32 if decision == "load" else 0)
        body = json.dumps({"model": "model", "tokens": tokens.tolist()}).encode()
        status, said = ask(caches.address, "/explain", method="POST", body=body)
        assert status == 200
        assert json.loads(said)["stretches"][1]["reason"] == "never_stored"
        for wrong in (b"", b"[]", b"{}", b'{"model": "x", "tokens": [1]}', b'{"model": "model", "tokens": "a"}'):
            assert ask(caches.address, "/explain", method="POST", body=wrong)[0] == 400
        with pytest.raises(stratakv.ModelNotFoundError):
            caches.explain("x", tokens)


# The terminal.


def test_commands_ask_a_store_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stratakv.open(listening(tmp_path / "store", token="secret")) as caches:
        serve(caches, "a model")
        url = ["--url", str(caches.address)]
        assert cli.main(["stats", *url]) == 2
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("STRATAKV_OBSERVE_TOKEN", "secret")
        assert cli.main(["stats", *url]) == 0
        assert "a model" in capsys.readouterr().out
        assert cli.main(["stats", "--json", *url]) == 0
        assert json.loads(capsys.readouterr().out)["total"]["matches"] == 8
        assert cli.main(["top", "--once", *url]) == 0
        assert "hit ratio" in capsys.readouterr().out
        assert cli.main(["events", "--json", *url]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {row["model"] for row in rows} == {"a model"}
        file = tmp_path / "tokens"
        file.write_text(str(tokens_of(0, 64).tolist()))
        asked = ["explain", "--tokens", str(file), "--tenant", "tenant0", *url]
        assert cli.main(asked) == 0
        assert "64 of 64 tokens would be loaded" in capsys.readouterr().out
        assert cli.main([*asked[:-4], "--tenant", "other", *url]) == 1
        file.write_text("1 2 three")
        capsys.readouterr()
        assert cli.main(asked) == 2
        assert "three" in capsys.readouterr().err
        address = str(caches.address)
    assert cli.main(["stats", "--url", address]) == 2
    assert "does not answer" in capsys.readouterr().err
    monkeypatch.delenv("STRATAKV_OBSERVE_TOKEN")
    assert cli.main(["stats"]) == 2
    assert "--url" in capsys.readouterr().err


def test_a_shell_completes_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    assert "explain" in capsys.readouterr().out
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for words, completed in ((["ex"], "explain"), (["events", "--f"], "--follow")):
        asked = (
            f"COMP_WORDS=(stratakv {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_stratakv; echo ${{COMPREPLY[@]}}"
        )
        ran = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == completed


def test_a_scrape_of_closed_stores_and_forks_is_no_harm(tmp_path: Path) -> None:
    caches = stratakv.open(listening(tmp_path))
    serve(caches, "one", prompts=1)
    child = os.fork()
    if not child:
        # Of a store of before a fork nothing can be had, and closing it is no harm.
        try:
            caches.view()
        except stratakv.ClosedError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert ask(caches.address, "/readyz")[0] == 200
    caches.close()


def test_nothing_of_it_is_imported_unless_it_is_asked_for() -> None:
    names = ("prometheus_client", "opentelemetry", "http.server", "curses")
    code = f"import sys, stratakv, stratakv.cli; print([m for m in {names} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
