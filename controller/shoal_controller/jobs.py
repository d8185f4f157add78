"""Prefetch jobs: what one is, given what its nodes say of their shares. Pure.

A job names (snapshot, prefix); each node works out its own share from that and the map, so a share counts only for the
epoch that it was worked out from. While some owner of the present map has not answered, the job keeps the figures it
had and says whom it waits for.

    planning → refused      some owner lacks space
    planning → running      every owner has answered, and it fits
    running  → done         every owner of the present map has verified its share
    any      → failed       an owner's retries ended, or nobody answered in time

The rule: a job is `done` only by the word of every owner of the map that is in force at that moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shoal import sizes
from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal_controller.model import Job, JobState, Member, Moment, Policy, Share


def advance(job: Job, cluster_map: ClusterMap, members: Mapping[str, Member], now: Moment, policy: Policy) -> Job:
    """The job after a report, a new map, or time: an equal one where nothing changed."""
    if job.is_finished:
        return job
    owners = cluster_map.owners()
    shares = {node.id: share for node in owners if (share := _share(members[node.id], job, cluster_map.epoch))}
    for node_id, share in shares.items():
        if share.failure:
            return finish(job, JobState.FAILED, f"{job.what} failed on node {node_id}: {share.failure}", now)
    silent = [node.id for node in owners if node.id not in shares]
    if silent or not owners:
        return _wait(job, silent, cluster_map, now, policy)
    job = replace(
        job,
        bytes_total=sum(share.bytes_total for share in shares.values()),
        bytes_done=sum(min(share.bytes_done, share.bytes_total) for share in shares.values()),
        reason="",
        is_paused=False,
    )
    short = {node.id: node for node in owners if shares[node.id].bytes_short > 0}
    if short:
        return _lacks_space(job, short, shares, cluster_map, members, now)
    if all(share.is_complete for share in shares.values()):
        return finish(replace(job, bytes_done=job.bytes_total), JobState.DONE, "", now)
    return replace(job, state=JobState.RUNNING)


def finish(job: Job, state: JobState, reason: str, now: Moment) -> Job:
    return replace(job, state=state, reason=reason, finished_utc_s=now.utc_s, is_paused=False)


def _share(member: Member, job: Job, epoch: int) -> Share | None:
    share = member.report.shares.get(job.id) if member.report else None
    return share if share and share.epoch == epoch else None


def _wait(job: Job, silent: list[str], cluster_map: ClusterMap, now: Moment, policy: Policy) -> Job:
    if job.state is JobState.PLANNING and now.monotonic_s - job.planning_since_s >= policy.planning_s:
        reason = (
            f"{job.what} was not started: within {policy.planning_s:g} s {_names(silent)} did not say whether the "
            "share of it fits: see the log there, and try again"
            if silent
            else f"{job.what} was not started: no cache node is up; start one, and try again"
        )
        return finish(job, JobState.FAILED, reason, now)
    reason = (
        f"waits for {_names(silent)} to work out the share of map epoch {cluster_map.epoch}"
        if silent
        else "waits for a cache node: none is up"
    )
    return replace(job, reason=reason)


def _lacks_space(
    job: Job,
    short: Mapping[str, Node],
    shares: Mapping[str, Share],
    cluster_map: ClusterMap,
    members: Mapping[str, Member],
    now: Moment,
) -> Job:
    needs = _needs(short, shares, members)
    remedy = "free space there, add nodes, or prefetch a smaller prefix"
    if job.state is JobState.PLANNING:
        return finish(job, JobState.REFUSED, f"{job.what} needs {needs}: {remedy}", now)
    # The cluster shrank under a running job. A node that is down may be back in a minute, so only give up without one.
    down = [node.id for node in cluster_map.nodes if node.state is NodeState.DOWN]
    if down:
        return replace(job, is_paused=True, reason=f"needs {needs} while {_names(down)} is down: waits for it")
    return finish(job, JobState.FAILED, f"{job.what} no longer fits: it needs {needs}: {remedy}", now)


def _needs(short: Mapping[str, Node], shares: Mapping[str, Share], members: Mapping[str, Member]) -> str:
    worst = max(short, key=lambda node_id: (shares[node_id].bytes_short, node_id))
    report, share = members[worst].report, shares[worst]
    assert report is not None, "a share comes with a report"
    others = len(short) - 1
    return (
        f"{sizes.format(share.bytes_short)} more on node {worst} (capacity {sizes.format(report.capacity_bytes)}, "
        f"used {sizes.format(report.used_bytes)}, its share {sizes.format(share.bytes_total)})"
        + (f" and space on {others} more node{'s' if others > 1 else ''}" if others else "")
    )


def _names(node_ids: list[str]) -> str:
    shown = ", ".join(node_ids[:5]) + (f" and {len(node_ids) - 5} more" if len(node_ids) > 5 else "")
    return f"node{'s' if len(node_ids) > 1 else ''} {shown}"
