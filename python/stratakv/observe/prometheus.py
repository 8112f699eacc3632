"""Metrics in an application's own registry of Prometheus's client library."""

from __future__ import annotations

from collections.abc import Iterator

try:
    from prometheus_client.core import Metric as PrometheusMetric
    from prometheus_client.registry import Collector as Registered
except ImportError as error:
    raise ImportError("metrics need prometheus-client: pip install 'stratakv[observe]'") from error

from stratakv.errors import ClosedError
from stratakv.observe.metrics import Collector, Family
from stratakv.stats import Histogram

__all__ = ["PrometheusCollector"]


class PrometheusCollector(Registered):
    """All metrics of a store, for a registry: ``REGISTRY.register(PrometheusCollector(...))``."""

    def __init__(self, collector: Collector) -> None:
        """Of a store."""
        self._collector = collector

    def describe(self) -> Iterator[PrometheusMetric]:
        """Nothing: a registry need not ask a store for its names."""
        return iter(())

    def collect(self) -> Iterator[PrometheusMetric]:
        """All metrics at one instant; of a store that is closed none."""
        try:
            families = self._collector.families()
        except ClosedError:
            return
        for family in families:
            if family.samples:
                yield _metric(family)


def _metric(family: Family) -> PrometheusMetric:
    declared = family.metric
    name = declared.name.removesuffix("_total") if declared.kind == "counter" else declared.name
    metric = PrometheusMetric(name, declared.help, declared.kind)
    for values, value in family.samples.items():
        labels = dict(zip(declared.labels, values, strict=True))
        if not isinstance(value, Histogram):
            metric.add_sample(declared.name, labels, float(value))
            continue
        seen = 0
        for bound, count in zip((*value.bounds, "+Inf"), value.counts, strict=True):
            seen += count
            metric.add_sample(f"{name}_bucket", labels | {"le": f"{bound}"}, seen)
        metric.add_sample(f"{name}_count", labels, seen)
        metric.add_sample(f"{name}_sum", labels, value.sum)
    return metric
