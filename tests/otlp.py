"""Whoever takes OTLP, over gRPC and over HTTP: what came, by kind."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as traces_grpc


class Receiver:
    """What came."""

    def __init__(self) -> None:
        self.endpoint = ""
        self._lock = threading.Lock()
        self._spans: list[Any] = []
        self._metrics: list[Any] = []
        self.resources: list[dict[str, str]] = []

    def take(self, request: Any) -> None:
        with self._lock:
            for each in getattr(request, "resource_spans", ()):
                self.resources.append({a.key: a.value.string_value for a in each.resource.attributes})
                self._spans += [span for scope in each.scope_spans for span in scope.spans]
            for each in getattr(request, "resource_metrics", ()):
                self._metrics += [metric for scope in each.scope_metrics for metric in scope.metrics]

    def spans(self, name: str = "") -> list[Any]:
        with self._lock:
            return [span for span in self._spans if not name or span.name == name]

    def metric(self, name: str) -> list[Any]:
        with self._lock:
            return [metric for metric in self._metrics if metric.name == name]


def attributes(of: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in of.attributes}


@contextmanager
def over_http() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            kind = {"/v1/traces": traces.ExportTraceServiceRequest, "/v1/metrics": metrics.ExportMetricsServiceRequest}
            request = kind[self.path]()
            request.ParseFromString(body)
            receiver.take(request)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def over_grpc() -> Iterator[Receiver]:
    receiver = Receiver()

    class Spans(traces_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            receiver.take(request)
            return traces.ExportTraceServiceResponse()

    class Figures(metrics_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            receiver.take(request)
            return metrics.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    traces_grpc.add_TraceServiceServicer_to_server(Spans(), server)
    metrics_grpc.add_MetricsServiceServicer_to_server(Figures(), server)
    receiver.endpoint = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None)
