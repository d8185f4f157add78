"""The custom resource Prefetch: from asked to complete, or failed with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal_controller.events import PrefetchCancelled
from shoal_controller.kube import prefetches
from shoal_controller.kube.prefetches import Asked
from tests.support import controller as support
from tests.support.controller import GIB, Cluster, digest, node, share

NOW = support.START.utc_s


def asked(
    status: dict[str, Any] | None = None, *, name: str = "warm", metadata: dict[str, Any] | None = None, **spec: Any
) -> Asked:
    raw = {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "generation": 1,
            "finalizers": [prefetches.FINALIZER],
        }
        | (metadata or {}),
        "spec": {"dataset": "imagenet"} | spec,
        "status": status or {},
    }
    return Asked.parse(raw)


@pytest.fixture
def it() -> Cluster:
    cluster = Cluster()
    cluster.register(node("n1"))
    cluster.add(support.dataset())
    return cluster


def decide(wanted: Asked, it: Cluster, *others: Asked, failure: str = "", now: float = NOW) -> list[prefetches.Act]:
    return prefetches.decide(wanted, [wanted, *others], it.state, failure=failure, now_utc_s=now)


def status_of(
    wanted: Asked, it: Cluster, *others: Asked, failure: str = ""
) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    status, _ = prefetches.status_of(wanted, [wanted, *others], it.state, failure=failure, now_utc_s=NOW)
    return status, {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def begun(it: Cluster, wanted: Asked) -> Asked:
    """`wanted` with its jobs started and its status written."""
    for place, path in enumerate(wanted.paths):
        it.prefetch(wanted.job_id(place), prefix=path)
    return replace(wanted, status=status_of(wanted, it)[0])


def test_from_asked_to_complete(it: Cluster) -> None:
    wanted = asked()
    assert decide(wanted, it) == [prefetches.Start(digest(1), {"kube-uid-warm-0": ""})]
    status, conditions = status_of(wanted, it)
    assert (status["phase"], status["percent"]) == ("Waiting", 0)
    assert conditions == {"Complete": ("False", "Planning"), "Failed": ("False", "Planning")}

    wanted = begun(it, wanted)
    assert decide(wanted, it) == []
    it.answer({"n1": share(it.epoch, done=5 * GIB)}, job_id="kube-uid-warm-0")
    status, conditions = status_of(wanted, it)
    assert (status["phase"], status["percent"], status["snapshot"]) == ("Running", 50, digest(1))
    assert (status["bytesDone"], status["bytesTotal"], status["size"]) == (5 * GIB, 10 * GIB, "10 GiB")
    assert status["jobs"][0]["state"] == "running"
    assert conditions["Complete"] == ("False", "Fetching")

    it.answer({"n1": share(it.epoch, done=10 * GIB)}, job_id="kube-uid-warm-0")
    assert status_of(wanted, it)[0]["percent"] == 99  # not checked yet
    it.answer({"n1": share(it.epoch, done=10 * GIB, complete=True)}, job_id="kube-uid-warm-0")
    status, conditions = status_of(wanted, it)
    assert (status["phase"], status["percent"]) == ("Complete", 100)
    assert conditions == {"Complete": ("True", "Cached"), "Failed": ("False", "Complete")}
    assert "finishedAt" in status

    finished = replace(wanted, status=status)
    assert status_of(finished, it)[0] == status
    assert decide(finished, it) == [prefetches.RemoveFinalizer()]


def test_each_path_is_a_job(it: Cluster) -> None:
    wanted = asked(paths=["train/", "val/"])
    assert decide(wanted, it) == [prefetches.Start(digest(1), {"kube-uid-warm-0": "train/", "kube-uid-warm-1": "val/"})]
    wanted = begun(it, wanted)
    it.answer({"n1": share(it.epoch, done=10 * GIB, complete=True)}, job_id="kube-uid-warm-0")
    status, _ = status_of(wanted, it)
    assert (status["phase"], [job["path"] for job in status["jobs"]]) == ("Running", ["train/", "val/"])


def test_a_new_controller_goes_on(it: Cluster) -> None:
    wanted = begun(it, asked())
    it.restart()
    assert decide(wanted, it) == []
    # Without its record it only begins again.
    lost = Cluster()
    lost.register(node("n1"))
    lost.add(support.dataset())
    assert decide(wanted, lost) == [prefetches.Start(digest(1), {"kube-uid-warm-0": ""})]


def test_it_keeps_the_snapshot_that_it_began_with(it: Cluster) -> None:
    wanted = replace(asked(), status={"snapshot": digest(9)})
    assert decide(wanted, it) == [prefetches.Start(digest(9), {"kube-uid-warm-0": ""})]
    assert prefetches.snapshot_of(asked(snapshot=digest(1)[:8]), it.state) == digest(1)
    assert decide(asked(snapshot="ffff"), it) == []
    assert status_of(asked(snapshot="ffff"), it)[1]["Complete"] == ("False", "NoSnapshot")


@pytest.mark.parametrize(
    ("answer", "reason", "words"),
    [
        ({"short": 5 * GIB}, "DoesNotFit", "needs 5 GiB more on node n1"),
        ({"failure": "origin said 403"}, "FetchFailed", "failed on node n1: origin said 403"),
    ],
)
def test_failures_have_the_cores_own_reason(it: Cluster, answer: dict[str, Any], reason: str, words: str) -> None:
    wanted = begun(it, asked())
    it.answer({"n1": share(it.epoch, **answer)}, job_id="kube-uid-warm-0")
    status, conditions = status_of(wanted, it)
    assert status["phase"] == "Failed"
    assert conditions == {"Complete": ("False", "Failed"), "Failed": ("True", reason)}
    assert words in status["conditions"][1]["message"]
    assert words in status["jobs"][0]["reason"]


def test_a_job_that_was_cancelled_by_hand_has_failed(it: Cluster) -> None:
    wanted = begun(it, asked())
    it.handle(PrefetchCancelled("kube-uid-warm-0"))
    assert status_of(wanted, it)[1]["Failed"] == ("True", "Cancelled")


def test_nothing_to_fetch_is_a_failure(it: Cluster) -> None:
    assert decide(asked(), it, failure="no object of dataset imagenet") == []
    status, conditions = status_of(asked(), it, failure="no object of dataset imagenet")
    assert (status["phase"], conditions["Failed"]) == ("Failed", ("True", "NothingToFetch"))


def test_it_waits_for_its_dataset_and_for_nodes(it: Cluster) -> None:
    other = asked(dataset="laion")
    assert decide(other, it) == []
    status, conditions = status_of(other, it)
    assert (status["phase"], conditions["Complete"]) == ("Waiting", ("False", "NoDataset"))
    empty = Cluster()
    empty.add(support.dataset())
    assert decide(asked(), empty) == []
    assert status_of(asked(), empty)[1]["Complete"] == ("False", "NoNodes")


def test_higher_priority_comes_first(it: Cluster) -> None:
    low, high = asked(name="low"), asked(name="high", priority=5)
    assert decide(low, it, high) == []
    assert status_of(low, it, high)[1]["Complete"] == ("False", "Queued")
    assert decide(high, it, low) != []
    # Equal ones do not wait, nor does one that has begun, nor anybody for one that cannot begin or has ended.
    assert decide(low, it, asked(name="same")) != []
    assert decide(replace(low, status={"snapshot": digest(1)}), it, high) != []
    assert decide(low, it, replace(high, dataset="missing")) != []
    assert decide(low, it, replace(high, status={"phase": "Failed"})) != []


def test_a_deleted_one_stops_what_nobody_else_wants(it: Cluster) -> None:
    wanted = begun(it, asked())
    going = replace(wanted, is_deleting=True)
    assert decide(going, it) == [prefetches.Cancel(("kube-uid-warm-0",)), prefetches.RemoveFinalizer()]
    assert decide(going, it, asked(name="other")) == [prefetches.RemoveFinalizer()]
    assert decide(going, it, asked(name="other", paths=["train/"]))[0] == prefetches.Cancel(("kube-uid-warm-0",))


def test_it_shares_the_job_of_another_one(it: Cluster) -> None:
    begun(it, asked(name="other"))
    assert decide(asked(), it) == []
    status, _ = status_of(asked(), it)
    assert (status["phase"], status["jobs"][0]["id"]) == ("Running", "kube-uid-other-0")


def test_it_is_deleted_after_its_time() -> None:
    ended = {"phase": "Complete", "finishedAt": "2026-01-01T00:00:00Z"}
    kept = replace(asked(ended), has_finalizer=False)
    timed = replace(asked(ended, ttlSecondsAfterFinished=60), has_finalizer=False)
    at = 1767225600.0
    assert decide(kept, Cluster(), now=at + 1e6) == []
    assert decide(timed, Cluster(), now=at + 59) == []
    assert decide(timed, Cluster(), now=at + 60) == [prefetches.Delete()]


def test_the_finalizer_comes_first(it: Cluster) -> None:
    assert decide(replace(asked(), has_finalizer=False), it) == [prefetches.AddFinalizer()]
