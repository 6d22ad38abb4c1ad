"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from st_fpsloss.serving.live_index import LiveIndex
    from st_fpsloss.serving.query_vectors import QueryVectors

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counts requests, and reads the figures of the query vectors and the index when it is asked."""

    def __init__(self, queries: QueryVectors, index: LiveIndex) -> None:
        self._queries, self._index = queries, index
        self._registry = CollectorRegistry()
        self._registry.register(self)
        registry = self._registry
        self.requests = Counter(
            "st_fpsloss_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "st_fpsloss_request_seconds", "Time to answer.", ["path"], registry=registry, buckets=_SECONDS
        )
        self.in_flight = Gauge("st_fpsloss_requests_in_flight", "Requests that are being answered.", registry=registry)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus calls for the figures of others."""
        queries, index = self._queries, self._index
        for name, text, value in (
            ("query_cache_hits", "Queries whose vector was kept or on its way.", queries.hits),
            ("query_cache_misses", "Queries that had to be embedded.", queries.misses),
            ("query_batches", "Forward passes of the query tower.", queries.batches),
            ("index_loads", "Generations of the index that were loaded.", index.loads),
        ):
            yield CounterMetricFamily(f"st_fpsloss_{name}", text, value)
        for name, text, value in (
            ("query_cache_size", "Vectors in the cache.", len(queries)),
            ("index_documents", "Documents that are searched.", len(index.current)),
            ("index_outdated", "1 where the newest generation of the index cannot be used.", bool(index.problem)),
        ):
            yield GaugeMetricFamily(f"st_fpsloss_{name}", text, value)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)
