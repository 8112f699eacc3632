"""Writing behind the calls: a thread that takes what is new and hands it to a server, again where that failed.

    take() ─▶ batch ─▶ write(batch) ─▶ nothing left ─▶ the next one
                          ▲   │ some left
                          └───┴─ a pause by chance, twice as long each time ─▶ too often: dropped, and counted

Who writes reads from a source that is bounded by itself, so a server that is away for long costs no memory.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from stratakv import log
from stratakv.errors import ClosedError

_log = log.of(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class BehindStats:
    """What became of what was to be written.

    Attributes:
        waiting: items that were taken, and are to be tried again.
        retried: how often that was done.
        dropped: items that were given up.
    """

    waiting: int
    retried: int
    dropped: int


class WriteBehind(Generic[_T]):
    """Writes what a source has, in a thread of its own. Any thread may use it."""

    def __init__(
        self,
        name: str,
        take: Callable[[], list[_T]],
        write: Callable[[list[_T]], list[_T]],
        *,
        interval_s: float,
        tries: int = 5,
        most_pause_s: float = 5.0,
        dropped: Callable[[list[_T]], None] = lambda _: None,
        chance: random.Random | None = None,
    ) -> None:
        """Starts the thread.

        Args:
            name: of the thread.
            take: what is new; nothing: an empty list.
            write: writes some items, in their order, and returns those that are to be tried again.
            interval_s: seconds between two looks; the first pause after a failure is as long, on average.
            tries: how often items are tried before they are dropped.
            most_pause_s: seconds of the longest pause, on average.
            dropped: is told what was given up.
            chance: draws how long a pause is exactly, so that many processes do not come back at once.
        """
        self._take, self._write, self._dropped = take, write, dropped
        self._interval_s, self._tries, self._most_pause_s = interval_s, tries, most_pause_s
        self._chance = chance or random.Random()
        self._looking = threading.Lock()
        self._waiting: list[_T] = []
        self._failed = 0
        self._counts = {"retried": 0, "dropped": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def look(self) -> bool:
        """Writes what there is now; whether nothing of it is left to be tried again.

        Raises:
            ClosedError: the source is closed.
        """
        with self._looking:
            retried = bool(self._waiting)
            self._counts["retried"] += retried
            left = self._try(self._waiting or self._take())
            if retried and not left:
                # What came meanwhile.
                left = self._try(self._take())
            self._failed = self._failed + 1 if left else 0
            if self._failed >= self._tries:
                self._counts["dropped"] += len(left)
                self._dropped(left)
                left, self._failed = [], 0
            self._waiting = left
            return not left

    def flush(self, seconds: float) -> bool:
        """Writes what there is now, for so many seconds at most; whether all was written or given up.

        Raises:
            ClosedError: the source is closed.
        """
        end = time.monotonic() + seconds
        while not self.look():
            if time.monotonic() >= end:
                return False
            time.sleep(min(self._interval_s, max(end - time.monotonic(), 0.0), 0.05))
        return True

    def close(self, seconds: float) -> None:
        """Writes what there is, for so many seconds at most, and ends; what is left then is dropped."""
        self._stop.set()
        self._thread.join()
        try:
            self.flush(seconds)
        except ClosedError:
            # The source is; what it had is not known any more.
            return
        with self._looking:
            self._counts["dropped"] += len(self._waiting)
            self._waiting = []

    def stats(self) -> BehindStats:
        """What became of what was to be written."""
        return BehindStats(waiting=len(self._waiting), **self._counts)

    def _try(self, items: list[_T]) -> list[_T]:
        # If that raises, they are known.
        self._waiting = items
        return self._write(items) if items else []

    def _pause_s(self) -> float:
        mean = min(self._interval_s * 2**self._failed, max(self._most_pause_s, self._interval_s))
        return self._interval_s if not self._failed else self._chance.uniform(0.5, 1.5) * mean

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s()):
            try:
                self.look()
            except ClosedError:
                return
            except Exception:
                # One thing that cannot be written must not end all that follows.
                name = self._thread.name
                _log.exception("write_behind_failed", "%s: what was to be written is not", name, key=name, thread=name)
                with self._looking:
                    self._counts["dropped"] += len(self._waiting)
                    self._dropped(self._waiting)
                    self._waiting = []
