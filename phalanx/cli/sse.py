"""The demo's calls to a gateway's HTTP server: a streamed completion with arrival times, and counters."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from phalanx.cli.failure import Failure

_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Completion:
    """What a client has received. `arrivals` has the monotonic time of each event with tokens, in seconds."""

    replica: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


def stream(url: str, body: dict[str, Any]) -> Iterator[tuple[Completion, str]]:
    """POST to `url`/v1/completions; after each event, yields the completion so far and the event's text.

    Raises:
        Failure: the gateway refuses the request or ends it with an error.
    """
    body = body | {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    with closing(_connection(url)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise Failure(f"the gateway refused the request: {response.read().decode(errors='replace')}")
        completion = Completion(replica=response.headers.get("x-phalanx-replica", ""))
        for event in _events(response):
            if "error" in event:
                raise Failure(f"the stream ended with an error: {event['error']['message']}")
            if usage := event.get("usage"):
                # Drop the details: the number of cached tokens depends on earlier requests.
                completion.usage = {name: count for name, count in usage.items() if isinstance(count, int)}
            for choice in event["choices"]:
                if choice["token_ids"]:
                    completion.arrivals.append(time.monotonic())
                completion.token_ids += choice["token_ids"]
                completion.text += choice["text"]
                completion.finish_reason = choice["finish_reason"] or completion.finish_reason
                yield completion, choice["text"]


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event before [DONE]."""
    while line := response.readline():
        if line.startswith(b"data: "):
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise Failure("the stream broke off")


def counter(url: str, name: str) -> float:
    """The value of a counter in the gateway's metrics."""
    with closing(_connection(url)) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _connection(url: str) -> http.client.HTTPConnection:
    where = urlsplit(url)
    assert where.hostname is not None
    return http.client.HTTPConnection(where.hostname, where.port, timeout=_TIMEOUT_S)
