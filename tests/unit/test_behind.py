"""Writing behind: nothing is lost while it may be tried again, nothing is tried for ever, and no failure ends it."""

from __future__ import annotations

import threading
import time

import pytest

import stratakv
from stratakv.tiers.behind import BehindStats, WriteBehind


class Source:
    """Numbers that are to be written, and where they went."""

    def __init__(self) -> None:
        self.new: list[int] = []
        self.written: list[int] = []
        self.gone: list[int] = []
        self.well = True
        self.closed = False

    def take(self) -> list[int]:
        if self.closed:
            raise stratakv.ClosedError("closed")
        taken, self.new = self.new, []
        return taken

    def write(self, items: list[int]) -> list[int]:
        if not self.well:
            return items
        self.written += items
        return []


def behind(source: Source, **more: float) -> WriteBehind[int]:
    options = {"interval_s": 3600.0, "tries": 3} | more
    return WriteBehind("test", source.take, source.write, dropped=source.gone.extend, **options)


def test_what_fails_is_tried_again_in_order_and_then_dropped_and_counted() -> None:
    source = Source()
    writer = behind(source)
    source.new = [1, 2]
    assert writer.look()
    source.well, source.new = False, [3]
    assert not writer.look()
    source.new = [4]
    assert (writer.look(), writer.stats()) == (False, BehindStats(waiting=1, retried=1, dropped=0))
    source.well = True
    assert writer.look()
    assert source.written == [1, 2, 3, 4]
    source.well, source.new = False, [5, 6]
    assert [writer.look() for _ in range(3)] == [False, False, True]
    assert (source.gone, writer.stats().dropped) == ([5, 6], 2)
    writer.close(0.1)


def test_a_thread_writes_without_being_asked_and_ends_with_what_is_left() -> None:
    source = Source()
    writer = behind(source, interval_s=0.01)
    source.new = [1]
    for _ in range(500):
        if source.written:
            break
        time.sleep(0.01)
    assert source.written == [1]
    source.new = [2]
    writer.close(1.0)
    assert source.written == [1, 2]
    assert "test" not in {thread.name for thread in threading.enumerate()}


def test_closing_ends_in_time_where_the_server_is_away_and_where_the_source_is_closed() -> None:
    source = Source()
    source.well, source.new = False, [1]
    writer = behind(source, tries=1_000_000, interval_s=0.01)
    begun = time.monotonic()
    writer.close(0.2)
    assert time.monotonic() - begun < 2
    assert writer.stats().dropped == 1
    other = behind(source)
    source.closed = True
    with pytest.raises(stratakv.ClosedError):
        other.look()
    other.close(0.1)


def test_an_error_in_the_thread_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    broken = [True]

    def write(items: list[int]) -> list[int]:
        if broken.pop() if broken else False:
            raise RuntimeError("a bug")
        return source.write(items)

    writer = WriteBehind("test", source.take, write, interval_s=0.01)
    source.new = [1]
    for _ in range(500):
        if not broken:
            source.new = [2]
            break
        time.sleep(0.01)
    for _ in range(500):
        if source.written:
            break
        time.sleep(0.01)
    writer.close(1.0)
    assert source.written == [2]
    assert "what was to be written is not" in caplog.text


def test_pauses_grow_by_chance_up_to_the_longest() -> None:
    source = Source()
    source.well = False
    writer = behind(source, interval_s=1.0, tries=100, most_pause_s=8.0)
    source.new = [1]
    pauses = []
    for _ in range(8):
        writer.look()
        pauses.append(writer._pause_s())
    writer.close(0.0)
    assert pauses[0] <= 3.0
    assert all(4.0 <= pause <= 12.0 for pause in pauses[4:])
    assert len(set(pauses)) == 8
