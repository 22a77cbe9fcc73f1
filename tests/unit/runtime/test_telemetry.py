from __future__ import annotations

import subprocess
import sys

import pytest

from phalanx.runtime import telemetry


def test_without_an_endpoint_nothing_is_imported_and_no_span_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import sys
from phalanx.runtime import telemetry
telemetry.setup("gateway", "g")
span = telemetry.start_span("request")
telemetry.end_span(span)
assert span is None and telemetry.traceparent(span) == "" and not telemetry.enabled()
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_span_goes_on_from_a_traceparent(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    monkeypatch.setattr(telemetry, "_tracer", TracerProvider().get_tracer("test"))
    root = telemetry.start_span("request")
    child = telemetry.start_span("shard", parent=telemetry.traceparent(root))
    assert root is not None
    assert child is not None
    assert child.get_span_context().trace_id == root.get_span_context().trace_id
    assert child.parent.span_id == root.get_span_context().span_id
