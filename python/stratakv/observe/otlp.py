"""Spans and metrics to whoever takes OTLP, as Jaeger, Tempo or a collector, by OpenTelemetry's own exporters.

An endpoint that does not answer costs nothing but the spans and figures of that time, and one line of the log.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from stratakv import log, scrub
from stratakv.errors import ClosedError, ConfigError, StrataKVError
from stratakv.observe.metrics import Collector, Family
from stratakv.stats import Histogram

try:
    from opentelemetry.sdk.metrics.export import (
        AggregationTemporality,
        Gauge,
        HistogramDataPoint,
        Metric,
        MetricExportResult,
        MetricsData,
        NumberDataPoint,
        ResourceMetrics,
        ScopeMetrics,
        Sum,
    )
    from opentelemetry.sdk.metrics.export import Histogram as OtlpHistogram
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
except ImportError as error:
    raise ConfigError("observe.otlp needs OpenTelemetry: pip install 'stratakv[observe]'") from error

__all__ = ["MetricsThread", "Spans", "resource"]

_log = log.of(__name__)

_T = TypeVar("_T")

# Seconds that an export may take.
_DEADLINE_S = 5
# What the exporters say of each try; we say it once.
_LOUD = ("opentelemetry.exporter.otlp", "opentelemetry.sdk")


def resource(version: str, process: str) -> Resource:
    """Who it comes from; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` are heeded."""
    own = {"service.name": "stratakv", "service.version": version, "service.instance.id": process}
    return Resource(own).merge(Resource.create()) if os.environ.get("OTEL_SERVICE_NAME") else Resource.create(own)


def _exporter(endpoint: str, kind: str) -> Any:  # noqa: ANN401 - one of four
    """Raises ConfigError, if the endpoint makes no sense."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https", "grpc", "grpcs") or not parts.hostname:
        raise ConfigError(
            f"observe.otlp is {scrub.text(endpoint)!r}, expected http://host:4318, https://..., grpc://host:4317 or grpcs://..."
        )
    if parts.scheme.startswith("http"):
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        made = {"traces": OTLPSpanExporter, "metrics": OTLPMetricExporter}[kind]
        return made(endpoint=f"{endpoint.rstrip('/')}/v1/{kind}", timeout=_DEADLINE_S)
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans

    grpc_made = {"traces": GrpcSpans, "metrics": GrpcMetrics}[kind]
    return grpc_made(endpoint=parts.netloc, insecure=parts.scheme == "grpc", timeout=_DEADLINE_S)


class _Told:
    """Whether an endpoint takes what it is sent; said once when that changes. Some take spans alone, as Jaeger."""

    def __init__(self, endpoint: str, what: str) -> None:
        self._what = what
        self._endpoint = urlsplit(endpoint)._replace(netloc=urlsplit(endpoint).netloc.rpartition("@")[2]).geturl()
        self._fails = False

    def tell(self, *, succeeded: bool) -> None:
        if succeeded and self._fails:
            _log.warning("otlp_taken_again", "OTLP: %s takes %s again", self._endpoint, self._what)
        elif not succeeded and not self._fails:
            _log.warning(
                "otlp_not_taken",
                "OTLP: %s takes no %s; they are lost until it does",
                self._endpoint,
                self._what,
            )
        self._fails = not succeeded


class _Quiet(logging.Filter):
    """Lines of the exporters, while they work for us."""

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self._here, "quiet", False) or not record.name.startswith(_LOUD)

    def __call__(self, work: Callable[[], _T]) -> _T:
        # Handlers of the root have the filter, since a logger's own is not asked for its children.
        for handler in logging.getLogger().handlers:
            if self not in handler.filters:
                handler.addFilter(self)
        self._here.quiet = True
        try:
            return work()
        finally:
            self._here.quiet = False


_quietly = _Quiet()


class Spans(SpanExporter):
    """Sends spans."""

    def __init__(self, endpoint: str) -> None:
        """To an endpoint.

        Raises:
            ConfigError: it makes no sense.
        """
        self._inner = _exporter(endpoint, "traces")
        self._told = _Told(endpoint, "spans")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends some; what fails is lost."""
        try:
            result: SpanExportResult = _quietly(lambda: self._inner.export(spans))
        except Exception as error:
            _log.debug("spans_not_sent", "spans were not sent: %s", type(error).__name__)
            result = SpanExportResult.FAILURE
        self._told.tell(succeeded=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        """Ends."""
        _quietly(self._inner.shutdown)


class MetricsThread:
    """Sends all metrics, every so many seconds."""

    def __init__(self, collector: Collector, endpoint: str, source: Resource, *, every_s: float) -> None:
        """Begins.

        Raises:
            ConfigError: the endpoint makes no sense.
        """
        self._collector, self._source, self._every_s = collector, source, every_s
        self._exporter = _exporter(endpoint, "metrics")
        self._told = _Told(endpoint, "metrics")
        self._begun_ns = time.time_ns()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stratakv-otlp", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self.send()

    def send(self) -> None:
        """Sends them now."""
        try:
            families = self._collector.families()
        except (ClosedError, StrataKVError):
            return
        scope = ScopeMetrics(InstrumentationScope("stratakv"), [self._metric(each) for each in families], "")
        data = MetricsData([ResourceMetrics(self._source, [scope], "")])
        try:
            result = _quietly(lambda: self._exporter.export(data))
        except Exception as error:
            _log.debug("figures_not_sent", "figures were not sent: %s", type(error).__name__)
            result = MetricExportResult.FAILURE
        self._told.tell(succeeded=result is MetricExportResult.SUCCESS)

    def _metric(self, family: Family) -> Metric:
        declared, now = family.metric, time.time_ns()
        whole = AggregationTemporality.CUMULATIVE
        points: list[Any] = []
        for values, value in family.samples.items():
            labels = dict(zip(declared.labels, values, strict=True))
            if isinstance(value, Histogram):
                points.append(
                    HistogramDataPoint(
                        attributes=labels,
                        start_time_unix_nano=self._begun_ns,
                        time_unix_nano=now,
                        count=sum(value.counts),
                        sum=value.sum,
                        bucket_counts=list(value.counts),
                        explicit_bounds=list(value.bounds),
                        min=0.0,
                        max=0.0,
                    )
                )
            else:
                points.append(NumberDataPoint(labels, self._begun_ns, now, value))
        data: Any
        if declared.kind == "counter":
            data = Sum(points, whole, is_monotonic=True)
        elif declared.kind == "gauge":
            data = Gauge(points)
        else:
            data = OtlpHistogram(points, whole)
        return Metric(declared.name, declared.help, _unit(declared.name), data)

    def close(self) -> None:
        """Sends what there is, and ends."""
        self._over.set()
        self._thread.join(2 * _DEADLINE_S)
        _quietly(lambda: self._exporter.shutdown(timeout_millis=1000))


def _unit(name: str) -> str:
    """As OTLP writes units."""
    base = name.removesuffix("_total")
    for end, unit in (("_bytes", "By"), ("_seconds", "s"), ("_ratio", "1")):
        if base.endswith(end):
            return unit
    return f"{{{base.rpartition('_')[2]}}}"
