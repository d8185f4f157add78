"""The chart given to a real API server by Helm: what is taken, what an upgrade keeps, what the controller may do.

There are no nodes: that its pods run is not tried here. A server is started for it; clusters of people are left alone.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal_controller.kube import api as kube_api
from tests.support import apiserver, helm, kube_clusters
from tests.support.waiting import wait_for

NAMESPACE = "shoal-installed"
TEAM = "shoal-team"
VALUES: dict[str, Any] = {"origins": {"readableSecrets": ["imagenet-s3"]}}
GATE = "shoal.io/dataset-warm"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    if apiserver.assets() is None:
        pytest.skip("no Kubernetes API server: set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver")
    with apiserver.running() as found:
        for name in (NAMESPACE, TEAM):
            found.create(apiserver.NAMESPACES, {"metadata": {"name": name}})
        yield found


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The chart, for servers of any version: one that somebody built says 0.0.0."""
    copy = tmp_path_factory.mktemp("chart") / "shoal"
    shutil.copytree(helm.CHART, copy)
    about = copy / "Chart.yaml"
    about.write_text(re.sub(r"^kubeVersion: .*$", "", about.read_text(), flags=re.MULTILINE))
    return str(copy)


@pytest.fixture(scope="module")
def release(server: Any, chart: str) -> Iterator[Any]:
    """The chart, installed. Its definitions are there already."""
    config = helm.helm_python.Config(kubeconfig_path=str(server.kubeconfig), namespace=NAMESPACE)
    with config:
        config.install(chart, helm.RELEASE, VALUES)
        try:
            yield config
        finally:
            config.uninstall(helm.RELEASE)


@pytest.fixture
def account(server: Any, release: Any, tmp_path: Path) -> Any:
    """The server as the controller's account finds it."""
    return server.as_service_account("shoal-controller", NAMESPACE, tmp_path)


def test_an_upgrade_keeps_the_certificate_and_the_record(server: Any, release: Any, chart: str) -> None:
    """Read back from the server, so that a webhook goes on being believed and no dataset is forgotten."""
    record = {"kept": "cmVjb3Jk"}
    server.patch(kube_api.SECRETS, "shoal-controller-record", {"data": record}, NAMESPACE)
    before = server.get(kube_api.SECRETS, "shoal-gate", NAMESPACE)["data"]
    release.upgrade(chart, helm.RELEASE, {**VALUES, "logLevel": "debug"})
    assert server.get(kube_api.SECRETS, "shoal-gate", NAMESPACE)["data"] == before
    assert record.items() <= server.get(kube_api.SECRETS, "shoal-controller-record", NAMESPACE)["data"].items()
    (webhook,) = server.get(apiserver.WEBHOOKS, "shoal-gate")["webhooks"]
    assert webhook["clientConfig"]["caBundle"] == before["ca.crt"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/v1/secrets", None),
        ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets", None),
        ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/shoal-gate", None),
        ("GET", f"/api/v1/namespaces/{TEAM}/secrets/imagenet-s3", None),
        ("POST", f"/api/v1/namespaces/{NAMESPACE}/secrets", {"metadata": {"name": "a"}}),
        ("POST", f"/api/v1/namespaces/{TEAM}/pods", {"metadata": {"name": "a"}}),
        ("DELETE", f"/api/v1/namespaces/{TEAM}/pods/train", None),
        ("PATCH", "/api/v1/nodes/a", {"spec": {"unschedulable": True}}),
        ("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles", None),
        ("GET", "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", None),
        ("DELETE", "/apis/shoal.io/v1alpha1/datasets/imagenet", None),
        ("POST", "/apis/shoal.io/v1alpha1/datasets", {"metadata": {"name": "a"}}),
        ("GET", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/other", None),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_not_listed_is_forbidden(account: Any, method: str, path: str, body: Any) -> None:
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    with pytest.raises(apiserver.Refused) as refused:
        account.request(method, path, body, kind)
    assert refused.value.status == 403


def test_what_is_listed_is_allowed(server: Any, account: Any) -> None:
    server.create(kube_api.SECRETS, {"metadata": {"name": "imagenet-s3"}}, NAMESPACE)
    assert account.get(kube_api.SECRETS, "imagenet-s3", NAMESPACE)
    assert account.get(kube_api.SECRETS, "shoal-controller-record", NAMESPACE)
    for resource in (kube_api.DATASETS, kube_api.PREFETCHES, kube_api.NODES, kube_api.PODS):
        assert account.list(resource) == []
    for resource in (kube_api.LEASES, kube_api.ENDPOINT_SLICES):
        made = {"metadata": {"name": "shoal-controller"}}
        if resource is kube_api.ENDPOINT_SLICES:
            made |= {"addressType": "IPv4", "endpoints": []}
        account.create(resource, made, NAMESPACE)
        present = account.get(resource, "shoal-controller", NAMESPACE)
        account.request("PUT", resource.path(namespace=NAMESPACE, name="shoal-controller"), present)


def _pod(name: str, *gates: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"app": "train"}},
        "spec": {
            "schedulingGates": [{"name": gate} for gate in gates],
            "containers": [{"name": "train", "image": "train:1"}],
        },
    }


def test_of_a_pod_the_controller_may_change_its_gate_and_affinity_alone(server: Any, account: Any) -> None:
    def patch(name: str, change: Any) -> Any:
        return account.patch(kube_api.PODS, name, change, TEAM)

    for name, gates in (("held", (GATE, "other.io/quota")), ("free", ()), ("theirs", ("other.io/quota",))):
        server.create(kube_api.PODS, _pod(name, *gates), TEAM)

    image = {"spec": {"containers": [{"name": "train", "image": "mine:1"}]}}
    # The server begins to enforce a policy a moment after it was made.
    wait_for(lambda: "ValidatingAdmissionPolicy" in _refusal(lambda: patch("held", image)), timeout_s=30)
    for change, words in [
        (image, "containers"),
        ({"metadata": {"labels": {"app": "mine"}}}, "labels"),
        ({"metadata": {"annotations": {"a": "b"}}}, "annotations"),
        ({"metadata": {"finalizers": ["a.b/c"]}}, "finalizers"),
        ({"spec": {"tolerations": [{"operator": "Exists"}]}}, "tolerations"),
        ({"spec": {"schedulingGates": [{"name": GATE}]}}, "no scheduling gate but its own"),
    ]:
        assert words in _refusal(lambda change=change: patch("held", change)), change
    for name in ("free", "theirs"):
        assert "only pods that it holds" in _refusal(
            lambda name=name: patch(name, {"metadata": {"annotations": {"shoal.io/a": "b"}}})
        )
    preferred = {"weight": 1, "preference": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}}
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}}
    released = patch("held", {"spec": {"schedulingGates": [{"name": "other.io/quota"}], "affinity": affinity}})
    assert [gate["name"] for gate in released["spec"]["schedulingGates"]] == ["other.io/quota"]
    assert "only pods that it holds" in _refusal(lambda: patch("held", {"spec": {"schedulingGates": None}}))
    # Others may do what they could.
    assert server.patch(kube_api.PODS, "free", image, TEAM)["spec"]["containers"][0]["image"] == "mine:1"


def test_the_chart_allows_all_that_the_controller_does(server: Any, account: Any, tmp_path: Path) -> None:
    """The process itself, with the account's token and the chart's certificate."""
    certificates = tmp_path / "gate"
    certificates.mkdir()
    for name, text in server.get(kube_api.SECRETS, "shoal-gate", NAMESPACE)["data"].items():
        (certificates / name).write_bytes(base64.b64decode(text))
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "a.bin").write_bytes(b"a" * 100_000)
    flags = ["--gate-listen", "127.0.0.1:0", "--gate-cert-dir", str(certificates)]
    with kube_clusters.KubeCluster(account.kubeconfig, NAMESPACE, *flags, nodes=1) as cluster:
        spec = {"origin": f"file://{origin}", "secretRef": {"name": "imagenet-s3"}}
        server.create(kube_api.DATASETS, {"metadata": {"name": "imagenet"}, "spec": spec})
        pod = _pod("waits", GATE)
        pod["metadata"]["labels"]["shoal.io/datasets"] = "imagenet"
        server.create(kube_api.PODS, pod, TEAM)
        made = {"metadata": {"name": "warm"}, "spec": {"dataset": "imagenet", "ttlSecondsAfterFinished": 0}}
        server.create(kube_api.PREFETCHES, made, TEAM)
        wait_for(lambda: not server.get(kube_api.PODS, "waits", TEAM)["spec"].get("schedulingGates"))
        wait_for(lambda: not server.has(kube_api.PREFETCHES, "warm", TEAM))
        assert "record.json.gz" in server.get(kube_api.SECRETS, "shoal-controller-record", NAMESPACE)["data"]
        assert server.list(kube_api.EVENTS, TEAM)
        server.delete(kube_api.DATASETS, "imagenet")
        wait_for(lambda: not server.has(kube_api.DATASETS, "imagenet"))
        log = cluster.controller.log_path.read_text()
        assert "orbidden" not in log and "403" not in log


def test_a_dry_run_of_every_set_of_values_is_taken(server: Any) -> None:
    from tests.unit.test_chart import FOREIGN, MATRIX

    for values in MATRIX.values():
        for each in helm.manifests(values):
            if each["apiVersion"] not in FOREIGN:
                _apply_dry(server, each)


def _apply_dry(server: Any, found: Any) -> None:
    """Server-side apply without a trace: defaults, validation, CEL. Not where the release is, which it would join."""
    group = found["apiVersion"]
    base = f"/apis/{group}" if "/" in group else f"/api/{group}"
    kinds = {each["kind"]: each for each in server.request("GET", base)["resources"] if "/" not in each["name"]}
    kind, metadata = kinds[found["kind"]], dict(found["metadata"])
    where = ""
    if kind["namespaced"]:
        metadata["namespace"] = TEAM
        where = f"/namespaces/{TEAM}"
    query = "?dryRun=All&fieldManager=test&force=true&fieldValidation=Strict"
    path = f"{base}{where}/{kind['name']}/{metadata['name']}{query}"
    server.request("PATCH", path, {**found, "metadata": metadata}, "application/apply-patch+yaml")


def _refusal(work: Any) -> str:
    """What the server says against it; "" where it does not."""
    try:
        work()
    except apiserver.Refused as error:
        return str(error)
    return ""
