"""Spans of OpenTelemetry: what a request waited for, and what was done behind it.

    match ─▶ load ─▶ load.ram, load.ssd, load.dragonfly          children of the caller's span, or of none
    put   ─ ─▶ demote          prefetch, promote          links to the request that they come from
    rebalance

A caller's span is that of its context, or of a ``traceparent`` (W3C Trace Context); whether it is sampled is its own
decision. Where there is none, one request in so many is traced.
"""

from __future__ import annotations

import contextvars
import itertools
import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from stratakv.cache import ModelCache
from stratakv.errors import ConfigError, StrataKVError
from stratakv.match import Match
from stratakv.tracing import Work

try:
    from opentelemetry import context as otel
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError("observe.otlp needs OpenTelemetry: pip install 'stratakv[observe]'") from error

__all__ = ["Traces"]

_T = TypeVar("_T")

# In our own spans' context: what is called within is not traced once more.
_INSIDE = otel.create_key("stratakv-inside")
# Blocks of which it is known which request put them.
_MOST_KNOWN = 65_536
# How often what was done behind is asked for.
_LOOK_S = 1.0


def _ambient() -> contextvars.ContextVar[Any] | None:
    """The variable in which OpenTelemetry keeps its context: asking it is five times as quick as asking the library."""
    mark = otel.set_value("stratakv-mark", True)
    token = otel.attach(mark)
    try:
        return next((var for var, value in contextvars.copy_context().items() if value is mark), None)
    finally:
        otel.detach(token)


class Traces:
    """Makes spans. Any thread may use it."""

    def __init__(
        self,
        ratio: float,
        exporter: SpanExporter,
        source: Resource,
        work: Callable[[], list[Work]],
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Begins.

        Args:
            ratio: share of the requests without a caller's span that are traced, 0..1.
            exporter: takes the spans.
            source: who they are of.
            work: what was done behind since the last call.
            draw: from 0 to 1, by chance.
        """
        self._ratio, self._draw, self._work = ratio, draw, work
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=source, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=8192))
        self._tracer = self._provider.get_tracer("stratakv")
        self._parse = TraceContextTextMapPropagator()
        variable = _ambient()
        # OpenTelemetry's context at present; every request asks.
        self._around: Callable[[None], Any] = variable.get if variable is not None else lambda _: otel.get_current()
        self._lock = threading.Lock()
        # Which request put a block, or matched it last: links of what is done with it behind.
        self._requests: OrderedDict[bytes, trace.SpanContext] = OrderedDict()
        # From the first such call on it is noted.
        self._work()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stratakv-traces", daemon=True)
        self._thread.start()

    def turn(self) -> Iterator[Any]:
        """The caller's context at each request that is passed over.

        What asks for it and counts it is one call, in C: half of what two would cost a match.
        """
        return map(self._around, itertools.repeat(None, self._skip()))

    def _skip(self) -> int:
        """Requests that are passed over: so many that each is traced by chance, whatever became of the others."""
        if self._ratio >= 1:
            return 0
        if self._ratio <= 0:
            return 1 << 62
        return int(math.log(1 - self._draw()) / math.log(1 - self._ratio))

    def wants(self, cache: ModelCache, context: Any, traceparent: str | None) -> bool:  # noqa: ANN401 - of OpenTelemetry
        """Whether a request that begins now is traced: because its caller's span is, or it is its turn."""
        due = context is True
        known = self._within((self._around(None) if due else context) or {})
        if known is False:
            return False
        if known or traceparent:
            return True
        if due:
            cache.turn = self.turn()
        return due

    @staticmethod
    def _within(around: Any) -> bool | None:  # noqa: ANN401 - a context of OpenTelemetry
        """What a caller's span decides; ``None``: there is none."""
        if around.get(_INSIDE):
            return False
        span = trace.get_current_span(around).get_span_context()
        return span.trace_flags.sampled if span.is_valid else None

    @contextmanager
    def _span(
        self,
        name: str,
        parent: Any = None,  # noqa: ANN401 - a context of OpenTelemetry
        links: list[trace.Link] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> Iterator[trace.Span]:
        """A span, which is the context of what is called within."""
        span = self._tracer.start_span(name, parent, links=links or (), attributes=dict(attributes or {}))
        token = otel.attach(otel.set_value(_INSIDE, True, trace.set_span_in_context(span)))
        try:
            yield span
        except Exception as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            otel.detach(token)
            span.end()

    def _parent(self, traceparent: str | None) -> Any:  # noqa: ANN401 - a context of OpenTelemetry
        """The caller's context; a ``traceparent`` that is none is as if there were none."""
        return self._parse.extract({"traceparent": traceparent}) if traceparent else None

    def match(self, cache: ModelCache, traceparent: str | None, **asked: Any) -> Match:  # noqa: ANN401 - as of `ModelCache.match`
        """A match, traced."""
        parent = self._parent(traceparent)
        if parent is not None:
            caller = trace.get_current_span(parent).get_span_context()
            if caller.is_valid and not caller.trace_flags.sampled:
                return self._untraced(lambda: cache.match(**asked))
        with self._span("stratakv.match", parent, attributes=_of(cache, asked)) as span:
            match = cache.match(**asked)
            told = match.explain()
            span.set_attributes(
                {"stratakv.asked_tokens": told.asked_tokens, "stratakv.matched_tokens": told.matched_tokens}
                | _by_tier(told.blocks)
                | ({"stratakv.reason": told.reason} if told.reason else {})
            )
            match.traced(self, span.get_span_context())
            self._remember(match.names, span.get_span_context())
        return match

    def _untraced(self, work: Callable[[], _T]) -> _T:
        token = otel.attach(otel.set_value(_INSIDE, True))
        try:
            return work()
        finally:
            otel.detach(token)

    def load(self, match: Match, request: trace.SpanContext, work: Callable[[], int]) -> int:
        """A load of a match that was traced."""
        around = trace.get_current_span().get_span_context()
        parent = None if around.is_valid else trace.set_span_in_context(trace.NonRecordingSpan(request))
        links = [trace.Link(request)] if around.is_valid else None
        with self._span("stratakv.load", parent, links) as span:
            begun = time.time_ns()
            tokens = work()
            told = match.explain()
            span.set_attributes(
                {"stratakv.loaded_tokens": tokens}
                | _by_tier(told.blocks)
                | ({"stratakv.reason": told.reason} if told.reason else {})
            )
            for tier, (after_s, took_s) in match.phases.items():
                start = begun + int(1e9 * after_s)
                child = self._tracer.start_span(
                    f"stratakv.load.{tier}",
                    start_time=start,
                    attributes={"stratakv.tier": tier, "stratakv.blocks": told.blocks.count(tier)},
                )
                child.end(start + int(1e9 * took_s))
        return tokens

    def put(
        self, cache: ModelCache, traceparent: str | None, work: Callable[[], int], names: Callable[[], list[bytes]]
    ) -> int:
        """A put, traced."""
        parent = self._parent(traceparent)
        if parent is not None:
            caller = trace.get_current_span(parent).get_span_context()
            if caller.is_valid and not caller.trace_flags.sampled:
                return self._untraced(work)
        with self._span("stratakv.put", parent, attributes=_of(cache, {})) as span:
            tokens = work()
            span.set_attribute("stratakv.stored_tokens", tokens)
            # What was put is put, if the store is closed meanwhile.
            with suppress(StrataKVError):
                self._remember(names(), span.get_span_context())
        return tokens

    def behind(self, name: str, request: trace.SpanContext | None, work: Callable[[], int]) -> int:
        """What is done behind a request, or by itself."""
        links = [trace.Link(request)] if request is not None else None
        with self._span(f"stratakv.{name}", otel.Context(), links) as span:
            done = work()
            span.set_attribute("stratakv.result", done)
        return done

    def _remember(self, names: list[bytes], request: trace.SpanContext) -> None:
        with self._lock:
            for name in names:
                self._requests[name] = request
                self._requests.move_to_end(name)
            while len(self._requests) > _MOST_KNOWN:
                self._requests.popitem(last=False)

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Makes spans of what the native half did behind since the last look: of requests that were traced."""
        for work in self._work():
            with self._lock:
                requests = {request.span_id: request for name in work.names if (request := self._requests.get(name))}
            if not requests:
                continue
            span = self._tracer.start_span(
                f"stratakv.{work.kind}",
                otel.Context(),
                links=[trace.Link(request) for request in requests.values()],
                attributes={
                    "stratakv.model": work.model,
                    "stratakv.blocks": work.blocks,
                    "stratakv.bytes": work.size,
                },
                start_time=work.begun_ns,
            )
            span.end(work.ended_ns)

    def flush(self) -> None:
        """Sends what there is."""
        self.look()
        self._provider.force_flush()

    def close(self) -> None:
        """Sends what there is, and ends."""
        self._over.set()
        self._thread.join()
        self.look()
        self._provider.shutdown()


def _of(cache: ModelCache, asked: dict[str, Any]) -> dict[str, Any]:
    named = {"stratakv.model": cache.name}
    if asked.get("adapter"):
        named["stratakv.adapter"] = asked["adapter"]
    return named


def _by_tier(blocks: tuple[str, ...]) -> dict[str, int]:
    return {f"stratakv.blocks.{tier}": blocks.count(tier) for tier in dict.fromkeys(blocks)}
