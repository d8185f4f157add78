"""What Prometheus reads at ``/metrics`` of the controller.

The state is read at each scrape, so no value is kept twice; only calls are counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.cluster_map import NodeState
from shoal.wire.process_metrics import Exposition
from shoal_controller import status
from shoal_controller.model import JobState
from shoal_controller.shell import Shell

PROGRAM = "shoal-controller"


class ControllerMetrics(Collector):
    """Metrics of one controller.

    Args:
        others: of what runs beside it in the process.
    """

    def __init__(self, shell: Shell, *others: Collector) -> None:
        self._shell = shell
        self._calls: Counter[tuple[str, str]] = Counter()
        self.exposition = Exposition(PROGRAM, self, *others).text

    def count_call(self, method: str, code: str) -> None:
        """Count a finished RPC."""
        self._calls[method, code] += 1

    def collect(self) -> Iterator[Metric]:
        state = self._shell.state
        yield GaugeMetricFamily("shoal_controller_epoch", "Epoch of the cluster map.", state.map.epoch)
        nodes = GaugeMetricFamily("shoal_controller_nodes", "Known cache nodes, by state.", labels=["state"])
        for node_state in NodeState:
            nodes.add_metric([str(node_state)], sum(node.state is node_state for node in state.map.nodes))
        yield nodes
        capacity = GaugeMetricFamily("shoal_controller_capacity_bytes", "Bytes of cache that nodes which are up offer.")
        capacity.add_metric([], sum(node.weight for node in state.map.owners()))
        yield capacity
        yield GaugeMetricFamily("shoal_controller_datasets", "Registered datasets.", len(state.datasets))
        sizes = GaugeMetricFamily(
            "shoal_controller_dataset_bytes", "Bytes of a dataset's newest snapshot.", labels=["dataset"]
        )
        cached = GaugeMetricFamily(
            "shoal_controller_dataset_cached_bytes",
            "Bytes of a dataset's newest snapshot that the cluster holds, each shard counted once.",
            labels=["dataset"],
        )
        for name, dataset in sorted(state.datasets.items()):
            sizes.add_metric([name], dataset.newest.total_bytes)
            cached.add_metric([name], status.cached_bytes(dataset, state))
        yield sizes
        yield cached
        jobs = GaugeMetricFamily(
            "shoal_controller_prefetch_jobs", "Prefetch jobs that are remembered, by state.", labels=["state"]
        )
        for job_state in JobState:
            jobs.add_metric([str(job_state)], sum(job.state is job_state for job in state.jobs.values()))
        yield jobs
        yield GaugeMetricFamily(
            "shoal_controller_warnings", "Sentences that 'shoal status' warns with.", len(status.warnings(state))
        )
        calls = CounterMetricFamily(
            "shoal_controller_calls", "Finished gRPC calls, by method and status.", labels=["method", "code"]
        )
        for (method, code), count in sorted(self._calls.items()):
            calls.add_metric([method, code], count)
        yield calls
