"""The guard: a server that fails is a miss by its deadline, is asked again, and nothing is counted twice or lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stratakv
from stratakv.guard import Deadline, Guard


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


def test_what_a_request_waits_for_is_no_probe() -> None:
    clock = Clock()
    it = guard(clock, failures=1)
    it.call(fails)
    clock.now += 10
    assert it.state == "half_open"
    assert [it.call(answers, probes=False) for _ in range(3)] == [(None, "open")] * 3
    assert it.call(answers) == ("answer", None)
    assert it.call(answers, probes=False) == ("answer", None)
