"""Spans: what came at whoever takes OTLP, with the right parents, links and attributes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import stratakv
from otlp import Receiver, attributes, over_grpc, over_http
from stores import config, geometry, kv_of, loaded, tokens_of

RECEIVERS = [over_http, over_grpc]


def observed(path: Path | None, receiver: Receiver, **more: object) -> stratakv.Config:
    observe = stratakv.ObserveConfig(otlp=receiver.endpoint, **{"trace_ratio": 1.0} | more)
    return dataclasses.replace(config(path), observe=observe)


def spans(receiver: Receiver, *names: str) -> list[list[object]]:
    return [receiver.spans(f"stratakv.{name}") for name in names]


def flush(caches: stratakv.CacheManager) -> None:
    assert caches.traces is not None
    caches.traces.flush()


@pytest.mark.parametrize("over", RECEIVERS)
def test_every_span_comes_with_its_parent(tmp_path: Path, over: Callable[[], AbstractContextManager[Receiver]]) -> None:
    tokens = tokens_of(1, 64)
    with over() as receiver, stratakv.open(observed(tmp_path, receiver, name="here")) as caches:
        cache = caches.register("model", geometry())
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        loaded(cache, tokens)
        caches.flush()
        flush(caches)
        [put], [match], [load], [ram] = (
            receiver.spans(f"stratakv.{name}") for name in ("put", "match", "load", "load.ram")
        )
        assert attributes(put)["stratakv.stored_tokens"] == 64
        assert attributes(match) == {
            "stratakv.model": "model",
            "stratakv.asked_tokens": 64,
            "stratakv.matched_tokens": 64,
            "stratakv.blocks.ram": 16,
        }
        assert attributes(load)["stratakv.loaded_tokens"] == 64
        assert load.parent_span_id == match.span_id
        assert load.trace_id == match.trace_id != put.trace_id
        assert ram.parent_span_id == load.span_id
        assert (
            load.start_time_unix_nano <= ram.start_time_unix_nano <= ram.end_time_unix_nano <= load.end_time_unix_nano
        )
        demotions = receiver.spans("stratakv.demote")
        assert sum(attributes(each)["stratakv.blocks"] for each in demotions) == 16
        assert {link.span_id for each in demotions for link in each.links} == {match.span_id}
        assert {each["service.name"] for each in receiver.resources} == {"stratakv"}
        assert {each["service.instance.id"] for each in receiver.resources} == {"here"}


def test_what_lies_on_ssd_is_a_part_of_its_own_and_a_promotion_links_to_who_asked(tmp_path: Path) -> None:
    tokens = tokens_of(2, 64)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    with over_http() as receiver, stratakv.open(observed(tmp_path, receiver)) as caches:
        cache = caches.register("model", geometry())
        flush(caches)
        with cache.match(tokens) as hit:
            assert hit.prefetch().result() == 64
        flush(caches)
        [match], [prefetch], [promote] = (
            receiver.spans(f"stratakv.{name}") for name in ("match", "prefetch", "promote")
        )
        assert attributes(match)["stratakv.blocks.ssd"] == 16
        assert [link.span_id for link in prefetch.links] == [match.span_id]
        assert [link.span_id for link in promote.links] == [match.span_id]
        assert prefetch.trace_id != match.trace_id


def test_from_ssd_a_load_has_a_span_for_it(tmp_path: Path) -> None:
    tokens = tokens_of(3, 64)
    with stratakv.open(config(tmp_path)) as caches:
        cache = caches.register("model", geometry())
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
    with over_http() as receiver, stratakv.open(observed(tmp_path, receiver)) as caches:
        loaded(caches.register("model", geometry()), tokens)
        flush(caches)
        [load], [ssd] = spans(receiver, "load", "load.ssd")
        assert ssd.parent_span_id == load.span_id
        assert attributes(ssd) == {"stratakv.tier": "ssd", "stratakv.blocks": 16}
        assert receiver.spans("stratakv.load.ram") == []


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


def test_the_callers_span_is_the_parent_and_decides(tmp_path: Path) -> None:
    tokens = tokens_of(4, 32)
    with over_http() as receiver, stratakv.open(observed(tmp_path, receiver, trace_ratio=0.0)) as caches:
        cache = caches.register("model", geometry())
        kv = kv_of(tokens, cache.geometry)
        cache.put(tokens, kv, layout="LKHND")
        cache.match(tokens).release()
        # By a header, sampled, not sampled, and one that is none.
        cache.match(tokens, traceparent=f"{PARENT}-01").release()
        cache.match(tokens, traceparent=f"{PARENT}-00").release()
        cache.put(tokens, kv, layout="LKHND", traceparent=f"{PARENT}-01")
        # By the context, of an application's own tracer.
        tracer = TracerProvider().get_tracer("application")
        with tracer.start_as_current_span("request") as around:
            loaded(cache, tokens)
        with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True))):
            cache.match(tokens).release()
        flush(caches)
        [put] = receiver.spans("stratakv.put")
        by_header, by_context = receiver.spans("stratakv.match")
        [load] = receiver.spans("stratakv.load")
    for span in (put, by_header):
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:])
    inside = around.get_span_context()
    for span in (by_context, load):
        assert int.from_bytes(span.trace_id, "big") == inside.trace_id
        assert int.from_bytes(span.parent_span_id, "big") == inside.span_id
    assert [link.span_id for link in load.links] == [by_context.span_id]


def test_a_traceparent_that_is_none_is_none(tmp_path: Path) -> None:
    with over_http() as receiver, stratakv.open(observed(tmp_path, receiver)) as caches:
        cache = caches.register("model", geometry())
        for given in ("", "nonsense", f"{PARENT}-zz", "\r\nX: 1", "0" * 10_000):
            assert cache.match(tokens_of(5, 8), traceparent=given).tokens == 0
        flush(caches)
        assert {span.parent_span_id for span in receiver.spans("stratakv.match")} == {b""}


def test_as_many_are_traced_as_asked_for(tmp_path: Path) -> None:
    tokens = tokens_of(6, 8)
    with over_http() as receiver, stratakv.open(observed(None, receiver, trace_ratio=0.05)) as caches:
        cache = caches.register("model", geometry())
        for _ in range(20_000):
            cache.match(tokens).release()
        flush(caches)
        time.sleep(0.5)
        # Five deviations of the binomial distribution, to both sides.
        assert 846 < len(receiver.spans("stratakv.match")) < 1154


def test_an_endpoint_that_does_not_answer_is_said_once_and_costs_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tokens_of(7, 32)
    observe = stratakv.ObserveConfig(otlp="http://user:hidden@127.0.0.1:9", trace_ratio=1.0, otlp_every_s=0.05)
    with (
        caplog.at_level(logging.DEBUG),
        stratakv.open(dataclasses.replace(config(tmp_path), observe=observe)) as caches,
    ):
        cache = caches.register("model", geometry())
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        got, _ = loaded(cache, tokens)
        assert np.array_equal(got, kv_of(tokens, cache.geometry))
        flush(caches)
        time.sleep(0.5)
        flush(caches)
    said = [each for each in caplog.records if each.levelno >= logging.WARNING and "OTLP" in each.getMessage()]
    assert 1 <= len(said) <= 2
    assert all(each.name.startswith("stratakv") for each in said)
    assert "hidden" not in caplog.text


def test_dividing_the_tiers_is_a_trace_of_its_own(tmp_path: Path) -> None:
    with over_http() as receiver, stratakv.open(observed(tmp_path, receiver)) as caches:
        for name in ("one", "two"):
            caches.register(name, geometry())
        caches.rebalance()
        flush(caches)
        spans = receiver.spans("stratakv.rebalance")
        assert attributes(spans[-1]) == {"stratakv.result": 2}
        assert len({span.trace_id for span in spans}) == len(spans) >= 3


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "ftp://x", "http://"])
def test_an_endpoint_that_makes_no_sense_is_a_sentence(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(stratakv.ConfigError, match=r"observe\.otlp"):
        stratakv.open(dataclasses.replace(config(tmp_path), observe=stratakv.ObserveConfig(otlp=endpoint)))
    # Nothing is left open.
    stratakv.open(config(tmp_path)).close()


@pytest.mark.parametrize("over", RECEIVERS)
def test_metrics_are_sent_too(tmp_path: Path, over: Callable[[], AbstractContextManager[Receiver]]) -> None:
    tokens = tokens_of(8, 64)
    with over() as receiver, stratakv.open(observed(tmp_path, receiver, otlp_every_s=0.1)) as caches:
        cache = caches.register("model", geometry())
        cache.put(tokens, kv_of(tokens, cache.geometry), layout="LKHND")
        loaded(cache, tokens)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            asked = receiver.metric("stratakv_asked_blocks_total")
            if asked and asked[-1].sum.data_points and asked[-1].sum.data_points[0].as_int == 16:
                break
            time.sleep(0.05)
        point = asked[-1].sum.data_points[0]
        assert (point.as_int, attributes(point)) == (16, {"model": "model"})
        assert asked[-1].sum.is_monotonic
        used = receiver.metric("stratakv_used_bytes")[-1]
        assert used.unit == "By"
        assert used.gauge.data_points
        residence = receiver.metric("stratakv_residence_seconds")[-1].histogram.data_points[0]
        assert len(residence.bucket_counts) == len(residence.explicit_bounds) + 1
