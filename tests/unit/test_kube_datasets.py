"""The custom resource Dataset: what follows from what was declared and what is registered."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from shoal.errors import InvalidRequest, OriginDenied
from shoal_controller.events import DatasetRemoved
from shoal_controller.kube import datasets
from shoal_controller.kube.datasets import Declared, Failure, Work
from shoal_controller.model import Dataset, JobState, PolicyChange, State
from tests.support import controller as support
from tests.support.controller import GIB, Cluster, digest, node, share

NOW = support.START.utc_s
IDLE = Work()


def declared(status: dict[str, Any] | None = None, *, metadata: dict[str, Any] | None = None, **spec: Any) -> Declared:
    raw = {
        "metadata": {"name": "imagenet", "uid": "u1", "generation": 3, "finalizers": [datasets.FINALIZER]}
        | (metadata or {}),
        "spec": {"origin": "s3://bucket/imagenet"} | spec,
        "status": status or {},
    }
    return Declared.parse(raw)


def registered(**more: Any) -> Dataset:
    # As a definition without options has it.
    return replace(support.dataset(), **({"storage_options": "{}"} | more))


def cluster(dataset: Dataset | None = None, *, nodes: int = 1) -> Cluster:
    it = Cluster()
    it.register(*(node(f"n{number}") for number in range(1, nodes + 1)))
    if dataset is not None:
        it.add(dataset)
    return it


def decide(
    wanted: Declared, it: Cluster, work: Work = IDLE, *, waited_for: bool = False, now: float = NOW
) -> list[datasets.Act]:
    dataset = it.state.datasets.get("imagenet")
    return datasets.decide(wanted, dataset, it.state, work, is_waited_for=waited_for, now_utc_s=now)


def status_of(
    wanted: Declared, state: State, work: Work = IDLE, *, missing_secret: str = ""
) -> tuple[dict[str, Any], dict[str, tuple[str, str, str]]]:
    status, _ = datasets.status_of(
        wanted, state.datasets.get("imagenet"), state, work, missing_secret=missing_secret, now_utc_s=NOW
    )
    return status, {c["type"]: (c["status"], c["reason"], c["message"]) for c in status["conditions"]}


def test_everything_that_can_be_declared() -> None:
    wanted = declared(
        metadata={"annotations": {datasets.REFRESH_KEY: "now"}},
        options={"endpoint_url": "http://s3", "client_kwargs": '{"region_name": "eu"}', "anon": "true", "odd": "{x"},
        secretRef={"name": "creds"},
        shardSize="64Mi",
        replicas=2,
        pin=True,
        quota="1Ti",
        direct=True,
        refresh={"interval": "1h"},
        prefetch="Eager",
    )
    definition = wanted.definition
    assert (definition.name, definition.origin, definition.shard_size) == ("imagenet", "s3://bucket/imagenet", 64 << 20)
    assert (definition.replicas, definition.is_pinned, definition.quota_bytes) == (2, True, 1 << 40)
    assert (definition.is_direct, wanted.secret, wanted.is_eager) == (True, "creds", True)
    assert json.loads(definition.storage_options) == {
        "endpoint_url": "http://s3",
        "client_kwargs": {"region_name": "eu"},
        "anon": True,
        "odd": "{x",
    }
    assert (wanted.refresh_request, wanted.problem) == ("now", "")


def test_what_the_schema_cannot_check_is_a_problem_and_no_error() -> None:
    wanted = declared(refresh={"cron": "61 * * * *"})
    assert "no cron expression" in wanted.problem
    assert decide(wanted, cluster()) == []
    _, conditions = status_of(wanted, cluster().state)
    assert conditions["Ready"][:2] == ("False", "Invalid")


def test_a_secret_is_among_the_options() -> None:
    def encoded(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    data = {"key": encoded("k\n"), "secret": encoded("{s"), "options.json": encoded('{"client_kwargs": {"verify": 0}}')}
    options = json.loads(declared(options={"key": "other"}).with_secret(data).definition.storage_options)
    assert options == {"key": "k", "secret": "{s", "client_kwargs": {"verify": 0}}
    with pytest.raises(InvalidRequest, match="no text"):
        declared().with_secret({"key": base64.b64encode(b"\xff").decode()})
    with pytest.raises(InvalidRequest, match="JSON"):
        declared().with_secret({"options.json": encoded("[1]")})


def test_the_finalizer_comes_first() -> None:
    assert decide(declared(metadata={"finalizers": ["other"]}), cluster()) == [datasets.AddFinalizer()]


def test_a_new_one_is_added_once() -> None:
    wanted = declared()
    assert decide(wanted, cluster()) == [datasets.Add(wanted.definition)]
    assert decide(wanted, cluster(), Work(is_listing=True)) == []
    assert decide(wanted, cluster(registered())) == []


def test_what_failed_is_tried_again_later_and_at_once_when_it_was_edited() -> None:
    first = Failure.of(OriginDenied("no"), 3, None, NOW)
    assert (first.reason, first.retry_utc_s) == ("OriginDenied", NOW + datasets.FIRST_RETRY_S)
    second = Failure.of(OriginDenied("no"), 3, first, NOW)
    assert second.retry_utc_s == NOW + 2 * datasets.FIRST_RETRY_S
    last = Failure.of(OriginDenied("no"), 3, replace(first, tries=1000), NOW)
    assert last.retry_utc_s == NOW + datasets.LAST_RETRY_S
    work = Work(failure=first)
    assert decide(declared(), cluster(), work) == []
    assert decide(declared(), cluster(), work, now=first.retry_utc_s) == [datasets.Add(declared().definition)]
    assert decide(declared(metadata={"generation": 4}), cluster(), work) == [datasets.Add(declared().definition)]


def test_policy_and_credentials_follow_the_object() -> None:
    it = cluster(registered())
    wanted = declared(replicas=2, pin=True, quota="5", direct=True, options={"a": "b"})
    assert decide(wanted, it) == [datasets.Change(PolicyChange(2, True, 5, True, '{"a": "b"}'))]
    assert decide(declared(pin=True), it) == [datasets.Change(PolicyChange(is_pinned=True))]


def test_what_was_added_by_hand_over_another_origin_is_not_touched() -> None:
    it = cluster(registered(origin="s3://bucket/other"))
    assert decide(declared(pin=True), it) == []
    going = declared(metadata={"deletionTimestamp": "x"})
    assert decide(going, it) == [datasets.RemoveFinalizer()]
    status, conditions = status_of(declared(), it.state)
    assert (status["phase"], conditions["Ready"][:2]) == ("Failed", ("False", "NameTaken"))
    assert "shoal dataset remove imagenet" in conditions["Ready"][2]
    assert "bytes" not in status


def test_one_that_was_added_by_hand_over_the_same_origin_is_taken_on() -> None:
    it = cluster(registered())
    assert decide(declared(), it) == []
    assert status_of(declared(), it.state)[1]["Ready"][:2] == ("True", "Serving")
    # Other spellings are the same origin; so is what the origin's reader made of it.
    assert datasets.is_ours(declared(origin="s3a://bucket/imagenet/"), registered())
    assert datasets.is_ours(
        declared({"origin": "abfs://c@a/x"}, origin="abfs://c/x"), registered(origin="abfs://c@a/x")
    )


def test_refresh_by_schedule_and_by_annotation() -> None:
    it = cluster(registered(refreshed_utc_s=NOW - 3600))
    assert decide(declared(refresh={"interval": "2h"}), it) == []
    assert decide(declared(refresh={"interval": "1h"}), it) == [datasets.Refresh("")]
    asked = {"annotations": {datasets.REFRESH_KEY: "now"}}
    assert decide(declared(metadata=asked), it) == [datasets.Refresh("now")]
    assert decide(declared({"observedRefresh": "now"}, metadata=asked), it) == []
    assert decide(declared(metadata=asked), it, Work(done_request="now")) == []
    status, _ = status_of(declared({"observedRefresh": "then"}, metadata=asked), it.state, Work(done_request="now"))
    assert status["observedRefresh"] == "now"


def test_eager_and_waited_for_ones_are_prefetched_once() -> None:
    it = cluster(registered())
    wanted = [datasets.Prefetch(digest(1))]
    assert decide(declared(), it) == []
    assert decide(declared(), it, waited_for=True) == wanted
    assert decide(declared(prefetch="Eager"), it) == wanted
    it.prefetch()
    assert decide(declared(prefetch="Eager"), it) == []
    it.answer({"n1": share(it.epoch, short=5)})
    assert it.job().state is JobState.REFUSED
    assert decide(declared(prefetch="Eager"), it) == []
    assert decide(declared(prefetch="Eager"), it, now=NOW + 300) == wanted


def test_nothing_is_prefetched_without_nodes() -> None:
    it = cluster(registered(), nodes=0)
    assert decide(declared(prefetch="Eager"), it) == []
    status = status_of(declared(prefetch="Eager"), it.state)[1]
    assert status["Warm"][:2] == ("False", "NoNodes")
    assert status["Replicated"][:2] == ("False", "TooFewNodes")


def test_a_deleted_one_goes_when_every_live_node_let_go() -> None:
    going = declared({"snapshot": digest(1)}, metadata={"deletionTimestamp": "x"})
    it = cluster(registered(), nodes=3)
    assert decide(going, it) == [datasets.Remove()]
    it.handle(DatasetRemoved("imagenet"))
    # Not heard of, holding, and gone: the first two are waited for.
    it.report(node("n2"), cached_bytes={digest(1): 5})
    it.report(node("n3"), is_leaving=True, cached_bytes={digest(1): 5})
    assert datasets.holders(going, it.state) == ["n1", "n2"]
    assert decide(going, it) == []
    status, conditions = status_of(going, it.state)
    assert (status["phase"], status["snapshot"]) == ("Deleting", digest(1))
    assert conditions["Ready"] == ("False", "Deleting", "waits for n1, n2 to let go of the data")
    it.report(node("n1"))
    it.report(node("n2"))
    assert decide(going, it) == [datasets.RemoveFinalizer()]


def test_data_that_another_dataset_names_is_not_waited_for() -> None:
    going = declared({"snapshot": digest(1)}, metadata={"deletionTimestamp": "x"})
    it = cluster(replace(registered(), name="twin"))
    it.report(node("n1"), cached_bytes={digest(1): 5})
    assert decide(going, it) == [datasets.RemoveFinalizer()]


def test_one_that_never_came_to_be_goes_at_once() -> None:
    assert decide(declared(metadata={"deletionTimestamp": "x"}), cluster()) == [datasets.RemoveFinalizer()]
    assert decide(declared(metadata={"deletionTimestamp": "x", "finalizers": []}), cluster(registered())) == []


def test_figures_of_a_dataset_that_is_partly_cached() -> None:
    it = cluster(registered(), nodes=2)
    it.report(node("n1"), cached_bytes={digest(1): 30 * GIB}, held_bytes={digest(1): 40 * GIB})
    it.report(node("n2"), cached_bytes={digest(1): 12 * GIB}, held_bytes={digest(1): 50 * GIB})
    status, conditions = status_of(declared(), it.state)
    assert status["phase"] == "Ready"
    assert (status["snapshot"], status["objects"], status["bytes"]) == (digest(1), 10, 100 * GIB)
    assert (status["cachedBytes"], status["cachedPercent"], status["size"]) == (42 * GIB, 42, "100 GiB")
    assert status["nodes"] == [
        {"id": "n2", "host": "n2", "bytes": 50 * GIB},
        {"id": "n1", "host": "n1", "bytes": 40 * GIB},
    ]
    assert status["observedGeneration"] == 3
    assert conditions["Warm"] == (
        "False",
        "OnDemand",
        "42 GiB of 100 GiB cached; a read or a Prefetch brings in the rest",
    )
    assert conditions["Replicated"][0] == "True"


def test_hundred_percent_is_all() -> None:
    it = cluster(registered())
    it.report(node("n1"), cached_bytes={digest(1): 100 * GIB - 1})
    status, conditions = status_of(declared(), it.state)
    assert (status["cachedPercent"], conditions["Warm"][0]) == (99, "False")
    it.report(node("n1"), cached_bytes={digest(1): 100 * GIB})
    status, conditions = status_of(declared(), it.state)
    assert (status["cachedPercent"], conditions["Warm"][0]) == (100, "True")


def test_a_prefetch_that_does_not_fit_says_so() -> None:
    it = cluster(registered())
    it.prefetch()
    assert status_of(declared(prefetch="Eager"), it.state)[1]["Warm"][:2] == ("False", "Prefetching")
    it.answer({"n1": share(it.epoch, short=5 * GIB)})
    warm = status_of(declared(prefetch="Eager"), it.state)[1]["Warm"]
    assert warm[:2] == ("False", "PrefetchRefused")
    assert "needs 5 GiB more on node n1" in warm[2]


def test_why_a_dataset_is_not_ready() -> None:
    empty = cluster().state
    for work, secret, phase, reason in (
        (IDLE, "", "Pending", "Listing"),
        (Work(is_listing=True), "", "Listing", "Listing"),
        (Work(failure=Failure.of(OriginDenied("no"), 3, None, NOW)), "", "Failed", "OriginDenied"),
        (Work(failure=Failure.of(OriginDenied("no"), 2, None, NOW)), "", "Pending", "Listing"),
        (IDLE, "there is no Secret creds", "Failed", "SecretMissing"),
    ):
        status, conditions = status_of(declared(), empty, work, missing_secret=secret)
        assert (status["phase"], *conditions["Ready"][:2]) == (phase, "False", reason)


def test_a_refresh_that_fails_leaves_it_ready_and_says_what_is_served() -> None:
    it = cluster(registered())
    failed = Work(failure=Failure.of(OriginDenied("403"), 3, None, NOW))
    _, conditions = status_of(declared(), it.state, failed)
    assert conditions["Ready"][0] == "True"
    assert conditions["Refreshed"][:2] == ("False", "OriginDenied")
    assert "403" in conditions["Refreshed"][2]
    assert "is served meanwhile" in conditions["Refreshed"][2]
