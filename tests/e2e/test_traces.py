"""Spans of one request that fails over, as a collector receives them from every process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from phalanx.client import Client
from tests.cluster import Cluster
from tests.until import until_sync

TOKENS, KILL_AT = 300, 10


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span: (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # named by the proto
        with self._lock:
            for resource in request.resource_spans:
                attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [(attributes["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Any]:
        with self._lock:
            return [span for _, span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server, collector = grpc.server(futures.ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


async def generate(cluster: Cluster) -> None:
    """One request whose replica loses its engine in the middle."""
    (worker,) = cluster.workers()
    received, killed = 0, False
    async with Client(cluster.grpc) as client:
        async for event in client.generate(cluster.model, "def ", max_tokens=TOKENS, seed=1, ignore_eos=True):
            received += len(event.chunk.token_ids)
            if received >= KILL_AT and not killed:
                killed = True
                cluster.kill(worker["engine_pid"])
    assert received == TOKENS


def test_a_failover_is_one_trace_with_linked_attempts(
    collector: tuple[Collector, str], demo_model: Path, tmp_path: Path
) -> None:
    spans, endpoint = collector
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_INSECURE": "true"}
    with Cluster.start(demo_model, tmp_path, replicas=1, environment=environment) as cluster:
        asyncio.run(generate(cluster))
        until_sync(
            lambda: spans.named("request") and len(spans.named("attempt")) == 2 and spans.named("decode")
        )
    (root,) = spans.named("request")
    first, second = sorted(spans.named("attempt"), key=lambda span: attributes(span)["attempt"])
    assert {span.trace_id for _, span in spans.spans} == {root.trace_id}
    assert first.parent_span_id == second.parent_span_id == root.span_id
    (link,) = second.links
    assert link.span_id == first.span_id
    assert attributes(second)["failover.reason"]
    assert attributes(second)["replay.from_token"] >= KILL_AT
    services = {service for service, _ in spans.spans}
    assert services == {"phalanx-gateway", "phalanx-worker"}
    for name in ("queue", "prefill", "decode"):
        assert spans.named(name), f"no span {name!r}"
