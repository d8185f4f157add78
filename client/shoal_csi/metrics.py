"""What Prometheus reads of a CSI driver: its own calls, the mounts of its node, and what their daemons have counted.

    calls             counted where they are answered (`shoal_csi.refusals`)
    mounts, volumes   looked up at each scrape, as 'shoal mount' does
    shoal_mount_…     by dataset, of all mounts of the node: `shoal_csi.numbers`, in sums (`shoal_csi.totals`)

The rule: a scrape asks no daemon and no mount, so it is answered whatever hangs.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import Counter as CallCounter
from prometheus_client import Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.wire.process_metrics import Exposition
from shoal_csi import mounts, numbers, rundir, tier_ledger, totals
from shoal_csi.rundir import Record
from shoal_csi.totals import Totals, dataset_of

PROGRAM = "shoal-csi"
#: Of a mount on a busy node, up to what kubelet waits for.
_CALL_BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

#: Counters of mounts: name, help, the label beside `dataset`, and the numbers that are its values.
_COUNTED: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (
    (
        "daemon_starts",
        "Daemons that began to serve mounts, the first ones and upgrades too.",
        "",
        {"": totals.STARTS},
    ),
    ("daemon_restarts", "Daemons that ended unasked and were replaced.", "", {"": totals.RESTARTS}),
    ("takeovers", "Supervisors that went on with a mount of another one.", "", {"": totals.TAKEOVERS}),
    ("requests", "Requests that daemons took from the kernel.", "", {"": "requests"}),
    (
        "opens",
        "Files opened, by who reads them: the kernel from the node's file or the local tier's, or the daemon.",
        "way",
        {"node": "opens_node", "tier": "opens_tier", "read": "opens_read"},
    ),
    ("reads", "READ requests, for what the kernel does not read by itself.", "", {"": "reads"}),
    ("read_bytes", "Bytes that READ requests asked for.", "", {"": "read_bytes"}),
    (
        "received_bytes",
        "Bytes that daemons had for READ requests, by where from; what was fetched ahead counts.",
        "from",
        {"local": "received_local_bytes", "peer": "received_peer_bytes", "origin": "received_origin_bytes"},
    ),
    ("ahead_bytes", "Bytes that were fetched before they were asked for.", "", {"": "ahead_bytes"}),
    (
        "errors",
        "Requests that failed because bytes could not be had, by errno.",
        "errno",
        {name.removeprefix("errors_").upper(): name for name in numbers.COUNTERS if name.startswith("errors_")},
    ),
    ("tier_brought", "Objects brought into the local tier.", "", {"": "tier_brought"}),
    ("tier_brought_bytes", "Bytes brought into the local tier.", "", {"": "tier_brought_bytes"}),
    ("tier_damaged", "Objects of the local tier that were damaged and dropped.", "", {"": "tier_damaged"}),
    ("tier_dropped", "Objects of the local tier that made room.", "", {"": "tier_dropped"}),
    ("tier_dropped_bytes", "Bytes of the local tier that made room.", "", {"": "tier_dropped_bytes"}),
)
#: What `MountMetrics.count_kept` is told.
KEPT_HOW = ("revived", "supervised", "taken_over", "mounted_anew")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_GAUGES = {
    "open_files": "Files of mounts that are open, but those that are opened without the daemon.",
    "waiting": "Requests that wait for nodes.",
    "window_bytes": "Bytes that daemons hold of what was fetched ahead.",
}


class CallMetrics:
    """Of the driver's own gRPC calls."""

    def __init__(self, exposition: Exposition) -> None:
        registry = exposition.registry
        self._calls = CallCounter(
            "shoal_csi_calls", "Finished gRPC calls, by method and status.", ["method", "code"], registry=registry
        )
        self._seconds = Histogram(
            "shoal_csi_call_seconds",
            "What finished gRPC calls took.",
            ["method"],
            buckets=_CALL_BUCKETS_S,
            registry=registry,
        )
        self._under_way = Gauge(
            "shoal_csi_calls_under_way", "Calls that are not answered yet.", ["method"], registry=registry
        )

    def begun(self, method: str) -> Callable[[str], None]:
        """A call begins; call what this returns with its status when it ends."""
        since = time.monotonic()
        self._under_way.labels(method).inc()

        def ended(code: str) -> None:
            self._under_way.labels(method).dec()
            self._calls.labels(method, code).inc()
            self._seconds.labels(method).observe(time.monotonic() - since)

        return ended


class MountMetrics(Collector):
    """Of the mounts of one node. Thread-safe.

    Args:
        folder: in which they are.
        tier, tier_limit_bytes: the node's local tier, where there is one.

    Attributes:
        count_volumes: gives how many volumes are published.
    """

    def __init__(self, folder: Path, tier: Path | None, tier_limit_bytes: int) -> None:
        self._folder, self._tier, self._tier_limit_bytes = str(folder), tier, tier_limit_bytes
        self._lock = threading.Lock()  # guards _totals, from before numbers are read until they are added
        self._totals = Totals()
        self._kept: Counter[str] = Counter()
        self.count_volumes: Callable[[], int] = lambda: 0
        for record in self._records():
            self._totals.begin_with(record, numbers.read(record))

    def count_kept(self, how: str) -> None:
        """A mount was looked after: `how` is one of `KEPT_HOW`."""
        self._kept[how] += 1

    def before_end(self, mountpoint: str) -> None:
        """A mount is about to be unmounted, and its numbers with it."""
        with self._lock:
            for record in self._records():
                if record.mountpoint == mountpoint:
                    self._totals.add(record, numbers.read(record))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            seen = [(record, numbers.read(record)) for record in self._records()]
            for record, found in seen:
                self._totals.add(record, found)
            self._totals.keep_only({record.mountpoint for record, _ in seen})
            sums = self._totals.by_dataset()
        yield from self._states()
        yield from _counters(sums)
        yield from _gauges(seen)
        yield from self._tier_gauges()

    def _records(self) -> Iterator[Record]:
        return (record for _, record in rundir.records() if record.mountpoint.startswith(f"{self._folder}/"))

    def _states(self) -> Iterator[Metric]:
        listed = mounts.listed()
        found = Counter(each["state"] for each in listed if each["mountpoint"].startswith(f"{self._folder}/"))
        states = GaugeMetricFamily("shoal_csi_mounts", "Mounts of datasets on the node, by state.", labels=["state"])
        for state in mounts.STATES:
            states.add_metric([state], found[state])
        yield states
        volumes = self.count_volumes()
        yield GaugeMetricFamily("shoal_csi_volumes", "Volumes of pods that are published on the node.", volumes)
        kept = CounterMetricFamily(
            "shoal_csi_mounts_kept", "Mounts that lost processes and were looked after, by how.", labels=["how"]
        )
        for how in KEPT_HOW:
            kept.add_metric([how], self._kept[how])
        yield kept

    def _tier_gauges(self) -> Iterator[Metric]:
        size_bytes, files = (0, 0) if self._tier is None else tier_ledger.counts(self._tier)
        limit = 0 if self._tier is None else self._tier_limit_bytes
        yield GaugeMetricFamily("shoal_csi_tier_bytes", "Bytes that the node's local tier has allocated.", size_bytes)
        yield GaugeMetricFamily("shoal_csi_tier_objects", "Whole objects in the node's local tier.", files)
        yield GaugeMetricFamily("shoal_csi_tier_limit_bytes", "What the tier may allocate; 0: there is none.", limit)


def _counters(sums: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
    for name, sentence, label, values in _COUNTED:
        labels = ["dataset", label] if label else ["dataset"]
        family = CounterMetricFamily(f"shoal_mount_{name}", sentence, labels=labels)
        for dataset, of_dataset in sums.items():
            for value, number in values.items():
                family.add_metric([dataset, value] if label else [dataset], of_dataset.get(number, 0))
        yield family
    waited = CounterMetricFamily(
        "shoal_mount_read_wait_seconds", "Seconds that READs took which had to wait.", labels=["dataset"]
    )
    for dataset, of_dataset in sums.items():
        waited.add_metric([dataset], of_dataset.get("read_wait_us", 0) / 1e6)
    yield waited


def _gauges(seen: Sequence[tuple[Record, Mapping[str, int] | None]]) -> Iterator[Metric]:
    now: dict[str, Counter[str]] = {}
    failures: Counter[str] = Counter()
    resident: Counter[tuple[str, str]] = Counter()
    for record, found in seen:
        dataset = dataset_of(record)
        now.setdefault(dataset, Counter()).update({name: (found or {}).get(name, 0) for name in _GAUGES})
        failures[dataset] = max(failures[dataset], record.failures)
        daemon_pid = None if record.daemon is None else record.daemon.pid
        pids = {"supervisor": record.supervisor_pid, "daemon": daemon_pid, "spare": record.spare_pid}
        for process, pid in pids.items():
            resident[dataset, process] += resident_bytes(pid) if record.is_of_here else 0
    for name, sentence in _GAUGES.items():
        family = GaugeMetricFamily(f"shoal_mount_{name}", sentence, labels=["dataset"])
        for dataset, counts in now.items():
            family.add_metric([dataset], counts[name])
        yield family
    failing = GaugeMetricFamily(
        "shoal_mount_daemon_failures",
        "Daemons in a row that were never well, of the dataset's mount that fares worst.",
        labels=["dataset"],
    )
    for dataset, count in failures.items():
        failing.add_metric([dataset], count)
    yield failing
    held = GaugeMetricFamily(
        "shoal_mount_resident_bytes", "Memory of the processes that serve mounts.", labels=["dataset", "process"]
    )
    for (dataset, process), size_bytes in resident.items():
        held.add_metric([dataset, process], size_bytes)
    yield held


def resident_bytes(pid: int | None) -> int:
    """What a process has in memory, shared pages too; 0 where it is not there."""
    if pid is None:
        return 0
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * _PAGE_BYTES
