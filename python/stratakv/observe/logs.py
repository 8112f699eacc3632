"""How the lines of the log are written: which levels, and as JSON where that is asked for.

The loggers are the process's, stores come and go. What holds is what all open stores set up together, the later one
before the earlier; what nobody sets up any more is as it was before. Only the package's own loggers are touched.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

from stratakv import scrub
from stratakv.errors import ClosedError, ConfigError
from stratakv.levels import Level, level_of, levels_of
from stratakv.sections import ObserveConfig

# The package's own, and those that stand below a logger of vLLM, which shows no others.
ROOTS = ("stratakv", "vllm.stratakv")
# Fields that stand beside the message, by which lines of one request are found.
_IDS = ("request_id", "trace_id")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def component_of(logger: str) -> str:
    """The part of the package that a logger is of, as in ``log_levels``."""
    return logger.removeprefix("vllm.").removeprefix("stratakv").removeprefix(".")


class Logs:
    """What one store sets up, from `open` to `close`. Any thread may use it."""

    def __init__(self, config: ObserveConfig) -> None:
        """As a store's settings say; nothing is set up yet."""
        self._config = config
        self.levels: dict[str, Level] = {}
        self.handler: logging.Handler | None = None
        self.is_closed = False

    def open(self) -> None:
        """Sets it up, where there is something to.

        Raises:
            ConfigError: the library that writes JSON is not installed.
        """
        levels = levels_of(self._config.log_levels)
        if self._config.log_format == "json":
            self.handler = _json_handler()
        if self.handler is not None or levels:
            _process.add(self, levels)

    def set_level(self, component: str, level: Level | None) -> None:
        """Sets the level of a component from now on; ``None``: it has none of its own.

        Raises:
            ConfigError: there is no such component, or no such level.
            ClosedError: it was taken back.
        """
        level_of(component, "info" if level is None else level)
        _process.add(self, {component: level})

    def close(self) -> None:
        """Takes it back; again does nothing."""
        _process.remove(self)


class _Process:
    """What holds for the process's loggers, and what was there before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order in which they were set up.
        self._open: list[Logs] = []
        # By logger: its level before, and the one that was set.
        self._levels: dict[str, tuple[int, int]] = {}
        # By logger that writes JSON: by whom, and whether what stands above it wrote its lines, too.
        self._handlers: dict[str, tuple[logging.Handler, bool]] = {}

    def add(self, logs: Logs, levels: Mapping[str, Level | None]) -> None:
        with self._lock:
            if logs.is_closed:
                raise ClosedError("the store is closed; open it again")
            for component, level in levels.items():
                # What was set last goes before what was set earlier, by other stores, too.
                logs.levels.pop(component, None)
                if level is not None:
                    logs.levels[component] = level
            self._open = [each for each in self._open if each is not logs] + [logs]
            self._apply()

    def remove(self, logs: Logs) -> None:
        with self._lock:
            logs.is_closed = True
            self._open = [each for each in self._open if each is not logs]
            self._apply()

    def _apply(self) -> None:
        wanted: dict[str, int] = {}
        for logs in self._open:
            for component, level in logs.levels.items():
                for root in ROOTS:
                    wanted[f"{root}.{component}" if component else root] = _LEVELS[level]
        for name in self._levels.keys() - wanted.keys():
            before, after = self._levels.pop(name)
            # What somebody else set since then stays.
            if logging.getLogger(name).level == after:
                logging.getLogger(name).setLevel(before)
        for name, number in wanted.items():
            logger = logging.getLogger(name)
            before = self._levels[name][0] if name in self._levels else logger.level
            self._levels[name] = (before, number)
            logger.setLevel(number)
        handler = next((logs.handler for logs in reversed(self._open) if logs.handler is not None), None)
        for name in ROOTS:
            self._write_by(logging.getLogger(name), handler)

    def _write_by(self, logger: logging.Logger, handler: logging.Handler | None) -> None:
        if logger.name in self._handlers:
            known, propagated = self._handlers[logger.name]
            if known is handler:
                return
            logger.removeHandler(known)
            logger.propagate = propagated
            del self._handlers[logger.name]
        if handler is not None:
            self._handlers[logger.name] = (handler, logger.propagate)
            logger.addHandler(handler)
            # Else whoever writes what stands above it writes each line again.
            logger.propagate = False


_process = _Process()


def configure(config: ObserveConfig) -> Logs:
    """Sets up the log as settings say, until what is returned is closed.

    Raises:
        ConfigError: the library that writes JSON is not installed.
    """
    logs = Logs(config)
    logs.open()
    return logs


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what stderr is at the moment: it may be another than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        # Called with the handler's lock held.
        self.stream = sys.stderr
        if self.stream is not None:
            super().emit(record)


def _json_handler() -> logging.Handler:
    try:
        import structlog
    except ImportError as error:
        raise ConfigError(
            "observe.log_format is 'json', which needs a library: pip install 'stratakv[observe]'"
        ) from error
    handler = _Stderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[_told, _blank, structlog.processors.JSONRenderer(separators=(",", ":"))],
            foreign_pre_chain=[_raised],
        )
    )
    return handler


def _raised(_: object, __: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The error of a record as text; the formatter takes it from the record before the others see it."""
    record: logging.LogRecord = event_dict["_record"]
    if record.exc_info:
        event_dict["exception"] = logging.Formatter().formatException(record.exc_info)
    elif record.exc_text:
        event_dict["exception"] = record.exc_text
    return event_dict


def _told(_: object, __: str, event_dict: MutableMapping[str, Any]) -> dict[str, Any]:
    """A record as an object; the ones of `stratakv.log` have an event and fields."""
    record: logging.LogRecord = event_dict["_record"]
    given = getattr(record, "fields", None)
    fields = dict(given) if isinstance(given, Mapping) else {}
    at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    line = {
        "timestamp": at.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": getattr(record, "event", None),
        "message": event_dict["event"],
        "component": component_of(record.name),
        **_current_trace(),
        **{name: fields.pop(name) for name in _IDS if name in fields},
    }
    if fields:
        line["fields"] = fields
    if "exception" in event_dict:
        line["exception"] = event_dict["exception"]
    return line


def _current_trace() -> dict[str, str]:
    """The trace of whoever has one under way, where OpenTelemetry is used at all."""
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    span = current().get_span_context() if current is not None else None
    return {"trace_id": f"{span.trace_id:032x}"} if span is not None and span.is_valid else {}


def _blank(_: object, __: str, event_dict: MutableMapping[str, Any]) -> dict[str, Any]:
    """The same without secrets: what others write to these loggers did not go through `stratakv.log`."""
    return {name: scrub.field(name, value) for name, value in event_dict.items()}
