"""Lines of the log: a stable name of what happened for machines, a sentence for people, and fields.

    _log = log.of(__name__)
    _log.warning("io_uring_refused", "io_uring is refused here (%s): ...", why, engine="pread")

They go to the standard library's logger of the module, as records with an `event` and `fields` of their own: what an
application does with them is its choice. What is off costs the look whether it is. What repeats is written a few times
a minute, and then counted; the next line tells how many there were. Secrets are blanked out in all of it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TypeAlias

from stratakv import scrub

# So many lines of one event and key are written in so many seconds.
MOST_LINES, WINDOW_S = 5, 60.0
# Events and keys that are told apart; further keys of an event share its lines.
MOST_KEYS = 1024

_Raised: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]

_bound: ContextVar[dict[str, object] | None] = ContextVar("stratakv_log_fields", default=None)


class bound:
    """Adds fields to all lines that are written within, by this thread or task: ``with bound(request_id=name): ...``.

    A field that is ``None`` is left out. Those of a line itself go before these.
    """

    __slots__ = ("_fields", "_token")

    def __init__(self, **fields: object) -> None:
        self._fields = fields
        self._token: Token[dict[str, object] | None] | None = None

    def __enter__(self) -> None:
        """From now on."""
        self._token = _bound.set({**(_bound.get() or {}), **self._fields})

    def __exit__(self, *_: object) -> None:
        """Up to now."""
        if self._token is not None:
            _bound.reset(self._token)


class _Line:
    """When an event was written lately, and how often it was not since then."""

    __slots__ = ("left_out", "since", "written")

    def __init__(self) -> None:
        self.written: deque[float] = deque(maxlen=MOST_LINES)
        self.left_out, self.since = 0, 0.0


class Repeats:
    """Which lines are written, and which only counted. Any thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Goes by a clock, in seconds."""
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Begins anew, as in a process that was just forked: who held the lock there is not here."""
        self._lock = threading.Lock()
        # By logger, event and key; what was written longest ago comes first.
        self._lines: OrderedDict[tuple[str, str, str | None], _Line] = OrderedDict()

    def __len__(self) -> int:
        """Events and keys that are told apart at the moment."""
        return len(self._lines)

    def admit(self, logger: str, event: str, key: str | None = None) -> tuple[int, float] | None:
        """Whether a line is written: how many before it were not, and since how many seconds. ``None``: it is not."""
        with self._lock:
            now = self._clock()
            name, line = self._line((logger, event, key), now)
            if len(line.written) == MOST_LINES and now - line.written[0] < WINDOW_S:
                line.since = line.since if line.left_out else now
                line.left_out += 1
                return None
            told = (line.left_out, now - line.since)
            line.left_out = 0
            line.written.append(now)
            self._lines.move_to_end(name)
            return told

    def _line(self, name: tuple[str, str, str | None], now: float) -> tuple[tuple[str, str, str | None], _Line]:
        line = self._lines.get(name)
        if line is None:
            oldest = next(iter(self._lines.values()), None)
            full = len(self._lines) >= MOST_KEYS
            if full and name[2] is not None and oldest is not None and now - oldest.written[-1] < WINDOW_S:
                # A flood of keys must not become a flood of lines.
                return self._line((name[0], name[1], None), now)
            if full:
                # What was left out of that one is not told any more.
                self._lines.popitem(last=False)
            line = self._lines[name] = _Line()
        return name, line


REPEATS = Repeats()
os.register_at_fork(after_in_child=REPEATS.forget)


class Log:
    """Writes the lines of one module.

    Every method takes the event, in snake_case, never to be renamed; the sentence with its %-arguments; as `key` what
    tells repeats of one event apart, as the name of a model; and fields.
    """

    __slots__ = ("_logger", "_repeats")

    def __init__(self, logger: logging.Logger, repeats: Repeats = REPEATS) -> None:
        """Writes to a logger of the standard library."""
        self._logger, self._repeats = logger, repeats

    def debug(self, event: str, sentence: str, /, *args: object, key: str | None = None, **fields: object) -> None:
        """What helps to follow what goes on."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._write(logging.DEBUG, event, sentence, args, key, fields)

    def info(self, event: str, sentence: str, /, *args: object, key: str | None = None, **fields: object) -> None:
        """What is as it should be, and worth knowing."""
        if self._logger.isEnabledFor(logging.INFO):
            self._write(logging.INFO, event, sentence, args, key, fields)

    def warning(self, event: str, sentence: str, /, *args: object, key: str | None = None, **fields: object) -> None:
        """What costs something, and serving goes on."""
        if self._logger.isEnabledFor(logging.WARNING):
            self._write(logging.WARNING, event, sentence, args, key, fields)

    def error(self, event: str, sentence: str, /, *args: object, key: str | None = None, **fields: object) -> None:
        """What is lost."""
        if self._logger.isEnabledFor(logging.ERROR):
            self._write(logging.ERROR, event, sentence, args, key, fields)

    def exception(self, event: str, sentence: str, /, *args: object, key: str | None = None, **fields: object) -> None:
        """An error that nobody foresaw, with its traceback; where it is handled."""
        if self._logger.isEnabledFor(logging.ERROR):
            kind, error, traceback = sys.exc_info()
            raised = None if kind is None or error is None else (kind, error, traceback)
            self._write(logging.ERROR, event, sentence, args, key, fields, raised)

    def _write(
        self,
        level: int,
        event: str,
        sentence: str,
        args: tuple[object, ...],
        key: str | None,
        fields: dict[str, object],
        raised: _Raised | None = None,
    ) -> None:
        logger = self._logger
        told = self._repeats.admit(logger.name, event, key)
        if told is None:
            return
        args = tuple(map(scrub.argument, args))
        if context := _bound.get():
            fields = {**{name: value for name, value in context.items() if value is not None}, **fields}
        fields = {name: scrub.field(name, value) for name, value in fields.items()}
        left_out, since_s = told
        if left_out:
            minutes = max(math.ceil(since_s / 60), 1)
            within = "minute" if minutes == 1 else f"{minutes:.0f} minutes"
            sentence = (sentence if args else sentence.replace("%", "%%")) + f"; %d more like this in the last {within}"
            args = (*args, left_out)
            fields["repeated"] = left_out
        # The line is whose who calls `warning`, three frames from there.
        path, number, function, _ = logger.findCaller(stacklevel=3)
        record = logger.makeRecord(logger.name, level, path, number, sentence, args, raised, function)
        record.__dict__.update(event=event, fields=fields)
        if raised is not None:
            shown = logging.Formatter().formatException(raised)
            if (clean := scrub.text(shown)) != shown:
                # Whoever formats it takes the text, and has no error to format again.
                record.exc_info, record.exc_text = None, clean
        logger.handle(record)


def of(name: str, *, below: str = "", repeats: Repeats = REPEATS) -> Log:
    """The log of a module.

    Args:
        name: of the module.
        below: of a logger of an engine, which shows what is below it and nothing else.
        repeats: what is written and what only counted.
    """
    return Log(logging.getLogger(f"{below}.{name}" if below else name), repeats)
