"""What every process of Shoal tells Prometheus of itself: the process, its Python, and which build it is.

The rule: these are `prometheus_client`'s own names, which every dashboard knows, and ``shoal_build_info``.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.version import VERSION

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
disable_created_metrics()  # type: ignore[no-untyped-call] # a time beside each counter, which nobody asks for in this format


class _Build(Collector):
    def __init__(self, program: str) -> None:
        self._program = program

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "shoal_build_info",
            "1, for the program, its version and its Python.",
            labels=["program", "version", "python"],
        )
        build.add_metric([self._program, VERSION, platform.python_version()], 1)
        yield build


class Exposition:
    """The metrics of one process.

    Args:
        program: as it is started, such as ``shoal-controller``.
        collectors: what else there is to tell.
    """

    def __init__(self, program: str, *collectors: Collector) -> None:
        self.registry = CollectorRegistry()
        for collector in (*collectors, _Build(program)):
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def text(self) -> bytes:
        """The Prometheus text of this moment."""
        return generate_latest(self.registry)
