"""Shoal against a real API server, with real controllers, cache nodes and origin (`tests.support.apiserver`)."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import trustme

from shoal.cli.control import Control
from shoal.devcluster import DevCluster, ports
from shoal_controller.kube import gate, webhook
from shoal_controller.kube.api import (
    DATASETS,
    ENDPOINT_SLICES,
    EVENTS,
    LEASES,
    NODES,
    PODS,
    PREFETCHES,
    SECRETS,
    Object,
)
from tests.support import apiserver, helm, metrics
from tests.support.apiserver import (
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    NAMESPACES,
    POLICIES,
    POLICY_BINDINGS,
    ROLE_BINDINGS,
    ROLES,
    WEBHOOKS,
    ApiServer,
    Refused,
)
from tests.support.kube_clusters import NAME as ACCOUNT
from tests.support.kube_clusters import KubeCluster
from tests.support.waiting import wait_for

SECRET = "origin-credentials"
_RELEASE = helm.manifests({"origins": {"readableSecrets": [SECRET]}})
#: The rights that the chart gives the controller, and no others.
CLUSTER_RULES = helm.named(_RELEASE, "ClusterRole", ACCOUNT)["rules"]
NAMESPACED_RULES = helm.named(_RELEASE, "Role", ACCOUNT)["rules"]


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with apiserver.running() as found:
        yield found


@pytest.fixture
def namespace(server: ApiServer) -> Iterator[str]:
    """A namespace of the test's own, where the controller's account has its rights; all that it left is removed."""
    name = f"test-{secrets.token_hex(4)}"
    server.create(NAMESPACES, {"metadata": {"name": name}})
    subject = [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": name}]
    group = "rbac.authorization.k8s.io"
    server.create(CLUSTER_ROLES, {"metadata": {"name": name}, "rules": CLUSTER_RULES})
    reference = {"apiGroup": group, "name": name}
    server.create(
        CLUSTER_ROLE_BINDINGS,
        {"metadata": {"name": name}, "roleRef": {**reference, "kind": "ClusterRole"}, "subjects": subject},
    )
    server.create(ROLES, {"metadata": {"name": name}, "rules": NAMESPACED_RULES}, name)
    server.create(
        ROLE_BINDINGS,
        {"metadata": {"name": name}, "roleRef": {**reference, "kind": "Role"}, "subjects": subject},
        name,
    )
    # As the chart makes it: the controller may not.
    server.create(SECRETS, {"metadata": {"name": f"{ACCOUNT}-record"}, "type": "Opaque"}, name)
    try:
        yield name
    finally:
        for resource in (PREFETCHES, DATASETS):
            for item in server.list(resource):
                where = item["metadata"].get("namespace", "")
                with suppress(Refused):
                    server.patch(resource, item["metadata"]["name"], {"metadata": {"finalizers": None}}, where)
                with suppress(Refused):
                    server.delete(resource, item["metadata"]["name"], where)
        for item in server.list(PODS, name):
            # Without a kubelet nobody else ends it.
            path = PODS.path(namespace=name, name=item["metadata"]["name"])
            server.request("DELETE", path, {"gracePeriodSeconds": 0})
        for item in server.list(NODES):
            if item["metadata"]["name"].startswith("node-"):
                server.delete(NODES, item["metadata"]["name"])
        for resource in (CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES):
            server.delete(resource, name)
        server.delete(NAMESPACES, name)


@pytest.fixture
def account(server: ApiServer, namespace: str, tmp_path: Path) -> ApiServer:
    """The API server as the controller's own account sees it."""
    return server.as_service_account(ACCOUNT, namespace, tmp_path)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    directory = tmp_path / "origin"
    (directory / "train").mkdir(parents=True)
    for number in range(8):
        (directory / "train" / f"{number}.bin").write_bytes(bytes([number]) * (256 << 10))
    (directory / "val.bin").write_bytes(b"v" * (512 << 10))
    return directory


@contextmanager
def shoal(account: ApiServer, namespace: str, *args: str, nodes: int = 2) -> Iterator[KubeCluster]:
    with KubeCluster(account.kubeconfig, namespace, *args, nodes=nodes) as cluster:
        yield cluster


def dataset(origin: Path, name: str = "d", **spec: Any) -> Object:
    return {"metadata": {"name": name}, "spec": {"origin": f"file://{origin}"} | spec}


def is_ready(server: ApiServer, name: str = "d") -> bool:
    return server.condition(DATASETS, name, "Ready").get("status") == "True"


def used_bytes(cluster: DevCluster) -> int:
    with Control(cluster.controller_grpc) as control:
        return sum(node.used_bytes for node in control.status().nodes)


def states(cluster: DevCluster) -> list[str]:
    with Control(cluster.controller_grpc) as control:
        return [node.node.state for node in sorted(control.status().nodes, key=lambda n: n.node.topology["host"])]


# Definitions


SPEC = {"origin": "s3://bucket/prefix"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "spec.origin: Required value"),
        ({"origin": "bucket"}, "write a URL such as s3://bucket/prefix"),
        ({"origin": "simplecache::s3://bucket"}, "chained URLs cannot be origins"),
        ({"origin": "s3://me:secret@host/bucket"}, "put it into a Secret"),
        (SPEC | {"options": {"secret": "x"}}, "options are readable by all: put credentials into a Secret"),
        (SPEC | {"options": {"token": "x"}}, "options are readable by all: put credentials into a Secret"),
        (SPEC | {"options": {"client_kwargs": {"verify": False}}}, "must be of type string"),
        (SPEC | {"shardSize": "1000"}, "a shard size is a multiple of 4Ki from 4Ki to 2Gi"),
        (SPEC | {"shardSize": "3Gi"}, "a shard size is a multiple of 4Ki from 4Ki to 2Gi"),
        (SPEC | {"shardSize": "large"}, "a shard size is a multiple of 4Ki from 4Ki to 2Gi"),
        (SPEC | {"replicas": 0}, "should be greater than or equal to 1"),
        (SPEC | {"replicas": 17}, "should be less than or equal to 16"),
        (SPEC | {"quota": "some"}, "a quota is a number of bytes"),
        (SPEC | {"refresh": {}}, "write either interval or cron"),
        (SPEC | {"refresh": {"interval": "1h", "cron": "0 3 * * *"}}, "write either interval or cron"),
        (SPEC | {"refresh": {"interval": "30s"}}, "an interval is at least 1m"),
        (SPEC | {"refresh": {"interval": "daily"}}, "spec.refresh.interval"),
        (SPEC | {"refresh": {"cron": "daily"}}, "spec.refresh.cron"),
        (SPEC | {"prefetch": "Sometimes"}, 'supported values: "Eager", "OnDemand"'),
        (SPEC | {"secretRef": {}}, "spec.secretRef.name: Required value"),
        (SPEC | {"secretRef": {"name": "Bad_Name"}}, "spec.secretRef.name"),
    ],
)
def test_wrong_datasets_are_refused_with_the_reason(server: ApiServer, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as caught:
        server.create(DATASETS, {"metadata": {"name": "wrong"}, "spec": spec})
    assert caught.value.status == 422
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "spec.dataset: Required value"),
        ({"dataset": "Upper"}, "spec.dataset"),
        ({"dataset": "d", "paths": []}, "spec.paths"),
        ({"dataset": "d", "paths": ["/train"]}, "write train/, not /train"),
        ({"dataset": "d", "paths": ["train/*"]}, "paths are beginnings and not patterns"),
        ({"dataset": "d", "snapshot": "xyz"}, "spec.snapshot"),
        ({"dataset": "d", "ttlSecondsAfterFinished": -1}, "should be greater than or equal to 0"),
    ],
)
def test_wrong_prefetches_are_refused_with_the_reason(server: ApiServer, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused) as caught:
        server.create(PREFETCHES, {"metadata": {"name": "wrong"}, "spec": spec}, "default")
    assert words in str(caught.value)


def test_a_name_that_no_dataset_can_have_is_refused(server: ApiServer) -> None:
    with pytest.raises(Refused, match="at most 63 characters"):
        server.create(DATASETS, {"metadata": {"name": "x" * 64}, "spec": SPEC})


def test_what_cannot_change_is_refused_and_the_rest_is_not(server: ApiServer, namespace: str) -> None:
    spec = SPEC | {"options": {"endpoint_url": "http://a"}, "shardSize": "64Mi"}
    made = server.create(DATASETS, {"metadata": {"name": "fixed"}, "spec": spec})
    assert (made["spec"]["replicas"], made["spec"]["prefetch"], made["spec"]["quota"]) == (1, "OnDemand", "0")
    for change, words in (
        ({"origin": "s3://bucket/other"}, "the origin cannot change"),
        ({"shardSize": "128Mi"}, "the shard size is part of what is cached"),
        ({"options": {"endpoint_url": "http://b"}}, "endpoint_url says where the origin is"),
        ({"options": None}, "endpoint_url says where the origin is"),
    ):
        with pytest.raises(Refused, match=words):
            server.patch(DATASETS, "fixed", {"spec": change})
    changed = server.patch(
        DATASETS, "fixed", {"spec": {"replicas": 3, "pin": True, "options": {"anon": "true"}, "quota": "3Ti"}}
    )
    assert changed["metadata"]["generation"] == 2
    server.create(PREFETCHES, {"metadata": {"name": "fixed"}, "spec": {"dataset": "d", "paths": ["a"]}}, namespace)
    for change in ({"dataset": "e"}, {"paths": ["b"]}, {"paths": None}, {"snapshot": "abcd"}):
        with pytest.raises(Refused, match="what a Prefetch fetches cannot change"):
            server.patch(PREFETCHES, "fixed", {"spec": change}, namespace)
    server.patch(PREFETCHES, "fixed", {"spec": {"priority": 5, "ttlSecondsAfterFinished": 60}}, namespace)


# Datasets and prefetches


def test_a_dataset_from_apply_to_freed_space(
    server: ApiServer, account: ApiServer, namespace: str, origin: Path
) -> None:
    with shoal(account, namespace) as cluster:
        server.create(DATASETS, dataset(origin, replicas=2))
        wait_for(lambda: is_ready(server))
        status = server.status(DATASETS, "d")
        total = (8 * 256 + 512) << 10
        assert (status["phase"], status["objects"], status["bytes"]) == ("Ready", 9, total)
        assert (status["cachedPercent"], status["observedGeneration"]) == (0, 1)

        fs = fsspec.filesystem("shoal", endpoint=cluster.endpoint, skip_instance_cache=True)
        assert fs.cat_file("d/train/3.bin") == bytes([3]) * (256 << 10)
        wait_for(lambda: server.status(DATASETS, "d")["cachedBytes"] >= 256 << 10)
        assert server.condition(DATASETS, "d", "Warm")["reason"] == "OnDemand"

        server.create(PREFETCHES, {"metadata": {"name": "warm"}, "spec": {"dataset": "d"}}, namespace)
        wait_for(lambda: server.condition(PREFETCHES, "warm", "Complete", namespace).get("status") == "True")
        done = server.status(PREFETCHES, "warm", namespace)
        assert (done["percent"], done["bytesDone"], done["bytesTotal"]) == (100, 2 * total, 2 * total)
        wait_for(lambda: server.status(DATASETS, "d")["cachedPercent"] == 100)
        assert server.condition(DATASETS, "d", "Warm")["status"] == "True"
        assert [node["bytes"] for node in server.status(DATASETS, "d")["nodes"]] == [total, total]
        wait_for(lambda: used_bytes(cluster) >= 2 * total)

        reasons = {e["reason"] for e in server.list(EVENTS) if e["involvedObject"]["name"] in ("d", "warm")}
        assert {"Serving", "Cached"} <= reasons

        server.delete(DATASETS, "d")
        wait_for(lambda: not server.has(DATASETS, "d"))
        wait_for(lambda: used_bytes(cluster) == 0)


def test_failures_have_reasons(server: ApiServer, account: ApiServer, namespace: str, origin: Path) -> None:
    with shoal(account, namespace, nodes=1):
        server.create(DATASETS, dataset(origin / "nowhere", "lost"))
        server.create(DATASETS, dataset(origin, secretRef={"name": SECRET}))
        server.create(PREFETCHES, {"metadata": {"name": "none"}, "spec": {"dataset": "d", "paths": ["x"]}}, namespace)
        wait_for(lambda: server.condition(DATASETS, "lost", "Ready").get("reason") == "OriginNotFound")
        wait_for(lambda: server.condition(DATASETS, "d", "Ready").get("reason") == "SecretMissing")
        assert server.condition(PREFETCHES, "none", "Complete", namespace)["reason"] == "NoDataset"
        data = {"options.json": base64.b64encode(b"{}").decode()}
        server.create(SECRETS, {"metadata": {"name": SECRET}, "data": data}, namespace)
        wait_for(lambda: is_ready(server))
        wait_for(lambda: server.condition(PREFETCHES, "none", "Failed", namespace).get("reason") == "NothingToFetch")
        server.delete(DATASETS, "lost")
        wait_for(lambda: not server.has(DATASETS, "lost"))


def test_a_prefetch_that_does_not_fit_says_which_node_lacks_what(
    server: ApiServer, account: ApiServer, namespace: str, origin: Path
) -> None:
    for number in range(3):
        with (origin / f"large-{number}").open("wb") as file:
            file.truncate(32 << 20)
    with shoal(account, namespace, nodes=1):
        server.create(DATASETS, dataset(origin, prefetch="Eager"))
        server.create(PREFETCHES, {"metadata": {"name": "all"}, "spec": {"dataset": "d"}}, namespace)
        wait_for(lambda: server.condition(PREFETCHES, "all", "Failed", namespace).get("reason") == "DoesNotFit")
        assert "more on node" in server.condition(PREFETCHES, "all", "Failed", namespace)["message"]
        wait_for(lambda: server.condition(DATASETS, "d", "Warm").get("reason") == "PrefetchRefused")


# Leaders


def test_a_leader_that_was_killed_is_followed_with_nothing_lost_and_nothing_done_twice(
    server: ApiServer, account: ApiServer, namespace: str, origin: Path
) -> None:
    with shoal(account, namespace) as cluster:
        server.create(DATASETS, dataset(origin, prefetch="Eager"))
        wait_for(lambda: server.status(DATASETS, "d").get("cachedPercent") == 100)
        standby = cluster.standby()
        before = server.status(DATASETS, "d")
        with Control(cluster.controller_grpc) as control:
            epoch, jobs = control.status().epoch, {job.id for job in control.prefetches()}
        # What a listing would now find is another snapshot, so a second listing would show.
        (origin / "new.bin").write_bytes(b"n")

        killed_s = time.monotonic()
        cluster.controller.kill()
        standby.wait_until_ready()
        took_s = time.monotonic() - killed_s
        print(f"the standby led {took_s:.1f} s after the leader was killed")
        assert server.get(LEASES, ACCOUNT, namespace)["spec"]["holderIdentity"] == "b"
        wait_for(lambda: _port(server, namespace) == int(str(standby.ready["http"]).rpartition(":")[2]))

        wait_for(lambda: states(cluster) == ["up", "up"])
        with Control(cluster.controller_grpc) as control:
            assert {job.id for job in control.prefetches()} == jobs
            assert control.status().epoch == epoch
        server.create(PREFETCHES, {"metadata": {"name": "again"}, "spec": {"dataset": "d"}}, namespace)
        wait_for(lambda: server.condition(PREFETCHES, "again", "Complete", namespace).get("status") == "True")
        after = server.status(DATASETS, "d")
        assert (after["snapshot"], after["refreshedAt"]) == (before["snapshot"], before["refreshedAt"])
        assert "snapshot" in standby.log_path.read_text()  # it came from a node
        with Control(cluster.controller_grpc) as control:
            assert control.refresh_dataset("d").objects == 10

        # The old one comes back as a standby, and leads at once when the other one stops in good order.
        cluster.controller.spawn()
        wait_for(lambda: cluster.controller.log_path.read_text().count("a stands by") >= 1)
        standby.stop()
        cluster.controller.wait_until_ready()
        wait_for(lambda: server.status(DATASETS, "d")["objects"] == 10)


def _port(server: ApiServer, namespace: str) -> int:
    try:
        found = server.get(ENDPOINT_SLICES, ACCOUNT, namespace)
    except Refused:
        return 0
    return int(next(port["port"] for port in found["ports"] if port["name"] == "http"))


def test_a_controller_that_is_killed_alone_goes_on(
    server: ApiServer, account: ApiServer, namespace: str, origin: Path
) -> None:
    with shoal(account, namespace, nodes=1) as cluster:
        server.create(DATASETS, dataset(origin))
        wait_for(lambda: is_ready(server))
        cluster.controller.kill()
        # What is written meanwhile is found.
        server.create(PREFETCHES, {"metadata": {"name": "warm"}, "spec": {"dataset": "d"}}, namespace)
        server.create(DATASETS, dataset(origin / "train", "second"))
        server.delete(DATASETS, "d")
        cluster.controller.start()
        wait_for(lambda: is_ready(server, "second"))
        wait_for(lambda: not server.has(DATASETS, "d"))


# Rights


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/v1/secrets", None),
        ("GET", "/api/v1/namespaces/kube-system/secrets", None),
        ("GET", "/api/v1/namespaces/{namespace}/secrets", None),
        ("GET", "/api/v1/namespaces/{namespace}/secrets/other", None),
        ("GET", "/api/v1/namespaces/default/secrets/" + SECRET, None),
        ("DELETE", "/api/v1/namespaces/{namespace}/secrets/" + ACCOUNT + "-record", None),
        ("POST", "/api/v1/namespaces/{namespace}/secrets", {"metadata": {"name": "x"}}),
        ("POST", "/api/v1/namespaces/{namespace}/pods", {"metadata": {"name": "x"}}),
        ("DELETE", "/api/v1/namespaces/{namespace}/pods/x", None),
        ("POST", "/api/v1/namespaces/{namespace}/pods/x/exec?command=sh", {}),
        ("POST", "/api/v1/namespaces/{namespace}/pods/x/binding", {"metadata": {"name": "x"}}),
        ("PATCH", "/api/v1/nodes/n1", {"spec": {"unschedulable": True}}),
        ("PATCH", "/api/v1/nodes/n1/status", {}),
        ("POST", "/api/v1/namespaces/{namespace}/serviceaccounts/" + ACCOUNT + "/token", {}),
        ("GET", "/api/v1/configmaps", None),
        ("DELETE", "/apis/shoal.io/v1alpha1/datasets/d", None),
        ("POST", "/apis/shoal.io/v1alpha1/datasets", {"metadata": {"name": "x"}}),
        ("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", {"metadata": {"name": "x"}}),
        ("GET", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", None),
        ("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", None),
        ("PUT", "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/other", {"metadata": {"name": "other"}}),
        (
            "PUT",
            "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/other",
            {"metadata": {"name": "other"}},
        ),
    ],
)
def test_what_is_not_listed_is_denied(
    account: ApiServer, namespace: str, method: str, path: str, body: Mapping[str, Any] | None
) -> None:
    with pytest.raises(Refused, match="forbidden") as caught:
        account.request(
            method,
            path.format(namespace=namespace),
            body,
            "application/merge-patch+json" if method == "PATCH" else "application/json",
        )
    assert caught.value.status == 403


# Pods


def node(name: str, **spec: Any) -> Object:
    return {"metadata": {"name": name, "labels": {gate.HOSTNAME: f"{name}.host"}}, "spec": spec}


def make_nodes(server: ApiServer, *names: str) -> None:
    for name in names:
        server.create(NODES, node(name))
        ready = {"type": "Ready", "status": "True", "reason": "x", "message": "x"}
        room = {"cpu": "64", "memory": "256Gi", "pods": "110"}
        server.patch(
            NODES, name, {"status": {"conditions": [ready], "capacity": room, "allocatable": room}}, "", "status"
        )


def pod(name: str, text: str | None = None, **annotations: str) -> Object:
    labels = {} if text is None else {gate.KEY: text}
    containers = [{"name": "c", "image": "train"}]
    return {
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"containers": containers, "tolerations": [{"operator": "Exists"}]},
    }


def gates(server: ApiServer, name: str, namespace: str) -> list[str]:
    return [each["name"] for each in server.get(PODS, name, namespace)["spec"].get("schedulingGates") or []]


@contextmanager
def registered(server: ApiServer, namespace: str, authority: trustme.CA, port: int) -> Iterator[None]:
    bundle = base64.b64encode(authority.cert_pem.bytes()).decode()
    made = {
        "metadata": {"name": namespace},
        "webhooks": [
            {
                "name": "gate.shoal.io",
                "admissionReviewVersions": ["v1"],
                "clientConfig": {"url": f"https://127.0.0.1:{port}{webhook.PATH}", "caBundle": bundle},
                "failurePolicy": "Ignore",
                "sideEffects": "None",
                "timeoutSeconds": 2,
                "objectSelector": {"matchExpressions": [{"key": gate.KEY, "operator": "Exists"}]},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
            }
        ],
    }
    server.create(WEBHOOKS, made)
    try:
        yield
    finally:
        server.delete(WEBHOOKS, namespace)


def test_a_pod_is_held_until_its_data_is_there_and_goes_to_it(
    server: ApiServer, account: ApiServer, namespace: str, origin: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificates = tmp_path / "gate"
    certificates.mkdir()
    certificate.private_key_pem.write_to_path(certificates / "tls.key")
    (certificates / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    (port,) = ports.free_ports(1)
    args = ["--gate-listen", f"127.0.0.1:{port}", "--gate-cert-dir", str(certificates)]
    make_nodes(server, "node-0", "node-1", "node-9")  # the last one has no cache
    with (
        bounded(server, namespace),
        shoal(account, namespace, *args) as cluster,
        registered(server, namespace, authority, port),
    ):

        def is_held(name: str) -> bool:
            """Made until the API server has heard of the webhook, which it does in its own time."""
            with suppress(Refused):
                server.request("DELETE", PODS.path(namespace=namespace, name=name), {"gracePeriodSeconds": 0})
            server.create(PODS, pod(name, "d", **{gate.KEY: "d[>=90%]"}), namespace)
            return gates(server, name, namespace) == [gate.GATE]

        wait_for(lambda: is_held("train"))
        server.create(PODS, pod("other"), namespace)
        assert gates(server, "other", namespace) == []
        with pytest.raises(Refused, match=r"shoal.io/datasets: .*write NAME"):
            server.create(PODS, pod("wrong", "d", **{gate.KEY: "d[90]"}), namespace)

        def is_bounded() -> bool:
            """Once the API server has heard of the policy."""
            try:
                account.patch(PODS, "other", {"metadata": {"annotations": {"a": "b"}}}, namespace)
            except Refused as error:
                return "only pods that it holds" in str(error)
            return False

        wait_for(is_bounded)
        wait_for(lambda: "WaitingForData" in _reasons(server, namespace, "train"))
        assert gates(server, "train", namespace) == [gate.GATE]
        server.create(DATASETS, dataset(origin))
        wait_for(lambda: gates(server, "train", namespace) == [])
        assert server.status(DATASETS, "d")["cachedPercent"] >= 90
        assert "Released" in _reasons(server, namespace, "train")
        affinity = server.get(PODS, "train", namespace)["spec"]["affinity"]["nodeAffinity"]
        terms = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        hosts = {host for term in terms for host in term["preference"]["matchExpressions"][0]["values"]}
        assert hosts <= {"node-0.host", "node-1.host"}
        assert max(term["weight"] for term in terms) == 100
        if (apiserver.assets() or Path()).joinpath("kube-scheduler").exists():
            wait_for(lambda: server.get(PODS, "train", namespace)["spec"].get("nodeName") in ("node-0", "node-1"))

        text = metrics.scrape(int(cluster.endpoint.rpartition(":")[2]))
        metrics.check(text)
        told = metrics.samples(text)
        assert told["shoal_operator_gate_wait_seconds_count", "warm"] == 1
        assert told["shoal_operator_webhook_requests_total", "gated"] >= 1
        assert told["shoal_operator_webhook_requests_total", "refused"] == 1
        assert told["shoal_operator_api_requests_total", "200", "pods", "patch"] >= 1
        assert told["shoal_operator_watched_objects", "nodes"] == 3
        names = metrics.names(metrics.own(text))
        assert metrics.documented(*metrics.PAGES, prefix="shoal_(?:operator|controller)_") <= names

        cluster.controller.kill()
        # With the webhook down nobody is kept from starting.
        for name, text in (("unrelated", None), ("labelled", "d")):
            server.create(PODS, pod(name, text), namespace)
            assert gates(server, name, namespace) == []


@contextmanager
def bounded(server: ApiServer, namespace: str) -> Iterator[None]:
    """With the chart's policy of what the controller may change of a pod, for the account of this namespace."""
    with ExitStack() as stack:
        for kind, resource in (
            ("ValidatingAdmissionPolicy", POLICIES),
            ("ValidatingAdmissionPolicyBinding", POLICY_BINDINGS),
        ):
            text = json.dumps(helm.named(_RELEASE, kind, "shoal-gate"))
            made = json.loads(text.replace(f":{helm.NAMESPACE}:{ACCOUNT}", f":{namespace}:{ACCOUNT}"))
            server.create(resource, made)
            stack.callback(server.delete, resource, made["metadata"]["name"])
        yield


def _reasons(server: ApiServer, namespace: str, name: str) -> set[str]:
    return {e["reason"] for e in server.list(EVENTS, namespace) if e["involvedObject"]["name"] == name}


def test_a_cordoned_node_is_drained_and_comes_back(
    server: ApiServer, account: ApiServer, namespace: str, origin: Path
) -> None:
    make_nodes(server, "node-0", "node-1")
    with shoal(account, namespace) as cluster:
        server.create(DATASETS, dataset(origin, prefetch="Eager"))
        wait_for(lambda: server.status(DATASETS, "d").get("cachedPercent") == 100)
        server.patch(NODES, "node-0", {"spec": {"unschedulable": True}})
        wait_for(lambda: states(cluster) == ["draining", "up"])
        with Control(cluster.controller_grpc) as control:
            wait_for(lambda: any(node.drained for node in control.status().nodes))
        wait_for(lambda: server.status(DATASETS, "d").get("cachedPercent") == 100)
        server.patch(NODES, "node-0", {"spec": {"unschedulable": None}})
        wait_for(lambda: states(cluster) == ["up", "up"])
        server.delete(NODES, "node-1")
        wait_for(lambda: states(cluster) == ["up", "draining"])
