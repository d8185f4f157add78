"""What Prometheus reads of a replica beside the controller's own metrics: its lease, its gate, its requests to the API
server, and, where it leads, the operator's work.

The names are Shoal's and not controller-runtime's (``workqueue_depth``, ``controller_runtime_reconcile_total``). Those
tell how queues of keys fare, each with retries and limits of its own. Here one pass looks at everything
(`shoal_controller.kube.operator`), so the same words would count other things.

The rule: whatever has its state somewhere is read there at each scrape; only what happens is counted here.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal_controller.kube import datasets, prefetches
from shoal_controller.kube.gate import GatedPod
from shoal_controller.kube.informer import Informer
from shoal_controller.kube.lease import Election

#: Of what a pass looks at; `undeclared`: datasets that pods wait for and nobody declared.
KINDS = ("nodes", "dataset", "undeclared", "prefetch", "pod")
#: Of one object in a pass: mostly nothing is to be done, and otherwise the API server is asked.
_RECONCILE_BUCKETS_S = (0.0005, 0.002, 0.01, 0.05, 0.2, 1, 5, 20)
#: What the API server waits for is at most 30 s (``gate.timeoutSeconds``).
_WEBHOOK_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30)
_API_BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10)
#: Pods wait for datasets: seconds to a day.
_WAIT_BUCKETS_S = (1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)


class Backlog:
    """Changes that no finished pass has looked at.

    Attributes:
        depth: how many there are.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.depth = self._under_way = 0
        self._oldest_s = self._oldest_new_s = 0.0  # of all, and of those that came since the pass began

    def add(self) -> None:
        now = self._clock()
        if self.depth == self._under_way:
            self._oldest_new_s = now
        if not self.depth:
            self._oldest_s = now
        self.depth += 1

    def begin(self) -> None:
        """A pass looks at all that is there now."""
        self._under_way = self.depth

    def end(self) -> None:
        """It is over."""
        self.depth -= self._under_way
        self._under_way = 0
        self._oldest_s = self._oldest_new_s

    @property
    def age_s(self) -> float:
        """How long the oldest waits."""
        return self._clock() - self._oldest_s if self.depth else 0.0


class Work(Protocol):
    """What an operator says of itself: see `shoal_controller.kube.operator`."""

    backlog: Backlog
    datasets: Informer
    prefetches: Informer

    @property
    def informers(self) -> tuple[Informer, ...]: ...

    @property
    def drained(self) -> frozenset[str]: ...

    @property
    def failing(self) -> Collection[tuple[str, str]]: ...

    def gated_pods(self) -> Sequence[GatedPod]: ...


class OperatorMetrics(Collector):
    """Of one replica, from its start on.

    Attributes:
        election: in which it takes part.
        work: the operator's; None while another replica leads.
        certificate_end: gives when the gate's certificate ends, in seconds since the epoch; None: there is no gate.
    """

    def __init__(self) -> None:
        self.election: Election | None = None
        self.work: Work | None = None
        self.certificate_end: Callable[[], float] | None = None
        # In no registry of their own: a replica that comes to lead tells the same counts elsewhere.
        self._reconciles = Counter(
            "shoal_operator_reconciles", "Looks at one object, by kind and result.", ["kind", "result"], registry=None
        )
        self._reconcile_s = Histogram(
            "shoal_operator_reconcile_seconds",
            "What a look at one object took.",
            ["kind"],
            buckets=_RECONCILE_BUCKETS_S,
            registry=None,
        )
        self._pass_s = Histogram(
            "shoal_operator_pass_seconds",
            "What a pass over all objects took.",
            buckets=_RECONCILE_BUCKETS_S,
            registry=None,
        )
        self._requests = Counter(
            "shoal_operator_api_requests",
            "Requests to the API server, by verb, resource and HTTP status; 0: no answer.",
            ["verb", "resource", "code"],
            registry=None,
        )
        self._request_s = Histogram(
            "shoal_operator_api_request_seconds",
            "What requests to the API server took, but watches.",
            ["verb"],
            buckets=_API_BUCKETS_S,
            registry=None,
        )
        self._watches = Counter(
            "shoal_operator_watch_restarts",
            "Watches that ended and were begun again, by resource and why.",
            ["resource", "why"],
            registry=None,
        )
        self._released = Histogram(
            "shoal_operator_gate_wait_seconds",
            "How long pods waited that the gate let go, by why it did.",
            ["result"],
            buckets=_WAIT_BUCKETS_S,
            registry=None,
        )
        self._reviews = Counter(
            "shoal_operator_webhook_requests",
            "Pods that the webhook answered for, by how.",
            ["result"],
            registry=None,
        )
        self._review_s = Histogram(
            "shoal_operator_webhook_seconds",
            "What an answer of the webhook took.",
            buckets=_WEBHOOK_BUCKETS_S,
            registry=None,
        )

    # What happens

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """An object was looked at; `result` is ``ok`` or ``error``."""
        self._reconciles.labels(kind, result).inc()
        self._reconcile_s.labels(kind).observe(seconds)

    def passed(self, seconds: float) -> None:
        """A pass is over."""
        self._pass_s.observe(seconds)

    def answered(self, verb: str, resource: str, status: int, seconds: float) -> None:
        """The API server answered, or did not."""
        self._requests.labels(verb, resource, str(status)).inc()
        if verb != "watch":
            self._request_s.labels(verb).observe(seconds)

    def watch_restarted(self, resource: str, why: str) -> None:
        """A watch is over: it ``ended``, it ``expired``, or it ``failed``."""
        self._watches.labels(resource, why).inc()

    def released(self, result: str, waited_s: float) -> None:
        """The gate let a pod go: its data is ``warm``, or it had waited ``long_enough``."""
        self._released.labels(result).observe(waited_s)

    def reviewed(self, result: str, seconds: float) -> None:
        """The webhook answered."""
        self._reviews.labels(result).inc()
        self._review_s.observe(seconds)

    # What is

    def collect(self) -> Iterator[Metric]:
        for counted in (self._requests, self._request_s, self._watches, self._reviews, self._review_s):
            yield from counted.collect()
        if self.election is not None:
            yield from _of_lease(self.election)
        if self.certificate_end is not None:
            yield GaugeMetricFamily(
                "shoal_operator_webhook_certificate_end_timestamp_seconds",
                "When the webhook's certificate ends, in seconds since the epoch.",
                self.certificate_end(),
            )
        if self.work is not None:
            for counted in (self._reconciles, self._reconcile_s, self._pass_s, self._released):
                yield from counted.collect()
            yield from _of_work(self.work)


def _of_lease(election: Election) -> Iterator[Metric]:
    yield GaugeMetricFamily("shoal_operator_leader", "1 while this replica leads.", int(election.is_leader))
    yield CounterMetricFamily(
        "shoal_operator_lease_transitions", "Changes of the leader, as the lease counts them.", election.transitions
    )
    yield GaugeMetricFamily(
        "shoal_operator_lease_age_seconds",
        "Since the lease was renewed, as far as this replica saw it.",
        election.age_s,
    )
    renewals = CounterMetricFamily(
        "shoal_operator_lease_renewals", "Attempts of this replica to renew its lease, by result.", labels=["result"]
    )
    for result, count in election.renewals.items():
        renewals.add_metric([result], count)
    yield renewals


def _of_work(work: Work) -> Iterator[Metric]:
    waiting = "Changes that no pass has looked at yet."
    yield GaugeMetricFamily("shoal_operator_queue_depth", waiting, work.backlog.depth)
    age = "How long the oldest such change waits."
    yield GaugeMetricFamily("shoal_operator_queue_age_seconds", age, work.backlog.age_s)
    failing = {**dict.fromkeys(KINDS, 0), **Counts(kind for kind, _ in work.failing)}
    yield _by("shoal_operator_failing", "Objects whose last look failed, by kind.", "kind", failing)
    watched: Counts[str] = Counts()
    for informer in work.informers:
        watched[informer.resource.plural] += len(informer.objects)
    yield _by("shoal_operator_watched_objects", "Objects that are known, by resource.", "resource", watched)
    found = _phases(work.datasets, datasets.PHASES)
    yield _by("shoal_operator_datasets", "Datasets of the API server, by phase.", "phase", found)
    found = _phases(work.prefetches, prefetches.PHASES)
    yield _by("shoal_operator_prefetches", "Prefetches of the API server, by phase.", "phase", found)
    created = [pod.created_utc_s for pod in work.gated_pods()]
    yield GaugeMetricFamily("shoal_operator_gated_pods", "Pods that wait for their data.", len(created))
    oldest_s = max(0.0, time.time() - min(created)) if created else 0.0
    yield GaugeMetricFamily("shoal_operator_gated_oldest_seconds", "How long the oldest of them waits.", oldest_s)
    drained = "Cache nodes that are drained because Kubernetes says so."
    yield GaugeMetricFamily("shoal_operator_drained_nodes", drained, len(work.drained))


def _by(name: str, sentence: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, sentence, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _phases(informer: Informer, known: tuple[str, ...]) -> dict[str, int]:
    """How many objects are in each phase; one without a status yet is in the first of `known`."""
    statuses = (raw.get("status") or {} for raw in informer.objects.values())
    return {**dict.fromkeys(known, 0), **Counts(str(status.get("phase") or known[0]) for status in statuses)}
