"""Lines of the log: what a record carries, what repeats is counted, and what the package can say at all."""

from __future__ import annotations

import ast
import contextvars
import logging
import os
import re
import threading
from collections.abc import Iterator

import pytest

import logged
from stratakv import log, scrub


class Kept(logging.Handler):
    """Keeps records, and their text as people see it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.records.append(record)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, logger = Kept(), logging.getLogger("stratakv.testing")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock, kept: Kept) -> log.Log:
    return log.of("stratakv.testing", repeats=log.Repeats(clock))


def test_a_line_is_a_sentence_with_an_event_and_fields(lines: log.Log, kept: Kept) -> None:
    lines.warning("disk_full", "no room in %s: %d bytes", "here", 7, model="m", free_bytes=7)
    (record,) = kept.records
    assert kept.lines == ["no room in here: 7 bytes"]
    assert (record.event, record.fields) == ("disk_full", {"model": "m", "free_bytes": 7})
    assert (record.name, record.levelname, record.args) == ("stratakv.testing", "WARNING", ("here", 7))


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_a_line_is_of_its_level_and_of_where_it_is_written(lines: log.Log, kept: Kept, level: str) -> None:
    getattr(lines, level)("said", "it is said")
    (record,) = kept.records
    assert record.levelname == level.upper()
    assert record.pathname == __file__
    assert record.funcName == "test_a_line_is_of_its_level_and_of_where_it_is_written"


def test_an_exception_is_an_error_with_its_traceback(lines: log.Log, kept: Kept) -> None:
    try:
        {}["absent"]
    except KeyError:
        lines.exception("broke", "it broke")
    assert kept.records[0].levelname == "ERROR"
    assert kept.lines[0].startswith("it broke\nTraceback")
    assert "KeyError: 'absent'" in kept.lines[0]


def test_a_level_that_is_off_builds_nothing_and_counts_nothing(lines: log.Log, kept: Kept) -> None:
    class Untouched:
        def __str__(self) -> str:
            raise AssertionError("it is looked at")

    logging.getLogger("stratakv.testing").setLevel(logging.WARNING)
    for _ in range(20):
        lines.debug("off", "%s", Untouched(), field=Untouched())
        lines.info("off", "%s", Untouched())
    assert not kept.records
    assert len(lines._repeats) == 0


def test_what_cannot_be_shown_costs_no_request(lines: log.Log, kept: Kept) -> None:
    class Broken:
        def __str__(self) -> str:
            raise ValueError("no text")

    lines.warning("odd", "it is odd", what=Broken(), inf=float("inf"), names=[b"\x01"], deep={"a": {"b": (1, None)}})
    fields = kept.records[0].fields
    assert fields == {"what": "<Broken>", "inf": "inf", "names": ["01"], "deep": {"a": {"b": [1, None]}}}


def test_bound_fields_are_on_every_line_within_and_on_none_after(lines: log.Log, kept: Kept) -> None:
    with log.bound(request_id="r1", trace_id=None):
        lines.info("one", "one")
        with log.bound(trace_id="t", step=2):
            lines.info("two", "two", step=3)
        lines.info("three", "three")
    lines.info("four", "four")
    assert [record.fields for record in kept.records] == [
        {"request_id": "r1"},
        {"request_id": "r1", "trace_id": "t", "step": 3},
        {"request_id": "r1"},
        {},
    ]


def test_bound_fields_are_of_one_thread_and_of_one_task(lines: log.Log, kept: Kept) -> None:
    with log.bound(request_id="mine"):
        other = threading.Thread(target=lambda: lines.info("said", "elsewhere"))
        other.start()
        other.join()
        contextvars.Context().run(lines.info, "said", "in another task")
        contextvars.copy_context().run(lines.info, "said", "in a task of ours")
    assert [record.fields for record in kept.records] == [{}, {}, {"request_id": "mine"}]


def test_a_line_is_written_five_times_a_minute_and_then_counted(lines: log.Log, kept: Kept, clock: Clock) -> None:
    for _ in range(22):
        lines.warning("again", "it is slow: %s", "disk")
        clock.now += 0.5
    assert kept.lines == ["it is slow: disk"] * 5
    clock.now += 49.0
    lines.warning("again", "it is slow: %s", "disk", model="m")
    assert kept.lines[-1] == "it is slow: disk; 17 more like this in the last minute"
    assert kept.records[-1].fields == {"model": "m", "repeated": 17}
    clock.now += 60.0
    lines.warning("again", "it is slow: %s", "disk")
    assert kept.lines[-1] == "it is slow: disk"


def test_no_minute_has_more_than_five_of_a_line(lines: log.Log, kept: Kept, clock: Clock) -> None:
    at = []
    for _ in range(2000):
        before = len(kept.records)
        lines.error("again", "it fails")
        at += [clock.now] * (len(kept.records) - before)
        clock.now += 0.37
    assert len(at) > 50
    assert all(later - earlier >= 60 for earlier, later in zip(at, at[5:], strict=False))
    told = sum(record.fields.get("repeated", 0) for record in kept.records)
    assert told <= 2000 - len(at) < told + 170, "all but those of the last minute are told"


def test_what_was_left_out_long_ago_is_told_as_such(lines: log.Log, kept: Kept, clock: Clock) -> None:
    for _ in range(7):
        lines.info("full", "it is 100% full")
    clock.now += 600.0
    lines.info("full", "it is 100% full")
    assert kept.lines[-1] == "it is 100% full; 2 more like this in the last 10 minutes"


def test_errors_with_a_traceback_are_counted_likewise(lines: log.Log, kept: Kept, clock: Clock) -> None:
    for _ in range(9):
        try:
            {}["absent"]
        except KeyError:
            lines.exception("broke", "it broke")
        clock.now += 11.9
    assert [record.fields.get("repeated") for record in kept.records] == [None] * 5 + [1, None, None]


def test_keys_and_events_are_counted_each_for_itself(lines: log.Log, kept: Kept) -> None:
    for _ in range(8):
        for model in ("a", "b"):
            lines.warning("slow", "%s is slow", model, key=model)
        lines.warning("other", "another")
    assert sorted(kept.lines) == ["a is slow"] * 5 + ["another"] * 5 + ["b is slow"] * 5
    assert kept.records[0].fields == {}, "a key is no field"


def test_ten_thousand_keys_take_the_room_of_a_thousand_and_are_no_flood(
    lines: log.Log, kept: Kept, clock: Clock
) -> None:
    for n in range(10_000):
        lines.warning("slow", "%s is slow", n, key=str(n))
        assert len(lines._repeats) <= log.MOST_KEYS
    assert len(kept.records) == log.MOST_KEYS + log.MOST_LINES
    clock.now += 61.0
    lines.warning("slow", "%s is slow", "new", key="new")
    assert len(lines._repeats) <= log.MOST_KEYS
    assert kept.lines[-1] == "new is slow"


def test_threads_write_no_more_than_one(lines: log.Log, kept: Kept) -> None:
    threads = [
        threading.Thread(target=lambda: [lines.warning("slow", "it is slow") for _ in range(200)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept.records) == 5


def test_a_forked_process_can_write_though_another_thread_was_writing() -> None:
    with log.REPEATS._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if log.REPEATS.admit("stratakv.testing", "forked") else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("redis://:hunter2@host:6379/0", "redis://***@host:6379/0"),
        ("at postgresql://me:hun@ter2@host/db: refused", "at postgresql://***@host/db: refused"),
        ("password=hunter2 host=x", "password=*** host=x"),
        ("postgresql://host/db?password=hunter2&sslmode=off", "postgresql://host/db?password=***&sslmode=off"),
        ("{'api_key': 'hunter2', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ("Authorization: Bearer hunter2", "Authorization: ***"),
        ('"store.secret" = "hunter2"', '"store.secret" = ***'),
        ("block_tokens=16, 5 tokens: good", "block_tokens=16, 5 tokens: good"),
        ("password authentication failed: user@host", "password authentication failed: user@host"),
        ("http://host:6333/a?b=1", "http://host:6333/a?b=1"),
    ],
)
def test_a_secret_in_text_is_blanked_out_and_nothing_else_is(said: str, shown: str) -> None:
    assert scrub.text(said) == shown


def test_a_field_that_is_named_like_a_secret_is_blanked_out(lines: log.Log, kept: Kept) -> None:
    secrets = {"password": "hunter2", "api_key": b"hunter2", "token": 7, "storeSecret": ["hunter2"]}
    lines.warning("said", "it is said", nested={"key": "hunter2", "n": [{"token": "hunter2"}]}, **secrets)
    lines.warning("said", "it is said", tokens=5, key_bytes=9, keys=3, url="redis://:hunter2@host", password=None)
    first, second = (record.fields for record in kept.records)
    assert first == {"nested": {"key": "***", "n": [{"token": "***"}]}, **dict.fromkeys(secrets, "***")}
    assert second == {"tokens": 5, "key_bytes": 9, "keys": 3, "url": "redis://***@host", "password": None}


def test_no_secret_of_an_error_is_in_a_sentence_or_a_traceback(lines: log.Log, kept: Kept) -> None:
    error = ConnectionError("cannot reach redis://:hunter2@host:6379")
    try:
        raise error
    except ConnectionError:
        lines.exception("broke", "it broke: %s", error, error=error)
    record = kept.records[0]
    assert "redis://***@host:6379" in kept.lines[0]
    assert "hunter2" not in kept.lines[0] + repr(vars(record))
    assert "ConnectionError" in kept.lines[0]


def test_a_log_can_stand_below_the_logger_of_an_engine() -> None:
    assert log.of("stratakv.x", below="engine")._logger.name == "engine.stratakv.x"


# What the package says.


def test_every_call_has_an_event_and_a_sentence() -> None:
    for call in logged.calls():
        assert call.method in logged.LEVELS, call.where
        assert isinstance(call.event, str), call.where
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", call.event), call.where
        assert isinstance(call.sentence, str), call.where
        assert "|" not in call.sentence, f"{call.where}: it stands in a table"
        assert not set(call.fields) & {"repeated", "event", "message", "level"}, call.where
        assert not any(map(scrub.is_secret, call.fields)), f"{call.where}: it would be blanked out"


def test_an_event_has_one_sentence_and_a_sentence_one_event() -> None:
    said = {(call.event, call.sentence, logged.LEVELS[call.method]) for call in logged.calls()}
    for part in (0, 1):
        names = [each[part] for each in said]
        assert len(names) == len(set(names)), sorted({str(name) for name in names if names.count(name) > 1})


def test_every_sentence_takes_the_arguments_that_it_is_given() -> None:
    for call in logged.calls():
        wanted = re.findall(r"%[^%a-z]*[a-z]", str(call.sentence).replace("%%", ""))
        assert call.arguments in (len(wanted), None), call.where


def test_the_document_has_every_event() -> None:
    page = logged.PAGE.read_text()
    assert logged.parts(page)[1] == logged.table(), "python tests/logged.py writes the table anew"


def test_nothing_else_in_the_package_writes_a_log() -> None:
    # Makes loggers; sets them up; keeps libraries quiet; keeps one from setting them up.
    allowed = {"log.py", "observe/logs.py", "observe/otlp.py", "embedding.py"}
    using = set()
    for path in logged.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                if {"logging", "warnings", "vllm.logger"} & names:
                    using.add(str(path.relative_to(logged.PACKAGE)))
    assert using == allowed
