"""The gateway's Prometheus metrics. Counters live in the dispatcher and are read at each scrape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dataplane.gateway.dispatcher import Dispatcher

_HELP = {
    "accepted": "Requests that a replica has accepted.",
    "finished": "Requests that finished: every choice has its finish reason.",
    "failed": "Requests that ended with an error.",
    "lost": "Requests that the cluster lost after a replica had accepted them: must be 0.",
    "cancelled": "Requests that their client cancelled.",
    "resumed": "Requests that another gateway began and a client resumed here.",
    "failovers": "Attempts after a request's first.",
    "replayed_tokens": "Output tokens that were sent to a replica again with attempts after the first.",
    "duplicate_tokens_dropped": "Tokens dropped because the journal had their positions already.",
    "stale_frames_dropped": "Frames of another epoch, and parts of frames of another attempt, dropped.",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics(Collector):
    """One gateway's metrics, in a registry of its own."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.first_token = Histogram(
            "phalanx_first_token_seconds",
            "Time from a request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.request = Histogram(
            "phalanx_request_seconds",
            "Time from a request to its end.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def collect(self) -> Iterator[Metric]:
        """The dispatcher's counters and the router's state as metrics."""
        for field in dataclasses.fields(self._dispatcher.counters):
            value = getattr(self._dispatcher.counters, field.name)
            yield CounterMetricFamily(f"phalanx_{field.name}", _HELP[field.name], value=value)
        yield GaugeMetricFamily(
            "phalanx_live_requests", "Requests not ended yet.", value=self._dispatcher.live
        )
        load = GaugeMetricFamily(
            "phalanx_replica_load", "Choices known to be on a replica.", labels=["replica"]
        )
        looked_up = CounterMetricFamily(
            "phalanx_prefix_tokens",
            "Prompt tokens looked up in a replica's prefix cache.",
            labels=["replica"],
        )
        hits = CounterMetricFamily(
            "phalanx_prefix_hits", "Prompt tokens found in a replica's prefix cache.", labels=["replica"]
        )
        for name, route in self._dispatcher.router.routes.items():
            load.add_metric([name], route.busy)
            looked_up.add_metric([name], route.prefix_tokens)
            hits.add_metric([name], route.prefix_hits)
        yield from (load, looked_up, hits)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
