"""``/metrics``: what the service does, for Prometheus. Nothing is global: a registry an app."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rxlm.serve.interface import Histogram, ServiceStats

GAUGES = {
    "running": "Answers being written",
    "queued": "Turns waiting for a place",
    "updating": "Turns being written into memory",
    "sessions": "Sessions kept",
    "detached": "Conversations kept that belong to no session",
    "state_files": "State files on disk",
    "state_bytes": "Bytes of state files on disk",
}
COUNTERS = {
    "turns": "Turns that ended",
    "failed_turns": "Turns that ended in an error",
    "refused_turns": "Turns refused because the queue was full",
    "cancelled_turns": "Turns cancelled before they began",
    "prompt_tokens": "Tokens read",
    "answer_tokens": "Tokens written",
    "steps": "Decode steps",
    "step_rows": "Answers advanced by decode steps, summed",
}
HISTOGRAMS = {
    "first_token": "From a turn's submission to its first token",
    "turn": "From a turn's submission to the end of its answer",
    "commit": "From the end of an answer until it is safely remembered",
    "queue": "From a turn's submission to its place in the batch",
}


class ServiceCollector(Collector):
    """Reads the service's counts when they are asked for."""

    def __init__(self, stats: Callable[[], ServiceStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        stats = self._stats()
        for name, what in GAUGES.items():
            yield GaugeMetricFamily(f"rxlm_{name}", what, value=getattr(stats, name))
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"rxlm_{name}", what, value=getattr(stats, name))
        for name, what in HISTOGRAMS.items():
            buckets, total = _buckets(getattr(stats, name))
            yield HistogramMetricFamily(f"rxlm_{name}_seconds", what, buckets, total)
        yield GaugeMetricFamily("rxlm_started_seconds", "Start, since 1970", value=stats.started)

    def describe(self) -> Iterator[Metric]:
        """Yield nothing: the service is not asked before a scrape."""
        return iter(())


class RequestCounter:
    """Counts answers by method, route and status; a route's pattern, never a path with ids."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._requests = Counter(
            "rxlm_http_requests",
            "HTTP requests answered",
            ("method", "route", "status"),
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "(none)")
                method = scope["method"] if route != "(none)" else "(any)"
                self._requests.labels(method, route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting)


def service_registry(stats: Callable[[], ServiceStats]) -> CollectorRegistry:
    """Return a registry with the metrics of a service."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(stats))
    return registry


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Return cumulative counts with upper bounds, and the sum, as Prometheus has them."""
    buckets, count = [], 0
    for bound, more in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        count += more
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(count)))
    return buckets, histogram.total
