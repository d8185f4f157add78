"""Between the controller's values and the messages of ``shoal.proto``. Pure.

The rule: what comes in is checked here, so that the core meets only possible values; what goes out carries storage
options in clear in `orders`, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

from shoal import origin
from shoal.cluster_map import Node
from shoal.errors import InvalidRequest
from shoal.wire import shoal_pb2 as pb
from shoal_controller import membership, status
from shoal_controller.model import (
    MAX_NUMBER,
    MAX_REPORTED_BYTES,
    OK,
    Dataset,
    Job,
    Member,
    Moment,
    PolicyChange,
    Report,
    Share,
    State,
)


def node_from_wire(message: pb.Node) -> Node:
    """A node as it describes itself.

    Raises:
        InvalidRequest: no node can be so.
    """
    host, colon, port = message.address.rpartition(":")
    if not message.id or not message.id.isprintable() or len(message.id) > 253:
        raise InvalidRequest(f"{message.id!r} is no node id: 1 to 253 printable characters are")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidRequest(f"{message.address!r} is no address of node {message.id}: write HOST:PORT")
    if message.weight > MAX_NUMBER:
        raise InvalidRequest(f"node {message.id} offers {message.weight} bytes of cache, which cannot be")
    return Node(message.id, message.address, message.weight, dict(message.topology))


def report_from_wire(message: pb.NodeReport) -> Report:
    """A heartbeat.

    Raises:
        InvalidRequest: its node cannot be, or what it holds. Whether its epoch can is the core's to say.
    """
    node = node_from_wire(message.node)
    for size_bytes in _sizes(message):
        if size_bytes > MAX_REPORTED_BYTES:
            raise InvalidRequest(f"node {node.id} reports {size_bytes} bytes, which no node holds")
    return Report(
        node=node,
        epoch=message.epoch,
        used_bytes=message.used_bytes,
        capacity_bytes=message.capacity_bytes,
        condition=message.condition or OK,
        version=message.version,
        cached_bytes={cached.snapshot: cached.bytes_primary for cached in message.cached},
        held_bytes={cached.snapshot: cached.bytes_held for cached in message.cached},
        shares={
            share.job_id: Share(
                epoch=share.epoch,
                bytes_total=share.bytes_total,
                bytes_done=share.bytes_done,
                bytes_short=share.bytes_short,
                is_complete=share.complete,
                failure=share.failure,
            )
            for share in message.prefetches
        },
        is_leaving=message.leaving,
        handover_bytes=message.handover_bytes if message.HasField("handover_bytes") else None,
        short_bytes=message.short_bytes,
    )


def _sizes(message: pb.NodeReport) -> Iterator[int]:
    yield from (message.used_bytes, message.capacity_bytes, message.handover_bytes, message.short_bytes)
    for cached in message.cached:
        yield from (cached.bytes_primary, cached.bytes_held)
    for share in message.prefetches:
        yield from (share.bytes_total, share.bytes_done, share.bytes_short)


def policy_from_wire(message: pb.SetDatasetRequest) -> PolicyChange:
    """What of a dataset's policy is to be another."""
    return PolicyChange(
        replicas=message.replicas if message.HasField("replicas") else None,
        is_pinned=message.pinned if message.HasField("pinned") else None,
        quota_bytes=message.quota_bytes if message.HasField("quota_bytes") else None,
        is_direct=message.direct if message.HasField("direct") else None,
    )


def node_to_wire(node: Node) -> pb.Node:
    return pb.Node(
        id=node.id, address=node.address, weight=node.weight, topology=dict(node.topology), state=str(node.state)
    )


def dataset_to_wire(dataset: Dataset, state: State) -> pb.Dataset:
    """A dataset for people: secrets are redacted."""
    message = _dataset(dataset)
    message.cached_bytes = status.cached_bytes(dataset, state)
    message.storage_options = json.dumps(origin.redact(origin.parse_options(dataset.storage_options)))
    return message


def _dataset(dataset: Dataset) -> pb.Dataset:
    return pb.Dataset(
        name=dataset.name,
        origin=dataset.origin,
        endpoint=dataset.endpoint,
        shard_size=dataset.shard_size,
        replicas=dataset.replicas,
        snapshot=dataset.newest.digest,
        objects=dataset.newest.objects,
        bytes=dataset.newest.total_bytes,
        snapshots=dataset.digests,
        created_at=_time(dataset.created_utc_s),
        refreshed_at=_time(dataset.refreshed_utc_s),
        adhoc=dataset.is_adhoc,
        pinned=dataset.is_pinned,
        quota_bytes=dataset.quota_bytes,
        direct=dataset.is_direct,
    )


def job_to_wire(job: Job) -> pb.PrefetchJob:
    return pb.PrefetchJob(
        id=job.id,
        dataset=job.dataset,
        snapshot=job.snapshot,
        prefix=job.prefix,
        state=str(job.state),
        bytes_total=job.bytes_total,
        bytes_done=job.bytes_done,
        reason=job.reason,
        created_at=_time(job.created_utc_s),
        finished_at="" if job.finished_utc_s is None else _time(job.finished_utc_s),
    )


def orders(state: State, *, controller_http: str, cluster_id: str) -> pb.Orders:
    """Everything that nodes are to know; the same for all of them."""
    message = pb.Orders(
        map=pb.ClusterMap(epoch=state.map.epoch, nodes=map(node_to_wire, state.map.nodes)),
        prefetches=[
            pb.PrefetchOrder(
                job_id=job.id, dataset=job.dataset, snapshot=job.snapshot, prefix=job.prefix, run=job.may_run
            )
            for job in state.jobs.values()
            if not job.is_finished
        ],
        controller_http=controller_http,
        cluster_id=cluster_id,
    )
    for name in sorted(state.datasets):
        dataset = state.datasets[name]
        told = _dataset(dataset)
        told.storage_options = dataset.storage_options  # in clear: nodes read the origin
        message.datasets.append(told)
    return message


def status_to_wire(state: State, now: Moment, *, version: str) -> pb.Status:
    """What ``shoal status`` shows."""
    return pb.Status(
        epoch=state.map.epoch,
        nodes=[node_status_to_wire(member, state, now) for _, member in sorted(state.members.items())],
        datasets=[dataset_to_wire(state.datasets[name], state) for name in sorted(state.datasets)],
        jobs=[job_to_wire(job) for job in jobs_for_people(state)],
        warnings=status.warnings(state),
        version=version,
    )


def jobs_for_people(state: State, *, finished: int = 5) -> list[Job]:
    """The unfinished jobs and the last few finished ones, the newest first."""
    newest_first = sorted(state.jobs.values(), key=lambda job: (job.created_utc_s, job.id), reverse=True)
    done = [job for job in newest_first if job.is_finished]
    done.sort(key=lambda job: job.finished_utc_s or 0.0, reverse=True)
    return [job for job in newest_first if not job.is_finished] + done[:finished]


def node_status_to_wire(member: Member, state: State, now: Moment) -> pb.NodeStatus:
    report = member.report
    waits_for = status.handover_waits_for(member, state)
    return pb.NodeStatus(
        node=node_to_wire(member.node),
        used_bytes=report.used_bytes if report else 0,
        capacity_bytes=report.capacity_bytes if report else 0,
        condition=report.condition if report else "",
        seconds_since_report=max(0.0, now.monotonic_s - member.heard_s),
        version=report.version if report else "",
        handover_bytes=status.handover_bytes(member, state),
        short_bytes=report.short_bytes if report else 0,
        draining=member.is_draining,
        drained=member.is_draining and not waits_for,
        waits_for=waits_for,
        contest=membership.contest(member),
    )


def _time(utc_s: float) -> str:
    """RFC 3339."""
    return datetime.fromtimestamp(utc_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
