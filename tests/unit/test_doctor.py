"""What `shoal doctor` makes of facts: without a cluster, a socket or a clock; and what becomes of one question."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli.root import main
from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.datasets import DatasetRecord
from shoal.doctor import asking, clocks, diagnosis, looking, page, versions
from shoal.doctor.facts import (
    Clock,
    Endpoint,
    Facts,
    Machine,
    MountFact,
    NodeFacts,
    OriginFact,
    Process,
    Silence,
    SnapshotFact,
    Socket,
    Told,
    ToldJob,
    ToldNode,
    Trouble,
    Untold,
)
from shoal.doctor.findings import Finding, Outcome, listed
from shoal.errors import OriginChanged, OriginNotFound
from shoal.origin import check, open_origin
from shoal.snapshot import Snapshot, write

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
MAP = ClusterMap(7, tuple(Node(f"n{i}", f"10.0.0.{i}:7450", 100 * GIB, {"host": f"h{i}"}) for i in (1, 2, 3)))
EXACT = Clock(0.0, 0.5)


def process(address: str, node_id: str = "", *, cluster_map: ClusterMap = MAP, **more: Any) -> Process:
    known = Process(
        address=address,
        role="cachenode" if node_id else "controller",
        version="0.1.0",
        cluster_id="c",
        cluster_map=cluster_map,
        node_id=node_id,
        controller_http="ctl:7441",
        controller_grpc="ctl:7440",
        condition="ok" if node_id else None,
        clock=EXACT,
    )
    return dataclasses.replace(known, **more)


def node(number: int, **more: Any) -> NodeFacts:
    known = MAP.nodes[number - 1]
    metrics = {"shoal_node_capacity_bytes": 100.0 * GIB, "shoal_node_drive_free_bytes": 200.0 * GIB}
    seen = NodeFacts(known, process(known.address, known.id), drive_hangs=False, metrics=metrics, is_here=False)
    return dataclasses.replace(seen, **more)


def told(number: int, **more: Any) -> ToldNode:
    return dataclasses.replace(
        ToldNode(f"n{number}", "0.1.0", "ok", 0, 100 * GIB, 0, drained=False, waits_for="", contest=""), **more
    )


def dataset(name: str = "set", **more: Any) -> DatasetRecord:
    known = DatasetRecord(name, f"s3://b/{name}", "", 256 << 20, 1, "d" * 32, ("d" * 32,), 10, GIB)
    return dataclasses.replace(known, **more)


MACHINE = Machine("6.12.1-generic", "me", (65536, 65536), GIB, has_torch=True, has_fuse=True, may_mount=True, mounts=())
WELL = Facts(
    version="0.1.0",
    timeout_s=5.0,
    endpoint=Endpoint("http://ctl:7441", "ctl:7441", "", process("ctl:7441")),
    socket=Socket("/run/shoal/node.sock", is_given=False, asked=process("unix:/run/shoal/node.sock", "n1")),
    machine=MACHINE,
    controller_address="ctl:7441",
    controller=process("ctl:7441"),
    grpc_address="ctl:7440",
    told=Told((told(1), told(2), told(3)), ()),
    cluster_map=MAP,
    nodes=(node(1), node(2), node(3)),
    datasets=(dataset(),),
    origins=tuple(OriginFact("set", who, "", "") for who in ("", "n1", "n2", "n3")),
    snapshots=tuple(SnapshotFact("set", who, has_it=True) for who in ("", "n1", "n2", "n3")),
)
REFUSED = Silence(Trouble.REFUSED, "connection refused")


def broken(**more: Any) -> dict[str, Finding]:
    """What is found besides what is well, by kind, where some facts are others."""
    findings = diagnosis.judge(dataclasses.replace(WELL, **more))
    return {finding.kind: finding for finding in findings if finding.outcome is not Outcome.OK}


def only(found: dict[str, Finding], kind: str) -> Finding:
    assert set(found) == {kind}, found
    return found[kind]


def with_node(number: int, **more: Any) -> tuple[NodeFacts, ...]:
    return tuple(node(i, **more) if i == number else node(i) for i in (1, 2, 3))


def mapped(number: int, state: NodeState) -> dict[str, Any]:
    """The facts where a node of the map is in another state."""
    nodes = [dataclasses.replace(n, state=state) if n.id == f"n{number}" else n for n in MAP.nodes]
    cluster_map = ClusterMap(7, tuple(nodes))
    seen = [dataclasses.replace(node(i), node=cluster_map.nodes[i - 1]) for i in (1, 2, 3)]
    return {"cluster_map": cluster_map, "nodes": tuple(seen)}


def test_nothing_is_found_where_all_is_well() -> None:
    findings = diagnosis.judge(WELL)
    assert {finding.outcome for finding in findings} == {Outcome.OK}
    assert [finding.check for finding in findings] == page.checks()


# Each check.


@pytest.mark.parametrize("trouble", [t for t in Trouble if t.name not in ("NO_FILE", "NO_SOCKET", "DENIED")])
def test_each_way_an_endpoint_fails_has_its_own_finding(trouble: Trouble) -> None:
    silent = Endpoint("http://ctl:7440", "ctl:7440", "", Silence(trouble, "because"))
    found = only(broken(endpoint=silent), f"endpoint-{trouble.name.lower()}")
    assert "ctl:7440" in found.sentence and found.remedy
    if trouble is Trouble.GRPC:
        assert "SHOAL_ENDPOINT=http://ctl:7441" in found.remedy


def test_no_endpoint() -> None:
    none = Endpoint("", "", "", None)
    assert "by-socket" in diagnosis.judge(dataclasses.replace(WELL, endpoint=none))[0].kind
    nobody = Socket("/run/shoal/node.sock", is_given=False, asked=Silence(Trouble.NO_FILE, "no"))
    facts = Facts("0.1.0", 5.0, none, nobody, MACHINE)
    found = diagnosis.judge(facts)
    assert (found[0].kind, found[0].outcome) == ("endpoint-not-set", Outcome.PROBLEM)
    assert {finding.outcome for finding in found[1:]} <= {Outcome.SKIPPED, Outcome.OK}
    assert "'x' is no endpoint" in broken(endpoint=Endpoint("x", "", "why", None))["endpoint-malformed"].sentence


def test_controller() -> None:
    assert "reads go on" in broken(controller=REFUSED, told=Untold("it is away"))["controller-away"].sentence
    assert "ctl:7441" in broken(controller=REFUSED)["controller-no-http"].sentence
    assert "label shoal.io/control" in only(broken(told=Untold("no way")), "controller-no-calls").remedy
    skipped = only(broken(told=Untold("", is_installed=False)), "controller-no-grpc")
    assert (skipped.outcome, "shoal[cli]" in skipped.remedy) == (Outcome.SKIPPED, True)
    lonely = Endpoint("http://n1:7450", "n1:7450", "", process("n1:7450", "n1"))
    assert "n1:7450" in broken(endpoint=lonely, controller=None, told=None)["controller-not-heard-of"].sentence


@pytest.mark.parametrize(
    ("other", "kind"),
    [("0.1.9", ""), ("0.2.0", "versions-minor"), ("1.1.0", "versions-major"), ("dev", "versions-minor")],
)
def test_versions(other: str, kind: str) -> None:
    asked = process("10.0.0.2:7450", "n2", version=other)
    found = broken(nodes=with_node(2, asked=asked))
    assert set(found) == ({kind} if kind else set())
    if kind:
        assert "node n2 (10.0.0.2:7450)" in found[kind].sentence and "install shoal 0.1.0" in found[kind].remedy
    here = broken(version=other)
    assert set(here) == ({kind} if kind else set())
    if kind:
        assert "this client" in here[kind].sentence and "pip install 'shoal==0.1.0'" in here[kind].remedy


def test_a_node_that_does_not_answer_here_has_the_version_that_the_controller_knows() -> None:
    reported = Told((told(1), told(2, version="9.0.0"), told(3)), ())
    found = broken(nodes=with_node(2, asked=REFUSED), told=reported)
    assert "node n2" in found["versions-major"].sentence


_versions = st.text("01.9x", max_size=6)


@given(_versions, _versions)
def test_a_difference_of_versions_has_no_direction(one: str, other: str) -> None:
    assert versions._difference(one, other) is versions._difference(other, one)
    assert versions._difference(one, one) is None


@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.floats(0.5, 3.0)), min_size=1, max_size=6))
def test_clocks_that_may_be_the_same_are_never_accused(known: list[tuple[float, float]]) -> None:
    found = {clocks.HERE: Clock(0.0, 0.0)} | {f"n{i}": Clock(*each) for i, each in enumerate(known)}
    assert set(clocks.compare(found).values()) <= {0.0}


@given(st.floats(10, 1e6), st.sampled_from([-1, 1]), st.integers(0, 3))
def test_the_one_wrong_clock_of_several_is_named(off_s: float, sign: int, which: int) -> None:
    names = [clocks.HERE, "the controller", "n1", "n2"]
    skewed = names[which]
    # Everything is measured from here: where this clock is the wrong one all others seem to be.
    offsets = {name: (sign * off_s if name == skewed else 0.0) for name in names}
    here = offsets[clocks.HERE]
    measured = {n: Clock(o - here, 0.0 if n == clocks.HERE else 0.5) for n, o in offsets.items()}
    found = clocks.compare(measured)
    assert {name for name, skew_s in found.items() if skew_s} == {skewed}
    assert found[skewed] * sign > 0 and abs(found[skewed]) == pytest.approx(off_s, abs=1.01)


@pytest.mark.parametrize(("skew_s", "kind"), [(4, ""), (8, "clocks-off"), (3600, "clocks-far-off")])
def test_clocks(skew_s: float, kind: str) -> None:
    late = process("10.0.0.2:7450", "n2", clock=Clock(-skew_s, 0.5))
    found = broken(nodes=with_node(2, asked=late))
    assert set(found) == ({kind} if kind else set())
    if kind:
        assert "node n2" in found[kind].sentence and "behind those of the others" in found[kind].sentence
    two = {"nodes": (), "cluster_map": ClusterMap(1), "socket": Socket("/s", is_given=False, asked=REFUSED)}
    ahead = process("ctl:7441", clock=Clock(-skew_s, 0.5))
    both = broken(**two, controller=ahead, endpoint=Endpoint("http://ctl:7441", "ctl:7441", "", ahead))
    assert (kind in both) == bool(kind)
    if kind:
        assert "this machine" in both[kind].sentence and "that of the controller" in both[kind].sentence


def test_nodes() -> None:
    assert "--advertise" in only(broken(nodes=with_node(2, asked=REFUSED)), "nodes-unreachable").remedy
    away = broken(nodes=with_node(2, asked=REFUSED), controller=REFUSED, told=Untold("nobody answers"))
    assert set(away) == {"controller-away", "nodes-silent"}
    assert "see that it runs" in away["nodes-silent"].remedy
    mute = Silence(Trouble.MUTE, "no answer within 5 s")
    assert "no answer within 5 s" in only(broken(nodes=with_node(2, asked=mute)), "nodes-mute").sentence
    other = process("10.0.0.2:7450", "n9")
    assert "there is node n9" in only(broken(nodes=with_node(2, asked=other)), "nodes-other").sentence
    late = process("10.0.0.2:7450", "n2", cluster_map=ClusterMap(3, MAP.nodes))
    assert "epoch 3, which is 7 by now" in only(broken(nodes=with_node(2, asked=late)), "nodes-late").sentence
    lost = process("10.0.0.2:7450", "n2", cluster_id="another")
    assert "n2" in only(broken(nodes=with_node(2, asked=lost)), "nodes-other-cluster").sentence
    deaf = node(2).metrics | {"shoal_node_silent_peers": 2.0}
    assert "2 other processes" in only(broken(nodes=with_node(2, metrics=deaf)), "nodes-no-peers").sentence
    twins = Told((told(1), told(2, contest="at a and at b"), told(3)), ())
    assert "at a and at b" in only(broken(told=twins), "nodes-contested").sentence
    assert "start 'shoal-cachenode'" in broken(cluster_map=ClusterMap(), nodes=())["nodes-none"].remedy


def test_nodes_that_are_down_or_drain() -> None:
    down = mapped(2, NodeState.DOWN)
    assert only(broken(**down), "nodes-cut-off")
    silent = tuple(dataclasses.replace(n, asked=REFUSED) if n.node.id == "n2" else n for n in down["nodes"])
    assert "connection refused" in only(broken(**down | {"nodes": silent}), "nodes-down").sentence
    draining = Told((told(1), told(2, waits_for="the others fetch"), told(3)), ())
    found = only(broken(**mapped(2, NodeState.DRAINING), told=draining), "nodes-draining")
    assert "the others fetch" in found.sentence and found.outcome is Outcome.WARNING
    drained = Told((told(1), told(2, drained=True), told(3)), ())
    assert "undrain n2" in only(broken(**mapped(2, NodeState.DRAINING), told=drained), "nodes-drained").remedy


def test_disks() -> None:
    def conditioned(condition: str, **metrics: float) -> dict[str, Finding]:
        asked = process("10.0.0.2:7450", "n2", condition=condition)
        return broken(nodes=with_node(2, asked=asked, metrics=node(2).metrics | metrics))

    full = only(conditioned("passing reads through: the file system of /d is full: free space there"), "disks-failing")
    assert full.sentence.endswith("the file system of /d is full") and full.remedy.startswith("free space there;")
    assert only(conditioned("full"), "disks-full").outcome is Outcome.WARNING
    assert only(broken(nodes=with_node(2, drive_hangs=True)), "disks-hangs")
    small = only(conditioned("ok", shoal_node_drive_free_bytes=10.0 * GIB), "disks-too-small")
    assert "may still take 100 GiB" in small.sentence and "room for 10 GiB" in small.sentence
    assert not conditioned("ok", shoal_node_drive_free_bytes=float("nan"))
    assert (
        "no room for 1 GiB" in only(conditioned("ok", shoal_node_rebalance_short_bytes=GIB), "disks-no-room").sentence
    )
    damaged = {'shoal_node_shards_corrupt_total{cause="bytes"}': 2.0, 'shoal_node_shards_corrupt_total{cause="x"}': 0.0}
    assert "2 shards damaged" in only(conditioned("ok", **damaged), "disks-damaged").sentence
    assert "1 time since" in only(conditioned("ok", shoal_node_disk_failures_total=1), "disks-failed-before").sentence
    # A node that cannot be reached: the controller knows its condition.
    reported = Told((told(1), told(2, condition="passing reads through: it fails: mend it"), told(3)), ())
    assert "disks-failing" in broken(nodes=with_node(2, asked=REFUSED), told=reported)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (Trouble.NO_SOCKET, "no-socket"),
        (Trouble.DENIED, "denied"),
        (Trouble.REFUSED, "stale"),
        (Trouble.MUTE, "mute"),
        (Trouble.STRANGER, "stranger"),
    ],
)
def test_sockets_that_fail(trouble: Trouble, kind: str) -> None:
    silent = Socket("/s", is_given=False, asked=Silence(trouble, "because"))
    assert "/s" in only(broken(socket=silent), f"socket-{kind}").sentence


def test_a_socket_that_is_not_there_matters_where_it_was_named_or_a_node_is_here() -> None:
    absent = Silence(Trouble.NO_FILE, "there is no such file")
    assert broken(socket=Socket("/s", is_given=False, asked=absent)) == {}
    assert only(broken(socket=Socket("/s", is_given=True, asked=absent)), "socket-missing").outcome is Outcome.PROBLEM
    here = with_node(2, is_here=True)
    found = only(broken(socket=Socket("/s", is_given=False, asked=absent), nodes=here), "socket-not-found")
    assert "node n2 runs on this machine" in found.sentence and found.outcome is Outcome.WARNING


def test_sockets_that_lead_elsewhere() -> None:
    other = Socket("/s", is_given=True, asked=process("unix:/s", "n1", cluster_id="another"))
    assert "n1" in only(broken(socket=other), "socket-other-cluster").sentence
    unmapped = Socket("/s", is_given=True, asked=process("unix:/s", "n8"))
    assert "n8" in only(broken(socket=unmapped), "socket-off-map").sentence


def test_datasets() -> None:
    few = only(broken(datasets=(dataset(replicas=4),)), "datasets-few-nodes")
    assert "4 replicas and 3 nodes are up" in few.sentence and "--replicas 3" in few.remedy
    pinned = only(broken(datasets=(dataset(pinned=True, replicas=2, total_bytes=200 * GIB),)), "datasets-pinned")
    assert "need 400 GiB" in pinned.sentence and "keep 300 GiB" in pinned.sentence
    assert "(set)" in only(broken(datasets=(dataset(quota_bytes=301 * GIB),)), "datasets-quotas").sentence
    lost = only(broken(snapshots=(SnapshotFact("set", "", has_it=False),)), "datasets-snapshot-lost")
    assert "shoal dataset refresh set" in lost.remedy
    missing = only(broken(snapshots=(SnapshotFact("set", "n2", has_it=False),)), "datasets-snapshot-missing")
    assert "node n2" in missing.sentence and "ctl:7441" in missing.remedy


def test_prefetches_count_by_their_last_job() -> None:
    failed = ToldJob("p1", "set/train", "failed", "no room", "2026-01-01T00:00:00Z")
    done = ToldJob("p2", "set/train", "done", "", "2026-01-02T00:00:00Z")
    assert broken(told=Told((), (failed, done))) == {}
    later = dataclasses.replace(failed, finished_at="2026-01-03T00:00:00Z")
    assert "set/train (p1) failed" in only(broken(told=Told((), (later, done))), "datasets-prefetch-failed").sentence
    running = ToldJob("p3", "set/train", "running", "", "")
    assert broken(told=Told((), (later, running))) == {}
    waits = dataclasses.replace(running, reason="a node lacks room")
    assert "a node lacks room" in only(broken(told=Told((), (waits,))), "datasets-prefetch-waits").sentence
    assert broken(told=Told((), (dataclasses.replace(later, target="gone"),))) == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("InvalidRequest", "options"),
        ("OriginDenied", "denied"),
        ("OriginUnavailable", "unreachable"),
        ("DeadlineExceeded", "unreachable"),
        ("OriginNotFound", "gone"),
        ("OriginChanged", "changed"),
        ("OriginError", "fails"),
        ("SomethingNew", "fails"),
    ],
)
def test_origins(error: str, kind: str) -> None:
    everybody = tuple(OriginFact("set", who, error, "it is so: do this") for who in ("", "n1", "n2", "n3"))
    found = only(broken(origins=everybody), f"origins-{kind}")
    assert "it is so" in found.sentence and "do this" not in found.sentence
    assert kind == "changed" or "the controller and all nodes" in found.sentence
    one = (OriginFact("set", "", "", ""), OriginFact("set", "n1", "", ""), OriginFact("set", "n2", error, "it is so"))
    assert kind == "changed" or " node n2 (" in f" {only(broken(origins=one), f'origins-{kind}').sentence}"


def test_origins_that_nobody_could_check() -> None:
    busy = (*WELL.origins[:2], OriginFact("set", "n2", "Overloaded", "others take all the time: ask again"))
    assert only(broken(origins=busy), "origins-unsaid").outcome is Outcome.SKIPPED
    facts = (OriginFact("set", "", "", ""), OriginFact("set", "n1", None, "its version does not check origins"))
    found = diagnosis.judge(dataclasses.replace(WELL, origins=facts, unchecked_pairs=3))
    assert [f.kind for f in found if f.check == "origins"] == ["origins-unsaid", "origins-too-many", "origins-ok"]
    assert "the controller can read" in found[-2].sentence


def test_machine() -> None:
    def here(**more: Any) -> dict[str, Finding]:
        return broken(machine=dataclasses.replace(MACHINE, **more))

    assert "300 files" in only(here(open_files=(300, 4096)), "machine-open-files").sentence
    assert "64 MiB" in only(here(shared_memory_bytes=64 << 20), "machine-shared-memory").sentence
    assert here(shared_memory_bytes=64 << 20, has_torch=False) == {}
    dead = MountFact("/mnt/set", "set", "dead", "the daemon was killed")
    assert "shoal umount /mnt/set" in only(here(mounts=(dead,)), "machine-mount-dead").remedy
    replacing = MountFact("/mnt/set", "set", "replacing", "")
    assert "is replacing" in only(here(mounts=(replacing,)), "machine-mount-trouble").sentence
    assert here(mounts=(MountFact("/mnt/set", "set", "serving", ""),)) == {}
    for more, said in (
        ({}, "with passthrough"),
        ({"kernel": "6.8.0-31"}, "through its server"),
        ({"has_fuse": False}, "/dev/fuse"),
        ({"may_mount": False}, "without root"),
    ):
        findings = diagnosis.judge(dataclasses.replace(WELL, machine=dataclasses.replace(MACHINE, **more)))
        assert said in findings[-1].sentence


# Whatever the facts are.

_silences = st.builds(Silence, st.sampled_from(Trouble), st.sampled_from(["because", "{odd}"]))
_words = st.text("a: {}", max_size=4)
_clocks = st.none() | st.builds(Clock, st.floats(-1e6, 1e6), st.floats(0, 10))


@st.composite
def facts_of_any_kind(draw: st.DrawFn) -> Facts:
    def asked(address: str, node_id: str) -> Process | Silence:
        if draw(st.booleans()):
            return draw(_silences)
        return process(
            address,
            draw(st.sampled_from([node_id, "n9"])) if node_id else "",
            version=draw(st.sampled_from(["0.1.0", "0.2.0", "2.0.0", "x"])),
            cluster_id=draw(st.sampled_from(["c", "other", ""])),
            cluster_map=draw(st.sampled_from([MAP, ClusterMap(), ClusterMap(3, MAP.nodes[:1])])),
            condition=draw(st.sampled_from([None, "ok", "full", "passing reads through: it {fails}", "odd"])),
            clock=draw(_clocks),
        )

    endpoint = draw(st.none() | st.just("ctl:7441"))
    named = ["set", "other"]
    who = st.sampled_from(["", "n1", "n2", "n9"])
    controller = draw(st.none() | st.just("ctl:7441"))
    source = asked("ctl:7441", "")
    has_map = isinstance(source, Process)
    jobs = st.builds(
        ToldJob, st.just("p"), st.sampled_from(named), st.sampled_from(["failed", "running"]), _words, _words
    )
    return dataclasses.replace(
        WELL,
        version=draw(st.sampled_from(["0.1.0", "3.0"])),
        endpoint=Endpoint(endpoint or "", endpoint or "", "", source if endpoint else None),
        socket=Socket("/s", is_given=draw(st.booleans()), asked=source if not endpoint else asked("unix:/s", "n1")),
        controller_address=controller or "",
        controller=asked("ctl:7441", "") if controller else None,
        told=draw(
            st.none()
            | st.just(WELL.told)
            | st.builds(Untold, _words, st.booleans())
            | st.builds(Told, st.just(()), st.lists(jobs, max_size=3).map(tuple))
        ),
        cluster_map=MAP if has_map else None,
        nodes=tuple(node(i, asked=asked(f"10.0.0.{i}:7450", f"n{i}")) for i in (1, 2, 3)) if has_map else (),
        datasets=draw(st.none() | st.sampled_from([(), (dataset(), dataset("other", pinned=True, replicas=9))])),
        origins=tuple(
            draw(
                st.lists(
                    st.builds(
                        OriginFact,
                        st.sampled_from(named),
                        who,
                        st.sampled_from([None, "", "OriginDenied", "{x}"]),
                        _words,
                    ),
                    max_size=5,
                )
            )
        ),
        snapshots=tuple(
            draw(st.lists(st.builds(SnapshotFact, st.sampled_from(named), who, st.booleans()), max_size=4))
        ),
    )


@given(facts_of_any_kind())
def test_all_facts_are_judged(facts: Facts) -> None:
    """No check fails, each says something, and each problem has its remedy."""
    if facts.datasets is not None and len(facts.datasets) < 2:
        facts = dataclasses.replace(facts, origins=(), snapshots=())  # of datasets that there are not
    found = diagnosis.judge(facts)
    assert {finding.check for finding in found} == set(page.checks())
    for finding in found:
        assert finding.sentence and (finding.remedy or finding.outcome in (Outcome.OK, Outcome.SKIPPED)), finding


# How it is said.


def test_questions_about_origins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By datasets as by nodes: each is a read of an origin."""
    asked: list[tuple[str, str]] = []

    def about(record: DatasetRecord, who: str, *_: object) -> tuple[None, None]:
        asked.append((record.name, who))
        return None, None

    monkeypatch.setattr(looking, "MAX_PAIRS", 5)
    monkeypatch.setattr(looking, "_about", about)
    monkeypatch.setattr(looking, "_datasets", lambda *_: [dataset(f"set{i}") for i in range(7)])
    seen = looking._with_datasets(WELL, process("ctl:7441"))
    assert seen.unchecked_pairs == 4 * 7 - 2 * 5
    assert sum(who == "" for _, who in asked) == 5
    assert len({name for name, who in asked if who}) == 5, "spread over datasets"


def test_a_password_in_an_endpoint_is_not_repeated() -> None:
    """People put their findings where others help."""
    said = CliRunner().invoke(main, ["doctor", "--json", "--endpoint", "http://me:hunter2@host:7441/path"]).output
    assert json.loads(said)["endpoint"] == "http://***@host:7441/path"
    assert "endpoint-malformed" in said and "hunter2" not in said


def test_the_page_is_made_of_what_can_be_found() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text()
    for name in page.checks():
        assert page.table(name) in text, f"python -m shoal.doctor.page prints the table of {name}"
    rows = re.findall(r"^\| `([a-z]+-[a-z-]+)` \|", text, re.MULTILINE)
    names = [kind.name for kind in diagnosis.kinds()]
    assert sorted(rows) == sorted(names) and len(set(names)) == len(names)


def test_every_problem_has_a_remedy() -> None:
    for kind in diagnosis.kinds():
        assert bool(kind.remedy) or kind.outcome in (Outcome.OK, Outcome.SKIPPED), kind.name


def test_names_in_a_sentence() -> None:
    assert [listed(list("abcdefgh"[:n])) for n in (1, 2, 6, 8)] == [
        *("a", "a and b", "a, b, c, d, e and f"),
        "a, b, c, d, e and 3 more",
    ]


def test_the_document_has_always_the_same_shape(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["doctor", "--json", "--endpoint", "nonsense", "--socket", str(tmp_path / "none")])
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert list(document) == ["version", "endpoint", "healthy", "counts", "findings"]
    assert (document["endpoint"], document["healthy"]) == ("nonsense", False)
    assert set(document["counts"]) == {"ok", "warning", "problem", "skipped"}
    for finding in document["findings"]:
        assert list(finding) == ["check", "kind", "outcome", "subject", "sentence", "remedy"]


def test_colours_are_for_terminals(tmp_path: Path) -> None:
    words = ["doctor", "--endpoint", "nonsense", "--socket", str(tmp_path / "none")]
    plain, coloured = (CliRunner().invoke(main, words, color=color).stdout for color in (False, True))
    assert "\x1b[" not in plain and "\x1b[31mproblem" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


# One question.


def answering(script: Callable[[socket.socket], None]) -> tuple[str, threading.Thread]:
    """The address of a server that does `script` to the first who connects."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server, server.accept()[0] as client:
            client.recv(4096)
            script(client)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return f"127.0.0.1:{server.getsockname()[1]}", thread


@pytest.mark.parametrize(
    ("said", "trouble"),
    [
        (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", Trouble.GRPC),
        (b"\x15\x03\x01\x00\x02\x02\x46", Trouble.STRANGER),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Trouble.STRANGER),
        (b"\xff\xfe\xfd", Trouble.STRANGER),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", Trouble.MUTE),
        (b"HTTP/1.1 nonsense", Trouble.MUTE),
        (b"", Trouble.MUTE),
    ],
)
def test_answers_that_are_none(said: bytes, trouble: Trouble) -> None:
    address, thread = answering(lambda client: client.sendall(said))
    with pytest.raises(asking.Unanswered) as caught:
        asking.ask(address, "/v1/cluster", 5.0)
    assert caught.value.silence.trouble is trouble and caught.value.silence.reason
    thread.join(5)


def test_a_server_that_dribbles_costs_its_deadline() -> None:
    over = threading.Event()

    def dribble(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
        while not over.wait(0.05):
            client.sendall(b"x")

    address, thread = answering(dribble)
    began = time.monotonic()
    done = looking.together({"": lambda: asking.ask(address, "/", 0.2)}, 0.3)
    assert done == {} and time.monotonic() - began < 20
    over.set()
    thread.join(5)


def test_a_date_is_known_to_half_a_second_and_half_the_round_trip() -> None:
    head = b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:01:40 GMT\r\nContent-Length: 0\r\n\r\n"
    address, _ = answering(lambda client: client.sendall(head))
    answer = asking.ask(address, "/", 5.0)
    assert answer.clock is not None and 0.5 <= answer.clock.uncertainty_s < 3.0
    assert answer.clock.offset_s + time.time() == pytest.approx(100.5, abs=10)


def test_a_controller_that_stands_by_is_told_from_one_that_is_busy() -> None:
    def understood(name: str) -> Silence:
        found = looking._understood("a:1", asking.Answer(503, {"shoal-error": name}, b"it says so\n", None))
        assert isinstance(found, Silence) and "it says so" in found.reason
        return found

    assert understood("Unavailable").trouble is Trouble.STANDBY
    assert understood("Overloaded").trouble is Trouble.MUTE


# An origin that is checked.


def snapshot_of(directory: Path, target: Path) -> Snapshot:
    opened = open_origin(str(directory), {})
    target.mkdir(exist_ok=True)
    rows = [(row.path, row.size_bytes, row.version) for batch in opened.list() for row in batch]
    named = {"origin": opened.url, "identity": opened.identity, "key_prefix": opened.key_prefix}
    path = write(target, **named, shard_size=4096, rows=rows)
    return Snapshot.open(path)


def test_check_of_an_origin(tmp_path: Path) -> None:
    directory = tmp_path / "origin"
    directory.mkdir()
    for name in "abcde":
        (directory / name).write_bytes(b"" if name == "b" else name.encode())
    listed_then = snapshot_of(directory, tmp_path / "snapshots")
    check.check(str(directory), {}, listed_then)
    (directory / "b").write_bytes(b"an empty object is not looked at")
    check.check(str(directory), {}, listed_then)
    (directory / "e").write_bytes(b"another")
    with pytest.raises(OriginChanged, match="has changed"):
        check.check(str(directory), {}, listed_then)
    (directory / "e").unlink()
    with pytest.raises(OriginChanged, match="was removed"):
        check.check(str(directory), {}, listed_then)
    for path in directory.iterdir():
        path.unlink()
    with pytest.raises(OriginNotFound, match="without files"):
        check.check(str(directory), {}, listed_then)


def test_checks_that_hang_are_joined_and_not_mistaken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CHECK_S", 0.05)
    monkeypatch.setattr(check, "REST_S", 0.0)
    over, calls = threading.Event(), []

    def hang() -> None:
        calls.append(None)
        over.wait(20)

    async def ask() -> list[str | None]:
        checks = check.Checks()
        names = ["a", "a", "b", "c", "d", "e"]
        said = await asyncio.gather(*(checks.of(name, "0", hang) for name in names))
        over.set()
        while checks._running:
            await asyncio.sleep(0.001)
        said.append(await checks.of("a", "0", lambda: None))
        checks.close()
        return [each["error"] for each in said]

    assert asyncio.run(ask()) == [*["DeadlineExceeded"] * 5, "Overloaded", None]
    assert len(calls) == 5


def test_checks_rest_however_often_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "REST_S", 0.05)
    calls: list[float] = []

    async def ask() -> None:
        checks = check.Checks()
        for _ in range(3):
            await asyncio.gather(*(checks.of("set", "0", lambda: calls.append(time.monotonic())) for _ in range(9)))
        await checks.of("set", "1", lambda: calls.append(0.0))
        checks.close()

    asyncio.run(ask())
    *of_one, another = calls
    assert another == 0.0, "a new snapshot is checked at once"
    assert len(of_one) == 3
    assert all(after - before > 0.045 for before, after in itertools.pairwise(of_one))


def test_check_of_an_origin_with_nothing_to_read(tmp_path: Path) -> None:
    directory = tmp_path / "origin"
    directory.mkdir()
    (directory / "a").write_bytes(b"")
    check.check(str(directory), {}, snapshot_of(directory, tmp_path / "snapshots"))
