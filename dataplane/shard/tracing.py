"""The spans of an attempt on its worker. They are made when the attempt has ended."""

from __future__ import annotations

from dataplane.shard.attempts import Ended
from phalanx.runtime import telemetry


def record(ended: Ended, replica: str, epoch: int) -> None:
    """Record a span below the gateway's, with queue, prefill and decode inside. Does nothing without tracing.

    An attempt that the engine did not finish has no timings and gets no span; the gateway's span has its
    error.
    """
    if not telemetry.enabled() or not ended.traceparent or not ended.timings:
        return
    queued = min(timing.queued for timing in ended.timings)
    scheduled = min(timing.scheduled for timing in ended.timings)
    first_token = min(timing.first_token for timing in ended.timings)
    finished = max(timing.finished for timing in ended.timings)
    attributes: dict[str, str | int | float | bool] = {
        "request.id": ended.request_id,
        "attempt": ended.attempt,
        "phalanx.replica": replica,
        "phalanx.epoch": epoch,
        "gen_ai.usage.input_tokens": ended.prompt_tokens,
        "gen_ai.usage.output_tokens": ended.completion_tokens,
    }
    span = telemetry.start_span("shard", parent=ended.traceparent, attributes=attributes, start=queued)
    for name, start, end in (
        ("queue", queued, scheduled),
        ("prefill", scheduled, first_token),
        ("decode", first_token, finished),
    ):
        telemetry.end_span(telemetry.start_span(name, parent=span, start=start), end=end)
    telemetry.end_span(span, error=ended.error or None, end=finished)
