from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dataplane.shard import tracing
from dataplane.shard.attempts import Ended
from engine.request import Timing
from phalanx.runtime import telemetry

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHOICES = (Timing(1.0, 2.0, 3.0, 4.0), Timing(1.0, 2.5, 3.5, 6.0))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    return exporter


def test_an_attempt_has_its_phases_below_the_gateways_span(spans: InMemorySpanExporter) -> None:
    tracing.record(Ended(PARENT, "r", 2, 5, 9, CHOICES, ""), "d-0", 7)
    by_name = {span.name: span for span in spans.get_finished_spans()}
    attempt = by_name.pop("shard")
    assert attempt.parent is not None
    assert f"{attempt.parent.span_id:x}" == "b7ad6b7169203331"
    assert attempt.attributes is not None
    assert (attempt.attributes["attempt"], attempt.attributes["phalanx.epoch"]) == (2, 7)
    seconds = {name: (span.start_time / 1e9, span.end_time / 1e9) for name, span in by_name.items()}  # type: ignore[operator]
    assert seconds == {"queue": (1.0, 2.0), "prefill": (2.0, 3.0), "decode": (3.0, 6.0)}
    assert all(span.parent == attempt.context for span in by_name.values())


def test_an_attempt_without_times_or_trace_leaves_no_span(spans: InMemorySpanExporter) -> None:
    tracing.record(Ended(PARENT, "r", 1, 5, 0, (), "CANCELLED"), "d-0", 7)
    tracing.record(Ended("", "r", 1, 5, 9, CHOICES, ""), "d-0", 7)
    assert not spans.get_finished_spans()
