"""What an operator sees: metrics, traces, logs, health, and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratakv.config import Config
from stratakv.observe.explain import Explained
from stratakv.status import View
from stratakv.tracing import Traces, Work

if TYPE_CHECKING:
    from stratakv.events import Row
    from stratakv.observe.server import Server

__all__ = ["Observed", "Source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A store, as it is observed.

    Attributes:
        view: counters and status at one instant; raises ClosedError once the store is closed.
        events: as `CacheManager.events`.
        hottest: prefixes that are worth most, as many as asked for, as JSON takes them.
        work: what was done behind requests since the last call.
        explain: a prompt of a model, adapter and tenant, block by block.
    """

    view: Callable[[], View]
    events: Callable[[int | None], tuple[bool, list[Row], int]]
    hottest: Callable[[int], Sequence[Mapping[str, Any]]]
    work: Callable[[], list[Work]]
    explain: Callable[[str, object, str, str], Explained]


class Observed:
    """What of a store is shown, by its configuration. What is not asked for is not imported."""

    def __init__(self, config: Config, version: str, source: Source) -> None:
        """Begins.

        Raises:
            ConfigError: an address makes no sense or cannot be had, or what is needed is not installed.
        """
        observe = config.observe
        folder = config.ssd.path if config.ssd.enabled else None
        name = observe.name or (Path(str(folder)).name if folder is not None else "")
        self.traces: Traces | None = None
        self._closing: list[Callable[[], None]] = []
        self._server: Server | None = None
        try:
            if observe.otlp is not None:
                from stratakv.observe.metrics import Collector
                from stratakv.observe.otlp import MetricsThread, Spans, resource
                from stratakv.observe.traces import Traces as Tracing

                who = resource(version, name)
                traces = Tracing(observe.trace_ratio, Spans(observe.otlp), who, source.work)
                self.traces = traces
                self._closing.append(traces.close)
                metrics = MetricsThread(Collector(source.view), observe.otlp, who, every_s=observe.otlp_every_s)
                self._closing.append(metrics.close)
            if observe.listen is not None:
                from stratakv.observe.server import Server as Listening

                share = Path(observe.share) if observe.share is not None else None
                self._server = Listening(source, listen=observe.listen, token=observe.token, name=name, share=share)
                self._closing.append(self._server.close)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str | None:
        """Where it answers at present."""
        return self._server.address if self._server is not None else None

    def close(self) -> None:
        """Ends all of it; what was not sent yet is, as far as the time allows."""
        for close in reversed(self._closing):
            close()
        self._closing = []
