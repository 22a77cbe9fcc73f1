"""Spans of a request and of its attempts. They are None, and cost nothing, where tracing is off."""

from __future__ import annotations

from dataplane.gateway.instructions import Submit
from dataplane.gateway.live import LiveRequest
from phalanx.runtime import telemetry


def start_request(live: LiveRequest, parent: str) -> None:
    """Begin the request's span. `parent` is the client's W3C traceparent, or empty."""
    journal = live.journal
    live.request_span = telemetry.start_span(
        "request",
        parent=parent,
        attributes={"request.id": journal.request_id, "gen_ai.request.model": journal.model},
    )


def start_attempt(live: LiveRequest, submit: Submit) -> None:
    """Begin an attempt's span below the request's, and put its context into the Submit message.

    A failover links the span of the lost attempt.
    """
    if live.request_span is None:
        return
    journal, failover = submit.journal, dict[str, str | int]()
    if submit.failover_reason:
        failover = {"failover.reason": submit.failover_reason, "replay.from_token": journal.tokens}
    live.attempt_span = telemetry.start_span(
        "attempt",
        parent=live.request_span,
        link=live.attempt_span.get_span_context() if live.attempt_span is not None else None,
        link_attributes=failover,
        attributes={
            "request.id": journal.request_id,
            "attempt": journal.attempts,
            "phalanx.replica": submit.target.replica,
            "phalanx.epoch": submit.target.epoch,
            **failover,
        },
    )
    submit.message.traceparent = telemetry.traceparent(live.attempt_span)


def end_attempt(live: LiveRequest, error: str) -> None:
    """End the attempt's span. `error` is a reason, empty if the attempt finished the request."""
    telemetry.end_span(live.attempt_span, error=error or None)


def end_request(live: LiveRequest) -> None:
    """End the request's span."""
    journal, usage = live.journal, live.journal.usage
    telemetry.end_span(
        live.request_span,
        attributes={
            "phalanx.attempts": journal.attempts,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
        },
        error=journal.error.reason if journal.error is not None else None,
    )
