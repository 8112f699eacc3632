"""The guard: a server that fails is a miss by its deadline, is asked again, and nothing is counted twice or lost."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stratakv
from stratakv.guard import Deadline, Guard, WriteBehind


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answers(_: Deadline) -> str:
    return "answer"


def fails(_: Deadline) -> str:
    raise ConnectionError("redis://user:password@host")


def guard(clock: Clock, **more: float) -> Guard:
    return Guard("server", clock=clock, **({"deadline_s": 0.5, "failures": 3, "pause_s": 1.0} | more))


def test_it_opens_when_half_of_the_last_calls_failed_and_one_probe_closes_it() -> None:
    clock = Clock()
    it = guard(clock)
    for call in (fails, answers, answers, fails, answers, answers, answers, fails):
        it.call(call)
    assert it.state == "closed", "three failures, but not of six calls"
    # A server that answers what is small and fails what is not.
    for call in (answers, fails, answers, fails):
        it.call(call)
    assert it.state == "open"
    assert it.call(answers) == (None, "open")
    clock.now += 1.0
    assert it.state == "half_open"

    def probe(_: Deadline) -> str:
        assert it.call(answers) == (None, "open"), "one probe at a time"
        return "well"

    assert it.call(probe) == ("well", None)
    assert it.state == "closed"
    assert (it.stats().opened, it.stats().last_error) == (1, "ConnectionError")


def test_a_probe_that_fails_makes_the_pause_longer_up_to_a_limit() -> None:
    clock = Clock()
    it = guard(clock, failures=1, most_pause_s=5.0)
    it.call(fails)
    for pause in (1.0, 2.0, 4.0, 5.0, 5.0):
        clock.now += pause - 0.01
        assert it.call(answers)[1] == "open"
        clock.now += 0.02
        assert it.call(fails)[1] == "error"
    clock.now += 5.01
    assert it.call(answers)[1] is None
    it.call(fails)
    clock.now += 1.01
    assert it.call(answers)[1] is None, "who was well begins anew"


def test_what_fails_after_its_deadline_took_too_long() -> None:
    clock = Clock()
    it = guard(clock)

    def slow(deadline: Deadline) -> None:
        assert deadline.left_s() == 0.5
        clock.now += 0.6
        assert (deadline.left_s(), deadline.is_over()) == (0.0, True)
        raise OSError

    def library(_: Deadline) -> None:
        raise TimeoutError

    assert it.call(slow) == (None, "timeout")
    assert it.call(library) == (None, "timeout")


def test_a_call_that_began_before_the_pause_is_no_probe() -> None:
    clock = Clock()
    it = guard(clock, failures=1)

    def straggler(_: Deadline) -> None:
        it.call(fails)
        clock.now += 1.0

        def probe(_: Deadline) -> str:
            raise_late()
            return "well"

        def raise_late() -> None:
            assert it.state == "half_open"

        assert it.call(probe) == ("well", None)
        it.call(fails)
        clock.now += 0.5
        raise ConnectionError

    it.call(straggler)
    assert it.state == "open"
    clock.now += 0.51
    assert it.call(answers) == ("answer", None), "the pause is no longer for it"


def test_the_end_of_the_process_is_no_failure_of_the_server() -> None:
    it = guard(Clock(), failures=1)

    def interrupted(_: Deadline) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        it.call(interrupted)
    assert it.call(answers) == ("answer", None)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=80))
def test_every_call_is_counted_once_and_the_server_is_asked_again(steps: list[tuple[bool, float]]) -> None:
    clock = Clock()
    it = guard(clock, most_pause_s=8.0)
    made = 0
    for well, passed in steps:
        clock.now += passed
        before = it.state
        _, reason = it.call(answers if well else fails)
        made += reason != "open"
        assert (reason == "open") == (before == "open")
        stats = it.stats()
        assert stats.asked == stats.answered + stats.errors + stats.timeouts + stats.refused
        assert made == stats.asked - stats.refused
    clock.now += 8.0
    assert it.call(answers) == ("answer", None), "after the longest pause it is asked"


@pytest.mark.parametrize("wrong", [{"deadline_s": 0}, {"failures": 0}, {"pause_s": -1}, {"most_pause_s": float("nan")}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(stratakv.InputError, match=next(iter(wrong))):
        guard(Clock(), **wrong)


def never_closing(closing: threading.Event, _: float) -> bool:
    return closing.is_set()


def test_items_are_written_in_order_and_in_batches() -> None:
    written: list[list[int]] = []
    free = threading.Event()

    def write(items: list[int], _: Deadline) -> None:
        free.wait()
        written.append(items)

    queue: WriteBehind[int] = WriteBehind(guard(Clock()), write, batch=10, capacity=100)
    assert all(queue.put(number) for number in range(55))
    free.set()
    assert queue.drain(10)
    assert [number for items in written for number in items] == list(range(55))
    assert max(map(len, written)) <= 10
    assert queue.close(10)
    stats = queue.stats()
    assert (stats.put, stats.written, stats.dropped, stats.queued) == (55, 55, 0, 0)
    assert not queue.put(1), "it is closed"


def test_a_full_queue_drops_and_counts() -> None:
    free = threading.Event()
    queue: WriteBehind[int] = WriteBehind(guard(Clock()), lambda *_: free.wait(), batch=1, capacity=5)
    taken = sum(queue.put(number) for number in range(50))
    assert taken in (5, 6), "five wait, and one may be being written"
    assert queue.stats().dropped == 50 - taken
    free.set()
    assert queue.close(10)


def test_a_batch_is_tried_again_and_then_dropped_and_an_open_breaker_drops_at_once() -> None:
    clock, calls = Clock(), []

    def write(items: list[int], _: Deadline) -> None:
        calls.append(items)
        if len(calls) in (1, 2, 4):
            raise ConnectionError

    queue: WriteBehind[int] = WriteBehind(
        guard(clock), write, batch=1, capacity=9, tries=3, chance=random.Random(1), wait=never_closing
    )
    queue.put(1)
    assert queue.drain(10)
    assert queue.stats().written == 1, "the third try"
    queue.put(2)
    assert queue.drain(10)
    queue.put(3)
    assert queue.drain(10)
    stats = queue.stats()
    assert (stats.written, stats.dropped, stats.retried, len(calls)) == (1, 2, 3, 4)
    clock.now += 1.0
    queue.put(4)
    assert queue.drain(10)
    assert queue.stats().written == 2, "it recovers without help"
    assert queue.close(10)


def test_a_batch_that_fails_as_often_as_it_is_tried_is_dropped() -> None:
    calls = []

    def write(items: list[int], _: Deadline) -> None:
        calls.append(items)
        raise ConnectionError

    queue: WriteBehind[int] = WriteBehind(
        guard(Clock(), failures=100), write, batch=5, capacity=9, tries=4, wait=never_closing
    )
    queue.put(1)
    assert queue.drain(10)
    stats = queue.stats()
    assert (stats.written, stats.dropped, stats.retried, len(calls)) == (0, 1, 3, 4)
    assert queue.close(10)


def test_closing_ends_by_its_deadline_and_counts_what_is_left() -> None:
    hang = threading.Event()
    queue: WriteBehind[int] = WriteBehind(guard(Clock(), deadline_s=0.05), lambda *_: hang.wait(), batch=1, capacity=9)
    for number in range(6):
        queue.put(number)
    assert not queue.close(0.05)
    hang.set()
    stats = queue.stats()
    assert stats.queued == 0
    assert stats.dropped >= 5
