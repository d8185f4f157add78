"""The operator: one pass after another over all that is there (see the package's docstring).

    nodes        cordons, taints and removals → drains
    datasets     declared → registered, kept, refreshed, prefetched, removed; their status
    prefetches   asked → jobs; their status
    pods         gated → let go where their data is

The rule: a pass decides from one state of the core and carries out what follows one object at a time; what fails for
one object is told of that object, tried again, and is nothing to the others.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shoal.errors import DoesNotFit, InvalidRequest, NotFound, ShoalError, SnapshotNotFound
from shoal.snapshot import Snapshot
from shoal_controller import status as cluster_status
from shoal_controller.catalog import Catalog
from shoal_controller.events import (
    DrainRequested,
    PrefetchCancelled,
    PrefetchRequested,
    UndrainRequested,
)
from shoal_controller.kube import datasets, events, gate, nodes, prefetches, prefetching
from shoal_controller.kube.api import DATASETS, NODES, PODS, PREFETCHES, SECRETS, Api, ApiError, Object
from shoal_controller.kube.conditions import Condition, Transition, transitions
from shoal_controller.kube.datasets import Declared, Failure, Work
from shoal_controller.kube.gate import GatedPod
from shoal_controller.kube.informer import Informer
from shoal_controller.kube.metrics import Backlog, OperatorMetrics
from shoal_controller.kube.nodes import KubeNode
from shoal_controller.kube.prefetches import Asked
from shoal_controller.kube.record import KubeRecord
from shoal_controller.model import Dataset, State
from shoal_controller.shell import Shell

log = logging.getLogger(__name__)

#: A pass comes at least so often: what the core knows changes without that anybody says so.
PASS_S = 1.0
#: Figures of a status that move all the time are told at most so often; anything else at once.
FIGURES_S = 2.0
#: A Secret is read again after so long, so that renewed credentials reach the nodes.
SECRET_S = 30.0
#: What a pod waits for is told at first, and then so often.
WAITING_EVENT_S = 600.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator is told at its start.

    Attributes:
        namespace: its own, where the secrets of datasets are.
        taints: keys of taints that drain a node, as patterns.
        gate_namespaces: where pods may be gated; ("",) for all, () for none.
    """

    namespace: str
    gate_namespaces: tuple[str, ...] = ("",)
    taints: tuple[str, ...] = nodes.DRAINING_TAINTS


class Operator:
    """For one event loop, beside a running controller that leads."""

    def __init__(
        self,
        api: Api,
        shell: Shell,
        catalog: Catalog,
        record: KubeRecord,
        settings: Settings,
        metrics: OperatorMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._shell = shell
        self._catalog = catalog
        self._record = record
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._poked = asyncio.Event()
        self.backlog = Backlog()
        restarted = metrics.watch_restarted
        self.datasets = Informer(api, DATASETS, self._poke, on_restart=restarted)
        self.prefetches = Informer(api, PREFETCHES, self._poke, on_restart=restarted)
        self.pods = tuple(
            Informer(
                *(api, PODS, self._poke),
                selector=gate.KEY,
                namespace=namespace,
                trim=gate.trimmed,
                on_restart=restarted,
            )
            for namespace in settings.gate_namespaces
        )
        self.nodes = Informer(api, NODES, self._poke, trim=nodes.trimmed, on_restart=restarted)
        self._works: dict[str, Work] = {}
        self._listings: dict[str, asyncio.Task[Dataset]] = {}
        self._secrets: dict[str, tuple[float, Mapping[str, str] | None, str]] = {}
        self._prefetch_failures: dict[str, str] = {}
        self._told_s: dict[str, float] = {}  # by uid: when figures were last told
        self._waiting_told_s: dict[str, float] = {}  # by uid of a pod
        self._seen_nodes: set[str] = set()
        self._drained = record.drained
        self._logged: dict[tuple[str, str], str] = {}  # by kind and name, of what failed last time

    @property
    def informers(self) -> tuple[Informer, ...]:
        return self.datasets, self.prefetches, self.nodes, *self.pods

    async def run(self) -> None:
        """Go on for ever."""
        async with asyncio.TaskGroup() as tasks:
            for informer in self.informers:
                tasks.create_task(informer.keep())
            tasks.create_task(self._follow_core())
            try:
                for informer in self.informers:
                    await informer.synced.wait()
                while True:
                    self._poked.clear()
                    await self.pass_once()
                    try:
                        async with asyncio.timeout(PASS_S):
                            await self._poked.wait()
                    except TimeoutError:
                        pass
            finally:
                for listing in self._listings.values():
                    listing.cancel()

    async def _follow_core(self) -> None:
        """A new map, dataset or job is looked at at once."""
        version = 0
        while True:
            version, _ = await self._shell.orders.newer_than(version)
            self._poke()

    def _poke(self) -> None:
        """Something has changed."""
        self.backlog.add()
        self._poked.set()

    async def pass_once(self) -> None:
        """Look at everything once."""
        since = time.monotonic()
        self.backlog.begin()
        waiting = self.gated_pods()
        waited_for = {want.dataset for pod in waiting for want in pod.wants}
        kube_nodes = {name: KubeNode.parse(raw) for (_, name), raw in self.nodes.objects.items()}
        await self._guarded("nodes", "", self._drain(kube_nodes))
        for raw in list(self.datasets.objects.values()):
            name = raw["metadata"]["name"]
            await self._guarded("dataset", name, self._dataset(raw, name in waited_for))
        await self._guarded("undeclared", "", self._undeclared(waited_for))
        asked = [Asked.parse(raw) for raw in self.prefetches.objects.values()]
        for raw in list(self.prefetches.objects.values()):
            each = Asked.parse(raw)
            await self._guarded("prefetch", each.key, self._prefetch(raw, each, asked))
        for pod in waiting:
            await self._guarded("pod", f"{pod.namespace}/{pod.name}", self._pod(pod, kube_nodes))
        self._forget()
        self.backlog.end()
        self._metrics.passed(time.monotonic() - since)

    async def _guarded(self, kind: str, name: str, work: Awaitable[None]) -> None:
        since, result, what = time.monotonic(), "ok", (kind, name)
        try:
            await work
            self._logged.pop(what, None)
        except Exception as error:
            # One object that nobody foresaw must not take the others down.
            result = "error"
            # Each second the same sentence is of no use to anybody.
            if self._logged.get(what) != str(error):
                trace = None if isinstance(error, ShoalError) else error
                extra = {kind: name} if name else {}
                log.warning("%s: %s", f"{kind} {name}".strip(), error, exc_info=trace, extra=extra)
                self._logged[what] = str(error)
        self._metrics.reconciled(kind, result, time.monotonic() - since)

    # For metrics

    @property
    def drained(self) -> frozenset[str]:
        """Ids of cache nodes that Kubernetes has drained."""
        return self._drained

    @property
    def failing(self) -> Collection[tuple[str, str]]:
        """Kind and name of what failed when it was looked at last."""
        return self._logged.keys()

    # Nodes

    async def _drain(self, kube_nodes: Mapping[str, KubeNode]) -> None:
        members = self._shell.state.members
        decided = nodes.decide(kube_nodes, self._seen_nodes, members, self._drained, self._settings.taints)
        hosts = {member.node.topology.get("host", "") for member in members.values()}
        self._seen_nodes = set(kube_nodes) | (self._seen_nodes & hosts)  # no longer than somebody may ask
        # Recorded before it is done: a drain of ours that nobody remembers would never end.
        await self._remember(self._drained | decided.ours)
        refusals = []
        for node_id, reason in decided.drain.items():
            try:
                await self._shell.apply(DrainRequested(node_id))
                log.info("cache node %s is drained: %s", node_id, reason, extra={"node": node_id})
            except DoesNotFit as error:
                refusals.append(f"{reason}, but {error}")
        for node_id in decided.undrain:
            await self._shell.apply(UndrainRequested(node_id))
            log.info("cache node %s owns its share again", node_id, extra={"node": node_id})
        await self._remember(decided.ours)
        if refusals:
            raise DoesNotFit("; ".join(refusals))

    async def _remember(self, drained: frozenset[str]) -> None:
        if drained != self._drained:
            await self._shell.with_record(lambda: self._record.keep_drained(drained))
            self._drained = drained

    # Datasets

    async def _dataset(self, raw: Object, is_waited_for: bool) -> None:
        declared, missing_secret = await self._declared(raw)
        name = declared.name
        state, now = self._shell.state, self._clock()
        work = self._works.get(name, Work())
        if declared.is_deleting and (name in self._listings or self._catalog.is_listing(name)):
            if listing := self._listings.get(name):
                listing.cancel()
            return  # what is listed may be registered yet, and must not be left behind
        acts = datasets.decide(
            declared, state.datasets.get(name), state, work, is_waited_for=is_waited_for, now_utc_s=now
        )
        for act in acts:
            match act:
                case datasets.AddFinalizer():
                    await self._set_finalizer(self.datasets, raw, datasets.FINALIZER, wanted=True)
                    return  # its status with the next pass
                case datasets.RemoveFinalizer():
                    await self._set_finalizer(self.datasets, raw, datasets.FINALIZER, wanted=False)
                    log.info("dataset %s is gone", name, extra={"dataset": name})
                    return
                case datasets.Remove():
                    await self._catalog.remove(name)
                    log.info("dataset %s is removed", name, extra={"dataset": name})
                case _ if missing_secret:
                    pass  # with other credentials than those that it has, nothing is begun
                case datasets.Add(definition):
                    self._list(declared, self._catalog.add(definition))
                case datasets.Refresh(request):
                    self._list(declared, self._catalog.refresh(name), request)
                case datasets.Change(change):
                    await self._catalog.change(name, change)
                case datasets.Prefetch(snapshot):
                    await self._start(f"eager-{secrets.token_hex(4)}", name, snapshot, "")
        state = self._shell.state
        status, wanted = datasets.status_of(
            declared,
            state.datasets.get(name),
            state,
            self._works.get(name, Work()),
            missing_secret=missing_secret,
            now_utc_s=now,
        )
        await self._tell(self.datasets, raw, status, wanted)

    async def _declared(self, raw: Object) -> tuple[Declared, str]:
        """The object parsed, with its credentials; and why they cannot be had."""
        declared = Declared.parse(raw)
        if not declared.secret or declared.is_deleting:
            return declared, ""
        data, missing = await self._secret(declared.secret)
        if data is None:
            return declared, missing
        try:
            return declared.with_secret(data), ""
        except InvalidRequest as error:
            return declared, str(error)

    async def _secret(self, name: str) -> tuple[Mapping[str, str] | None, str]:
        read_s, data, missing = self._secrets.get(name, (float("-inf"), None, ""))
        # One that is missing is looked for sooner: somebody waits for it.
        if self._clock() - read_s < (SECRET_S if data is not None else SECRET_S / 10):
            return data, missing
        namespace = self._settings.namespace
        try:
            data, missing = (await self._api.get(SECRETS, name, namespace=namespace)).get("data") or {}, ""
        except ApiError as error:
            if error.is_missing:
                data, missing = (
                    None,
                    (
                        f"there is no Secret {name} in namespace {namespace}: make it there, with a key for each "
                        "storage option (key, secret, token, …)"
                    ),
                )
            elif data is None:
                missing = f"Secret {name} in namespace {namespace} cannot be read: {error}"
        self._secrets[name] = self._clock(), data, missing
        return data, missing

    def _list(self, declared: Declared, listing: Coroutine[Any, Any, Dataset], request: str = "") -> None:
        """Add or refresh in the background: an origin takes as long as it takes."""
        before = self._works.get(declared.name, Work())
        self._works[declared.name] = replace(before, is_listing=True)
        task = self._listings[declared.name] = asyncio.create_task(listing)
        task.add_done_callback(partial(self._listed, declared, before, request))

    def _listed(self, declared: Declared, before: Work, request: str, task: asyncio.Task[Dataset]) -> None:
        name = declared.name
        del self._listings[name]
        self._poke()
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            self._works[name] = before
        elif error is None:
            self._works[name] = replace(before, failure=None, done_request=request or before.done_request)
        else:
            trace = None if isinstance(error, ShoalError) else error
            log.warning("dataset %s: %s", name, error, exc_info=trace, extra={"dataset": name})
            told = error if isinstance(error, ShoalError) else ShoalError(repr(error))
            failure = Failure.of(told, declared.generation, before.failure, self._clock())
            self._works[name] = replace(before, failure=failure)

    async def _undeclared(self, waited_for: set[str]) -> None:
        """Datasets that were added by hand, and that a pod waits for."""
        state = self._shell.state
        for name in sorted(waited_for):
            dataset = state.datasets.get(name)
            if dataset is None or ("", name) in self.datasets.objects:
                continue
            if prefetching.is_due(dataset, state, self._clock()):
                await self._start(f"gate-{secrets.token_hex(4)}", name, dataset.newest.digest, "")

    async def _start(self, job_id: str, dataset: str, snapshot: str, prefix: str) -> None:
        await self._shell.apply(PrefetchRequested(job_id, dataset, snapshot, prefix))

    # Prefetches

    async def _prefetch(self, raw: Object, asked: Asked, others: list[Asked]) -> None:
        now = self._clock()
        failure = self._prefetch_failures.get(asked.uid, "")
        for act in prefetches.decide(asked, others, self._shell.state, failure=failure, now_utc_s=now):
            match act:
                case prefetches.AddFinalizer():
                    await self._set_finalizer(self.prefetches, raw, prefetches.FINALIZER, wanted=True)
                    return
                case prefetches.RemoveFinalizer():
                    await self._set_finalizer(self.prefetches, raw, prefetches.FINALIZER, wanted=False)
                    return
                case prefetches.Delete():
                    await self._api.delete(PREFETCHES, asked.name, namespace=asked.namespace, uid=asked.uid)
                    return
                case prefetches.Cancel(job_ids):
                    for job_id in job_ids:
                        await self._shell.apply(PrefetchCancelled(job_id))
                case prefetches.Start(snapshot, paths):
                    failure = await self._begin(asked, snapshot, paths)
        status, wanted = prefetches.status_of(asked, others, self._shell.state, failure=failure, now_utc_s=now)
        await self._tell(self.prefetches, raw, status, wanted)

    async def _begin(self, asked: Asked, snapshot: str, paths: Mapping[str, str]) -> str:
        """Start the jobs; why that can never be, or ""."""
        path = self._record.snapshot_path(snapshot)
        if not path.exists():
            return ""  # it is on its way here
        try:
            for prefix in paths.values():
                await asyncio.to_thread(_check_matches, path, asked.dataset, prefix)
            for job_id, prefix in paths.items():
                await self._start(job_id, asked.dataset, snapshot, prefix)
        except (SnapshotNotFound, NotFound) as error:
            self._prefetch_failures[asked.uid] = str(error)
            return str(error)
        return ""

    # Pods

    def gated_pods(self) -> list[GatedPod]:
        found = (gate.gated(raw) for informer in self.pods for raw in informer.objects.values())
        return [pod for pod in found if pod is not None]

    async def _pod(self, pod: GatedPod, kube_nodes: Mapping[str, KubeNode]) -> None:
        state, now = self._shell.state, self._clock()
        waits_for = gate.unmet(pod, _percents(state))
        if waits_for and not gate.has_waited_enough(pod, now):
            if now - self._waiting_told_s.get(pod.uid, float("-inf")) >= WAITING_EVENT_S:
                self._waiting_told_s[pod.uid] = now
                sentence = f"waits for data: {'; '.join(waits_for)}"
                await self._event(pod.raw, PODS.kind, Transition("WaitingForData", sentence, False))
            return
        digests = [state.datasets[want.dataset].newest.digest for want in pod.wants if want.dataset in state.datasets]
        change = gate.release_patch(pod, nodes.held_bytes(state.members, kube_nodes, digests))
        try:
            changed = await self._api.patch(PODS, pod.name, change, namespace=pod.namespace)
        except ApiError as error:
            if error.is_conflict or error.is_missing:
                return  # it is another one by now; the watch says which
            raise
        for informer in self.pods:
            if informer.namespace in ("", pod.namespace):
                informer.put(changed)
        self._metrics.released("long_enough" if waits_for else "warm", now - pod.created_utc_s)
        sentence = (
            f"goes with cold data after its longest wait: {'; '.join(waits_for)}" if waits_for else "data is warm"
        )
        await self._event(pod.raw, PODS.kind, Transition("Released", sentence, bool(waits_for)))

    # Objects

    async def _set_finalizer(self, informer: Informer, raw: Object, finalizer: str, *, wanted: bool) -> None:
        metadata = raw["metadata"]
        others = [known for known in metadata.get("finalizers") or [] if known != finalizer]
        change = {
            "metadata": {
                "finalizers": [*others, finalizer] if wanted else others,
                "resourceVersion": metadata["resourceVersion"],
            }
        }
        await self._patch(informer, raw, change)

    async def _tell(self, informer: Informer, raw: Object, status: Mapping[str, Any], wanted: list[Condition]) -> None:
        """Write a status where it is another one, and an event for each condition that is."""
        before = raw.get("status") or {}
        if status == before:
            return
        uid, now = raw["metadata"]["uid"], self._clock()
        if _essence(status) == _essence(before) and now - self._told_s.get(uid, float("-inf")) < FIGURES_S:
            return
        gone = {key: None for key in before if key not in status}
        if await self._patch(informer, raw, {"status": {**status, **gone}}, subresource="status"):
            self._told_s[uid] = now
            for transition in transitions(before.get("conditions") or [], wanted):
                await self._event(raw, informer.resource.kind, transition)

    async def _patch(
        self, informer: Informer, raw: Object, change: Mapping[str, Any], *, subresource: str = ""
    ) -> bool:
        """False where the object is another one by now, which the watch will tell of."""
        metadata = raw["metadata"]
        namespace = metadata.get("namespace", "")
        try:
            changed = await self._api.patch(
                informer.resource, metadata["name"], change, namespace=namespace, subresource=subresource
            )
        except ApiError as error:
            if error.is_missing or error.is_conflict:
                return False
            raise
        # The answer to the removal of the last finalizer is of an object that is gone.
        if changed["metadata"].get("finalizers") or "deletionTimestamp" not in changed["metadata"]:
            informer.put(changed)
        return True

    async def _event(self, raw: Mapping[str, Any], kind: str, transition: Transition) -> None:
        about = {"kind": kind, "apiVersion": raw.get("apiVersion") or _API_VERSIONS[kind], "metadata": raw["metadata"]}
        await events.post(self._api, about, transition)

    def _forget(self) -> None:
        """What is kept of objects that are gone."""
        names = {name for _, name in self.datasets.objects}
        for name in [name for name in self._works if name not in names]:
            if listing := self._listings.get(name):
                listing.cancel()
            else:
                del self._works[name]
        for kind, name in list(self._logged):
            if name and not self._is_there(kind, name):
                del self._logged[kind, name]
        uids = set(self._uids())
        for kept in (self._prefetch_failures, self._told_s, self._waiting_told_s):
            for uid in [uid for uid in kept if uid not in uids]:
                del kept[uid]

    def _is_there(self, kind: str, name: str) -> bool:
        """Whether an object of that kind and name is known; ``NAMESPACE/NAME`` where it has a namespace."""
        informers = {"dataset": (self.datasets,), "prefetch": (self.prefetches,), "pod": self.pods}[kind]
        namespace, _, rest = name.rpartition("/")
        return any((namespace, rest) in informer.objects for informer in informers)

    def _uids(self) -> Iterator[str]:
        for informer in self.informers:
            for raw in informer.objects.values():
                yield raw["metadata"]["uid"]


_API_VERSIONS = {resource.kind: resource.api_version for resource in (DATASETS, PREFETCHES, PODS)}


def _percents(state: State) -> dict[str, int]:
    """How much of each dataset is cached."""
    return {
        name: prefetching.percent(cluster_status.cached_bytes(dataset, state), dataset.newest.total_bytes)
        for name, dataset in state.datasets.items()
    }


def _essence(status: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a status is told at once."""
    conditions = [(c.get("type"), c.get("status"), c.get("reason")) for c in status.get("conditions") or []]
    return status.get("phase"), status.get("observedGeneration"), status.get("snapshot"), conditions


def _check_matches(path: Any, dataset: str, prefix: str) -> None:
    """Raises NotFound where no object lies under `prefix`. Blocks on the disk."""
    if not Snapshot.open(path).rows_under(prefix):
        raise NotFound(
            f"no object of dataset {dataset} has a path that begins with {prefix!r}: 'shoal ls shoal://{dataset}' "
            "shows what there is; paths are prefixes, not patterns"
        )
