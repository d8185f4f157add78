"""What Prometheus reads at ``/metrics`` of a cache node; docs/cachenode.md lists the same names.

The node counts for itself (shoal_cachenode.node.Counters); this collector shows those counts in Prometheus's form, so
no value is kept twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.wire.http_server import HttpServer
from shoal.wire.process_metrics import Exposition
from shoal_cachenode.node import CacheNode


class NodeCollector(Collector):
    """Reads the node's counts at each scrape."""

    def __init__(self, node: CacheNode, server: HttpServer) -> None:
        self._node = node
        self._server = server

    def collect(self) -> Iterator[Metric]:
        node, counters = self._node, self._node.counters
        served = CounterMetricFamily(
            "shoal_node_served_bytes", "Bytes of shards sent to readers, by where they lay.", labels=["from"]
        )
        served.add_metric(["sealed"], counters.served_sealed_bytes.value)
        served.add_metric(["filling"], counters.served_filling_bytes.value)
        served.add_metric(["through"], counters.served_through_bytes.value)
        yield served
        fetched = CounterMetricFamily(
            "shoal_node_fetched_bytes", "Bytes of shards brought to this node, by where from.", labels=["from"]
        )
        fetched.add_metric(["origin"], counters.origin_bytes.value)
        fetched.add_metric(["peer"], counters.peer_bytes.value)
        yield fetched
        yield CounterMetricFamily(
            "shoal_node_descriptors_passed", "Sealed files handed to local readers.", counters.descriptors.value
        )
        yield CounterMetricFamily(
            "shoal_node_fills_failed", "Reads that a failed fill ended.", counters.fills_failed.value
        )
        corrupt = CounterMetricFamily(
            "shoal_node_shards_corrupt", "Sealed shards dropped because they were damaged, by how.", labels=["cause"]
        )
        dropped = CounterMetricFamily(
            "shoal_node_dropped_bytes", "Bytes of shards dropped to make room, by what let them go.", labels=["because"]
        )
        for family, counts in ((corrupt, counters.shards_corrupt), (dropped, counters.dropped_bytes)):
            for cause, counter in counts.by_cause.items():
                family.add_metric([cause], counter.value)
            yield family
        yield CounterMetricFamily(
            "shoal_node_scrubbed_bytes", "Bytes of sealed shards that the scrubber read.", counters.scrubbed_bytes.value
        )
        yield CounterMetricFamily(
            "shoal_node_rebalanced_bytes",
            "Bytes of shards moved here because this node owns them.",
            counters.rebalanced_bytes.value,
        )
        yield CounterMetricFamily(
            "shoal_node_index_builds", "Indexes of samples that this node began to build.", node.indexes.builds
        )
        yield CounterMetricFamily(
            "shoal_node_relayed_bytes",
            "Bytes that readers had from peers that hold them, of shards on their way here.",
            counters.relayed_bytes.value,
        )
        yield CounterMetricFamily(
            "shoal_node_recent_bytes",
            "Bytes that passed through and came from what another reader had just had, not from their source.",
            node.recent.given.value,
        )
        yield CounterMetricFamily(
            "shoal_node_referrals",
            "Reads of shards on their way here for which the reader was told who holds them.",
            counters.referrals.value,
        )
        yield CounterMetricFamily(
            "shoal_node_disk_failures", "Times that the drive began to fail or to stall.", node.disk.failures
        )
        retries = CounterMetricFamily(
            "shoal_node_origin_retries", "Attempts to read an origin that failed for now.", labels=["dataset"]
        )
        throttles = CounterMetricFamily(
            "shoal_node_origin_throttles", "Those in which the origin asked for less.", labels=["dataset"]
        )
        reads = GaugeMetricFamily("shoal_node_origin_reads", "Reads of an origin under way.", labels=["dataset"])
        window = GaugeMetricFamily("shoal_node_origin_window", "Reads of it that may be at a time.", labels=["dataset"])
        for known in node.library.knowledge.datasets:
            budget = node.budget_of(known.record.name)
            retries.add_metric([known.record.name], budget.retries)
            throttles.add_metric([known.record.name], budget.throttles)
            reads.add_metric([known.record.name], budget.in_flight)
            window.add_metric([known.record.name], budget.width)
        yield from (retries, throttles, reads, window)
        waited = CounterMetricFamily(
            "shoal_node_stream_wait_seconds",
            "Seconds that consumers of streams waited, by what for and for which node, as they told this one.",
            labels=["cause", "node"],
        )
        for (waited_for, node_id), seconds in node.streams.waited.items():
            waited.add_metric([waited_for.name.lower(), node_id], seconds)
        yield waited
        yield CounterMetricFamily(
            "shoal_node_overloaded", "Connections and requests told to come back later.", self._server.overloaded
        )
        gauges = {
            "shoal_node_capacity_bytes": ("Bytes of cache this node offers.", node.store.capacity_bytes),
            "shoal_node_drive_free_bytes": (
                "Bytes that the drive's file system has room for; NaN: not known yet.",
                math.nan if node.disk.free_bytes is None else node.disk.free_bytes,
            ),
            "shoal_node_used_bytes": ("Bytes of sealed and filling shards.", node.store.used_bytes),
            "shoal_node_reserved_bytes": ("Bytes reserved by filling shards.", node.store.reserved_bytes),
            "shoal_node_unread_bytes": (
                "Bytes of prefetched shards nobody has read.",
                node.usage.unread_bytes,
            ),
            "shoal_node_disk_operations": ("Operations on the drive under way.", node.store.operations.count),
            "shoal_node_recent_held_bytes": ("Bytes of what passed through a moment ago.", node.recent.held_bytes),
            "shoal_node_fills": ("Shards that are filling.", node.fills.count),
            "shoal_node_fetches": ("Part fetches in flight.", node.fills.fetches_in_flight),
            "shoal_node_fetches_waiting": ("Parts that wait to be fetched.", node.fills.fetches_waiting),
            "shoal_node_streams": (
                "Streams that run and told this node what they will read.",
                node.streams.count,
            ),
            "shoal_node_needed_bytes": (
                "Bytes of shards that they will read and that are not sealed here.",
                node.streams.missing_bytes,
            ),
            "shoal_node_index_bytes": ("Bytes of indexes of samples on the drive.", node.indexes.kept_bytes),
            "shoal_node_connections": ("Open data connections.", self._server.open_connections),
            "shoal_node_silent_peers": (
                "Other processes that do not answer this node.",
                len(node.transport.health.circuits),
            ),
            "shoal_node_rebalance_short_bytes": (
                "Bytes of shards this node owns, peers hold, and there is no room for.",
                node.rebalance.short_bytes,
            ),
            "shoal_node_rebalancing": ("1 while shards are looked for or moved.", int(node.rebalance.is_busy)),
            "shoal_node_epoch": ("Epoch of the cluster map in use.", node.library.knowledge.cluster_map.epoch),
            "shoal_node_healthy": ("1 while the drive works.", 0 if node.disk.fault else 1),
        }
        for name, (help_sentence, value) in gauges.items():
            yield GaugeMetricFamily(name, help_sentence, value)


def exposition(node: CacheNode, server: HttpServer) -> bytes:
    """The Prometheus text of this moment."""
    return Exposition("shoal-cachenode", NodeCollector(node, server)).text()
