"""How the log is written: levels and JSON as stores set them up, taken back when they close; no secret in any of it."""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import stratakv
from servers import free_port
from stores import config, geometry, kv_of, tokens_of
from stratakv import log
from stratakv.levels import components
from stratakv.observe import logs
from stratakv.sections import ObserveConfig

ROOT, BELOW = (logging.getLogger(name) for name in logs.ROOTS)


def state() -> list[tuple[int, bool, list[logging.Handler]]]:
    names = [
        *logs.ROOTS,
        "stratakv.tiers",
        "stratakv.tiers.dragonfly",
        "vllm.stratakv.tiers",
        "stratakv.guard",
        "",
        "vllm",
    ]
    return [(each.level, each.propagate, list(each.handlers)) for each in map(logging.getLogger, names)]


@pytest.fixture(autouse=True)
def _everything_is_taken_back() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_without_settings_nothing_is_set_up() -> None:
    before = state()
    with stratakv.open(config(None)):
        assert state() == before


def test_a_line_of_json_has_what_machines_look_for(capsys: pytest.CaptureFixture[str]) -> None:
    set_up = logs.configure(ObserveConfig(log_format="json", log_levels="info"))
    lines = log.of("stratakv.tiers.dragonfly")
    with log.bound(request_id="r", trace_id="t"):
        lines.info("server_slow", "%s is slow:\n%d ms", "it", 7, server="dragonfly", ms=7)
    try:
        {}["absent"]
    except KeyError:
        lines.exception("server_gone", "it is gone")
    set_up.close()
    first, second = told(capsys)
    at = datetime.datetime.fromisoformat(str(first.pop("timestamp")))
    assert abs(datetime.datetime.now(datetime.UTC) - at) < datetime.timedelta(minutes=1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(second["timestamp"]))
    assert first == {
        "level": "info",
        "event": "server_slow",
        "message": "it is slow:\n7 ms",
        "component": "tiers.dragonfly",
        "request_id": "r",
        "trace_id": "t",
        "fields": {"server": "dragonfly", "ms": 7},
    }
    assert list(second) == ["timestamp", "level", "event", "message", "component", "exception"]
    assert str(second["exception"]).endswith("KeyError: 'absent'")


def test_a_span_that_is_under_way_gives_the_trace_and_what_is_bound_goes_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    set_up, lines = logs.configure(ObserveConfig(log_format="json")), log.of("stratakv.guard")
    context = trace.SpanContext(trace_id=0xABC, span_id=1, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        lines.warning("said_so", "within")
        with log.bound(trace_id="mine"):
            lines.warning("said_so", "bound")
    lines.warning("said_so", "outside")
    set_up.close()
    assert [line.get("trace_id") for line in told(capsys)] == [f"{0xABC:032x}", "mine", None]


def test_what_others_write_to_these_loggers_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    set_up = logs.configure(ObserveConfig(log_format="json"))
    ROOT.warning("at %s", "redis://:hunter2@host", extra={"fields": "no table"})
    logging.getLogger("vllm.stratakv.x").error("below")
    logging.getLogger("vllm.other").error("not ours")
    set_up.close()
    first, second = (line for line in told(capsys) if line)
    assert (first["event"], first["message"], first["component"]) == (None, "at redis://***@host", "")
    assert (second["message"], second["component"]) == ("below", "x")


def test_each_line_is_written_once_whatever_stands_above(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    engine, handler = logging.getLogger("vllm"), logging.StreamHandler(sys.stderr)
    engine.addHandler(handler)
    lines = log.of("stratakv.integrations.vllm.tier", below="vllm")
    lines.warning("chunk_lost", "before")
    first, second = (logs.configure(ObserveConfig(log_format="json")) for _ in range(2))
    lines.warning("chunk_lost", "within")
    first.close()
    lines.warning("chunk_lost", "within")
    second.close()
    second.close()
    lines.warning("chunk_lost", "after")
    engine.removeHandler(handler)
    said = capsys.readouterr().err.splitlines()
    assert [line if line[0] != "{" else json.loads(line)["message"] for line in said] == [
        "before",
        "within",
        "within",
        "after",
    ]
    assert caplog.messages == ["before", "after"]


def test_levels_are_of_components_and_go_with_their_store(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text('[ssd]\nenabled = false\n[observe.log_levels]\n"" = "error"\n"tiers.dragonfly" = "debug"\n')
    with stratakv.open(file):
        assert not log.of("stratakv.guard")._logger.isEnabledFor(logging.WARNING)
        assert not log.of("stratakv.x", below="vllm")._logger.isEnabledFor(logging.WARNING)
        assert log.of("stratakv.tiers.dragonfly")._logger.isEnabledFor(logging.DEBUG)
        assert not log.of("stratakv.tiers.qdrant")._logger.isEnabledFor(logging.WARNING)


def test_the_environment_gives_levels_as_text() -> None:
    environ = {
        "STRATAKV_OBSERVE_LOG_LEVELS": "info, tiers.dragonfly=debug,guard = error",
        "STRATAKV_OBSERVE_LOG_FORMAT": "json",
    }
    read = stratakv.Config.load(None, environ).observe
    assert read == ObserveConfig(
        log_format="json", log_levels={"": "info", "tiers.dragonfly": "debug", "guard": "error"}
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"log_format": "xml"}, "observe.log_format is 'xml', expected one of plain, json"),
        ({"log_levels": {"guard": "loud"}}, "level 'loud' for 'guard', expected one of debug, info, warning, error"),
        ({"log_levels": "tiers.dragonfli=info"}, "component 'tiers.dragonfli'.*did you mean 'tiers.dragonfly'"),
        ({"log_levels": {"stratakv.guard": "info"}}, "component 'stratakv.guard', expected '' for all, or a module"),
        ({"log_levels": {"tiers": {"dragonfly": "info"}}}, "put a component with a dot between quotes"),
        ({"log_levels": {7: "info"}}, "component 7"),
        ({"log_levels": ["info"]}, "expected a table of levels by component"),
    ],
)
def test_a_format_component_or_level_that_is_none_is_refused_with_those_that_are(
    wrong: dict[str, object], said: str
) -> None:
    with pytest.raises(stratakv.ConfigError, match=said):
        ObserveConfig(**wrong)  # type: ignore[arg-type]


def test_components_are_the_modules_and_folders_of_the_package() -> None:
    assert {"", "tiers", "tiers.dragonfly", "manager", "integrations.vllm.tier"} <= set(components())


def test_a_level_is_changed_while_the_store_runs_and_goes_with_it() -> None:
    logger = logging.getLogger("stratakv.tiers")
    with stratakv.open(config(None)) as caches:
        caches.set_log_level("tiers", "debug")
        assert logger.level == logging.DEBUG
        caches.set_log_level("tiers", "error")
        assert logger.level == logging.ERROR
        caches.set_log_level("tiers", None)
        assert logger.level == logging.NOTSET
        caches.set_log_level("tiers", "debug")
        with pytest.raises(stratakv.ConfigError, match="level 'loud' for 'tiers'"):
            caches.set_log_level("tiers", "loud")  # type: ignore[arg-type]
        with pytest.raises(stratakv.ConfigError, match="component 'tires'"):
            caches.set_log_level("tires", "debug")
    assert logger.level == logging.NOTSET
    with pytest.raises(stratakv.ClosedError):
        caches.set_log_level("tiers", "debug")


def test_of_several_stores_what_was_set_last_holds_until_its_store_is_closed() -> None:
    guard = logging.getLogger("stratakv.guard")
    first = logs.configure(ObserveConfig(log_levels={"guard": "info", "tiers": "debug"}))
    second = logs.configure(ObserveConfig(log_levels={"guard": "error"}))
    assert guard.level == logging.ERROR
    first.set_level("guard", "debug")
    assert guard.level == logging.DEBUG
    first.set_level("guard", None)
    assert guard.level == logging.ERROR
    second.close()
    assert guard.level == logging.NOTSET
    assert logging.getLogger("stratakv.tiers").level == logging.DEBUG
    first.close()


def test_what_the_application_set_meanwhile_stays() -> None:
    guard = logging.getLogger("stratakv.guard")
    set_up = logs.configure(ObserveConfig(log_levels={"guard": "info"}))
    guard.setLevel(logging.CRITICAL)
    set_up.close()
    assert guard.level == logging.CRITICAL
    guard.setLevel(logging.NOTSET)


def test_a_store_that_cannot_be_opened_leaves_nothing_set_up(tmp_path: Path) -> None:
    before = state()
    settings = replace(
        config(tmp_path, secret="x"),
        dragonfly=stratakv.DragonflyConfig(url=f"redis://127.0.0.1:{free_port()}", required=True),
        observe=ObserveConfig(log_format="json", log_levels="debug"),
    )
    with pytest.raises(stratakv.StoreError, match="does not answer"):
        stratakv.open(settings)
    assert state() == before


def test_without_the_library_json_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "structlog", None)
    settings = replace(config(tmp_path), observe=ObserveConfig(log_format="json"))
    with pytest.raises(stratakv.ConfigError, match=r"pip install 'stratakv\[observe\]'"):
        stratakv.open(settings)
    monkeypatch.undo()
    stratakv.open(settings).close()


def test_no_secret_is_in_a_line_a_repr_or_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("redis")
    pytest.importorskip("psycopg")
    pytest.importorskip("qdrant_client")
    port, shape, words = free_port(), geometry(), ("hunter2", "swordfish", "opensesame", "letmein", "xyzzy")
    secret, in_url, given, database, key = words
    servers = {
        "dragonfly": stratakv.DragonflyConfig(url=f"redis://me:{in_url}@127.0.0.1:{port}/0", password=given),
        "postgres": stratakv.PostgresConfig(url=f"postgresql://me:{database}@127.0.0.1:{port}/x", interval_s=0.02),
        "qdrant": stratakv.QdrantConfig(url=f"http://127.0.0.1:{port}", api_key=key),
    }
    seen = []
    for form in ("plain", "json"):
        log.REPEATS.forget()
        settings = replace(
            config(tmp_path / form, secret=secret),
            **servers,
            observe=ObserveConfig(log_format=form, log_levels="debug"),
        )
        with stratakv.open(settings) as caches:
            cache = caches.register("model", shape)
            for seed in range(8):
                tokens = tokens_of(seed, 64)
                cache.match(tokens).release()
                cache.put(tokens, kv_of(tokens, shape), layout="LKHND")
            caches.flush()
            seen += [repr(settings), repr(caches.status()), str(caches.status()), repr(caches), repr(cache)]
        for name, tier in servers.items():
            with pytest.raises(stratakv.StoreError) as refused:
                stratakv.open(replace(settings, **{name: replace(tier, required=True)}))
            seen += [*traceback.format_exception(refused.value), repr(refused.value)]
    written = capsys.readouterr().err
    events = {json.loads(line)["event"] for line in written.splitlines() if line.startswith('{"timestamp"')}
    assert {"dragonfly_absent", "postgres_absent", "qdrant_absent", "breaker_opened", "qdrant_unencrypted"} <= events
    assert "dragonfly does not answer" in caplog.text
    seen += [written, caplog.text, *(repr(vars(record)) for record in caplog.records)]
    assert [(word, text) for word in words for text in seen if word in text] == []
