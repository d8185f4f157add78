"""The chart given to a real API server by Helm: what is taken, what an upgrade keeps, what the controller may do.

There are no nodes: that its pods run is not tried here. A server is started for it; clusters of people are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import helm
from tests.support.waiting import wait_for

apiserver = pytest.importorskip("tests.support.apiserver", reason="this tree knows no API server for tests")
kube_api = pytest.importorskip("shoal_controller.kube.api", reason="this tree's controller knows no Kubernetes")

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
def release(server: Any) -> Iterator[Any]:
    """The chart, installed. Its definitions are there already."""
    config = helm.helm_python.Config(kubeconfig_path=str(server.kubeconfig), namespace=NAMESPACE)
    with config:
        config.install(str(helm.CHART), helm.RELEASE, VALUES)
        try:
            yield config
        finally:
            config.uninstall(helm.RELEASE)


@pytest.fixture
def account(server: Any, release: Any, tmp_path: Path) -> Any:
    """The server as the controller's account finds it."""
    return server.as_service_account("shoal-controller", NAMESPACE, tmp_path)


def test_an_upgrade_keeps_the_certificate_and_the_record(server: Any, release: Any) -> None:
    """Read back from the server, so that a webhook goes on being believed and no dataset is forgotten."""
    record = {"record.json.gz": "cmVjb3Jk"}
    server.patch(kube_api.SECRETS, "shoal-controller-record", {"data": record}, NAMESPACE)
    before = server.get(kube_api.SECRETS, "shoal-gate", NAMESPACE)["data"]
    release.upgrade(str(helm.CHART), helm.RELEASE, {**VALUES, "logLevel": "debug"})
    assert server.get(kube_api.SECRETS, "shoal-gate", NAMESPACE)["data"] == before
    assert server.get(kube_api.SECRETS, "shoal-controller-record", NAMESPACE)["data"] == record
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
        assert account.get(resource, "shoal-controller", NAMESPACE)


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
    wait_for(lambda: _refusal(lambda: patch("held", image)).startswith("Validating"), timeout_s=30)
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


def test_a_dry_run_of_every_set_of_values_is_taken(server: Any, release: Any) -> None:
    from tests.unit.test_chart import FOREIGN, MATRIX

    for values in MATRIX.values():
        for each in helm.manifests(values):
            if each["apiVersion"] not in FOREIGN:
                _apply_dry(server, each)


def _apply_dry(server: Any, found: Any) -> None:
    """Server-side apply without a trace: defaults, validation, CEL and all."""
    group = found["apiVersion"]
    base = f"/apis/{group}" if "/" in group else f"/api/{group}"
    kinds = {each["kind"]: each for each in server.request("GET", base)["resources"] if "/" not in each["name"]}
    kind, metadata = kinds[found["kind"]], dict(found["metadata"])
    where = ""
    if kind["namespaced"]:
        metadata["namespace"] = NAMESPACE
        where = f"/namespaces/{NAMESPACE}"
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
