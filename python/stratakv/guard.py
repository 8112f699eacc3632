"""What stands between a request and a server that may be slow, lying or gone.

    closed ── half of the last calls failed ──▶ open ── its pause is over ──▶ half-open ── the one probe ──▶ closed
                                               ▲                                │ failed: a longer pause      on success
                                               └────────────────────────────────┘

A call that fails, or is not made, is a miss with a reason, never an exception; and it ends by its deadline.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from stratakv import log
from stratakv.errors import InputError

_log = log.of(__name__)

State = Literal["closed", "open", "half_open"]
# Why a call gave nothing: it failed, took too long, or was not made since the breaker is open.
Reason = Literal["error", "timeout", "open"]

_T = TypeVar("_T")


class Deadline:
    """An instant by which something has to be done."""

    __slots__ = ("_at", "_clock")

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """So many seconds from now."""
        self._clock = clock
        self._at = clock() + seconds

    def left_s(self) -> float:
        """Seconds that are left, 0 at least."""
        return max(self._at - self._clock(), 0.0)

    def is_over(self) -> bool:
        """Whether none are."""
        return self._clock() >= self._at


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardStats:
    """What became of the calls of a guard.

    Attributes:
        state: of its breaker.
        failing: whether it is not closed, or the last call failed.
        asked: calls that were asked for; ``asked = answered + errors + timeouts + refused`` holds exactly.
        answered: calls that gave a result.
        errors: calls that failed.
        timeouts: calls that failed after their deadline.
        refused: calls that were not made, since the breaker was open.
        opened: how often the breaker opened.
        last_error: what the last failure said; ``None`` before one.
    """

    state: State
    failing: bool
    asked: int
    answered: int
    errors: int
    timeouts: int
    refused: int
    opened: int
    last_error: str | None


class Guard:
    """Makes the calls of one server. Any thread may use it."""

    def __init__(
        self,
        name: str,
        *,
        deadline_s: float,
        failures: int = 3,
        pause_s: float = 1.0,
        most_pause_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of a server that is taken to be well.

        Args:
            name: what log lines call the server.
            deadline_s: seconds that a call may take.
            failures: so many of the last twice as many calls open the breaker.
            pause_s: seconds until the first probe; twice as many after each that fails.
            most_pause_s: up to so many.
            clock: seconds.

        Raises:
            InputError: a number that is not above 0.
        """
        numbers = {
            "deadline_s": deadline_s,
            "failures": failures,
            "pause_s": pause_s,
            "most_pause_s": most_pause_s,
        }
        for what, number in numbers.items():
            if not number > 0:
                raise InputError(f"guard {name!r}: {what} is {number!r}, expected a number above 0")
        self.name, self.deadline_s = name, deadline_s
        self._failures, self._first_pause_s, self._most_pause_s, self._clock = failures, pause_s, most_pause_s, clock
        self._lock = threading.Lock()
        # Of the last calls, whether each failed.
        self._last: deque[bool] = deque(maxlen=2 * int(failures))
        self._pause_s = pause_s
        # When the next probe may be made, while the breaker is not closed; and whether one is under way.
        self._probe_at: float | None = None
        self._probing = False
        self._counts = dict.fromkeys(("asked", "answered", "errors", "timeouts", "refused", "opened"), 0)
        self._last_error: str | None = None

    def call(self, work: Callable[[Deadline], _T], *, probes: bool = True) -> tuple[_T | None, Reason | None]:
        """Does the work, if the server is asked at present.

        Args:
            work: asks the server, and gives up by the deadline that it is given.
            probes: whether it may be the probe; what a request waits for should not.

        Returns:
            Its result, and why there is none.
        """
        begun = self._begin(probes=probes)
        if begun is None:
            return None, "open"
        probe = begun == "probe"
        deadline = Deadline(self.deadline_s, self._clock)
        try:
            result = work(deadline)
        except Exception as error:
            late = deadline.is_over() or isinstance(error, TimeoutError)
            self._failed(error, late=late, probe=probe)
            return None, "timeout" if late else "error"
        except BaseException:
            # The process ends, not the server.
            self._forget(probe=probe)
            raise
        self._succeeded()
        return result, None

    @property
    def state(self) -> State:
        """Of the breaker."""
        with self._lock:
            return self._state()

    def stats(self) -> GuardStats:
        """What became of its calls."""
        with self._lock:
            state, failed = self._state(), bool(self._last and self._last[-1])
            failing = state != "closed" or failed
            return GuardStats(state=state, failing=failing, last_error=self._last_error, **self._counts)

    def _state(self) -> State:
        if self._probe_at is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self._probe_at else "open"

    def _begin(self, *, probes: bool) -> Literal["call", "probe"] | None:
        with self._lock:
            self._counts["asked"] += 1
            if self._probe_at is None:
                return "call"
            if not probes or self._probing or self._clock() < self._probe_at:
                self._counts["refused"] += 1
                return None
            self._probing = True
            return "probe"

    def _succeeded(self) -> None:
        with self._lock:
            self._counts["answered"] += 1
            was_open, self._probe_at, self._probing = self._probe_at is not None, None, False
            if was_open:
                self._last.clear()
                self._pause_s = self._first_pause_s
            self._last.append(False)
        if was_open:
            _log.warning("breaker_closed", "%s answers again", self.name, key=self.name, server=self.name)

    def _failed(self, error: Exception, *, late: bool, probe: bool) -> None:
        with self._lock:
            self._counts["timeouts" if late else "errors"] += 1
            # The kind alone: a message may hold an address with a password.
            why = self._last_error = type(error).__name__
            self._last.append(True)
            if probe:
                self._pause_s, self._probing = min(2 * self._pause_s, self._most_pause_s), False
            elif sum(self._last) < self._failures or self._probe_at is not None:
                return
            opened = self._probe_at is None
            self._counts["opened"] += opened
            self._probe_at = self._clock() + self._pause_s
        if opened:
            _log.warning(
                "breaker_opened",
                "%s does not answer (%s): it is asked again later",
                self.name,
                why,
                key=self.name,
                server=self.name,
                error=why,
            )

    def _forget(self, *, probe: bool) -> None:
        with self._lock:
            self._counts["errors"] += 1
            if probe:
                self._probing = False
