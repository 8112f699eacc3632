"""What stands between a request and a server that may be slow, lying or gone.

    closed ── half of the last calls failed ──▶ open ── its pause is over ──▶ half-open ── the one probe ──▶ closed
                                               ▲                                │ failed: a longer pause      on success
                                               └────────────────────────────────┘

A call that fails, or is not made, is a miss with a reason, never an exception; and it ends by its deadline. Only what
is written behind is tried again. A queue that is full drops, and counts.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from stratakv.errors import InputError

_log = logging.getLogger(__name__)

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
        asked: calls that were asked for; ``asked = answered + errors + timeouts + refused`` holds exactly.
        answered: calls that gave a result.
        errors: calls that failed.
        timeouts: calls that failed after their deadline.
        refused: calls that were not made, since the breaker was open.
        opened: how often the breaker opened.
        last_error: what the last failure said; ``None`` before one.
    """

    state: State
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

    def call(self, work: Callable[[Deadline], _T]) -> tuple[_T | None, Reason | None]:
        """Does the work, if the server is asked at present.

        Args:
            work: asks the server, and gives up by the deadline that it is given.

        Returns:
            Its result, and why there is none.
        """
        begun = self._begin()
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
            return GuardStats(state=self._state(), last_error=self._last_error, **self._counts)

    def _state(self) -> State:
        if self._probe_at is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self._probe_at else "open"

    def _begin(self) -> Literal["call", "probe"] | None:
        with self._lock:
            self._counts["asked"] += 1
            if self._probe_at is None:
                return "call"
            if self._probing or self._clock() < self._probe_at:
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
            _log.warning("%s answers again", self.name)

    def _failed(self, error: Exception, *, late: bool, probe: bool) -> None:
        with self._lock:
            self._counts["timeouts" if late else "errors"] += 1
            # The kind alone: a message may hold an address with a password.
            self._last_error = type(error).__name__
            self._last.append(True)
            if probe:
                self._pause_s, self._probing = min(2 * self._pause_s, self._most_pause_s), False
            elif sum(self._last) < self._failures or self._probe_at is not None:
                return
            opened = self._probe_at is None
            self._counts["opened"] += opened
            self._probe_at = self._clock() + self._pause_s
        if opened:
            _log.warning("%s does not answer (%s): it is asked again later", self.name, self._last_error)

    def _forget(self, *, probe: bool) -> None:
        with self._lock:
            self._counts["errors"] += 1
            if probe:
                self._probing = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """What became of what was to be written behind.

    Attributes:
        queued: items that wait now.
        put: items that were put; ``put = queued + written + dropped`` holds exactly while none is being written.
        written: items that were written.
        dropped: items that were not: the queue was full, or writing them failed as often as it is tried.
        retried: how often a batch was tried again.
    """

    queued: int
    put: int
    written: int
    dropped: int
    retried: int


class WriteBehind(Generic[_T]):
    """A bounded queue whose items a thread writes in batches, through a guard."""

    def __init__(
        self,
        guard: Guard,
        write: Callable[[list[_T], Deadline], object],
        *,
        batch: int,
        capacity: int,
        tries: int = 3,
        first_wait_s: float = 0.05,
        chance: random.Random | None = None,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        """Starts the thread.

        Args:
            guard: makes the calls.
            write: writes some items, in the order of their puts; it may be called again with the same.
            batch: items that are written at once, at most.
            capacity: items that may wait; more are dropped.
            tries: how often a batch is tried before it is dropped.
            first_wait_s: seconds before the second try, on average; twice as many before each that follows.
            chance: draws how long exactly, so that many processes do not come back at once.
            wait: waits for an event so many seconds at most.
        """
        self._guard, self._write, self._batch, self._capacity, self._tries = guard, write, batch, capacity, tries
        self._first_wait_s, self._chance, self._wait = first_wait_s, chance or random.Random(), wait
        self._items: deque[_T] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._writing = 0
        self._counts = dict.fromkeys(("put", "written", "dropped", "retried"), 0)
        self._thread = threading.Thread(target=self._run, name=f"stratakv-{guard.name}", daemon=True)
        self._thread.start()

    def put(self, item: _T) -> bool:
        """Has an item written; ``False``: there is no room, and it was dropped."""
        with self._changed:
            self._counts["put"] += 1
            if self._closing.is_set() or len(self._items) >= self._capacity:
                self._counts["dropped"] += 1
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def drain(self, seconds: float) -> bool:
        """Waits until what was put was written or dropped; ``False``: so many seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._items and not self._writing, seconds)

    def close(self, seconds: float) -> bool:
        """Takes nothing more, and drains; what is left after so many seconds is dropped. ``True``: nothing was."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        done = self.drain(seconds)
        with self._changed:
            self._counts["dropped"] += len(self._items)
            self._items.clear()
            self._changed.notify_all()
        self._thread.join(max(seconds, self._guard.deadline_s))
        return done

    def stats(self) -> QueueStats:
        """What became of its items."""
        with self._changed:
            return QueueStats(queued=len(self._items), **self._counts)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closing.is_set())
                if not self._items:
                    return
                some = [self._items.popleft() for _ in range(min(self._batch, len(self._items)))]
                self._writing = len(some)
            written = self._try(some)
            with self._changed:
                self._counts["written" if written else "dropped"] += len(some)
                self._writing = 0
                self._changed.notify_all()

    def _try(self, some: list[_T]) -> bool:
        def write(deadline: Deadline) -> bool:
            self._write(some, deadline)
            return True

        for number in range(self._tries):
            if number:
                with self._changed:
                    self._counts["retried"] += 1
                # Closing has no time for more.
                most = 2 * self._first_wait_s * 2 ** (number - 1)
                if self._wait(self._closing, self._chance.uniform(0, most)):
                    return False
            done, reason = self._guard.call(write)
            if done:
                return True
            if reason == "open":
                return False
        return False
