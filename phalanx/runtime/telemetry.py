"""OpenTelemetry traces, enabled only if OTEL_EXPORTER_OTLP_ENDPOINT is set.

Without it `setup` imports nothing, and every function here returns at once. An attempt's Submit frame
carries the trace context as a W3C traceparent, because one gRPC stream carries many requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext, Tracer

Attributes = Mapping[str, str | int | float | bool]

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def setup(role: str, name: str) -> None:
    """Export this process's spans to OTEL_EXPORTER_OTLP_ENDPOINT, if it is set."""
    global _provider, _tracer
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": f"phalanx-{role}", "service.instance.id": name})
    _provider = TracerProvider(resource=resource)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=500))
    _tracer = _provider.get_tracer("phalanx")


def shutdown() -> None:
    """Export the remaining spans."""
    if _provider is not None:
        _provider.shutdown()


def enabled() -> bool:
    """Whether tracing is on."""
    return _tracer is not None


def start_span(
    name: str,
    *,
    parent: Span | str | None = None,
    link: SpanContext | None = None,
    link_attributes: Attributes | None = None,
    attributes: Attributes | None = None,
    start: float | None = None,
) -> Span | None:
    """Start a span with `parent`, a span or a traceparent. Returns None when tracing is off.

    `start` is in seconds since the Unix epoch. The caller ends the span with `end_span`.
    """
    if _tracer is None:
        return None
    from opentelemetry import trace

    return _tracer.start_span(
        name,
        context=_context_of(parent),
        links=[trace.Link(link, dict(link_attributes or {}))] if link else None,
        attributes=dict(attributes or {}),
        start_time=_nanoseconds(start),
    )


def end_span(
    span: Span | None,
    *,
    attributes: Attributes | None = None,
    error: str | None = None,
    end: float | None = None,
) -> None:
    """End a span; with `error` its status is failed. `end` is in seconds since the Unix epoch."""
    if span is None:
        return
    from opentelemetry.trace import StatusCode

    span.set_attributes(dict(attributes or {}))
    if error is not None:
        span.set_status(StatusCode.ERROR, error)
    span.end(_nanoseconds(end))


def traceparent(span: Span | None) -> str:
    """The W3C traceparent of a span; empty when tracing is off."""
    if span is None:
        return ""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier["traceparent"]


def _context_of(parent: Span | str | None):  # type: ignore[no-untyped-def]  # its type is in an optional import
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if parent is None or parent == "":
        return None
    if isinstance(parent, str):
        return TraceContextTextMapPropagator().extract({"traceparent": parent})
    return set_span_in_context(parent)


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
