"""A real Kubernetes API server for tests: one that `KUBECONFIG` names, or etcd and kube-apiserver from a folder.

    KUBEBUILDER_ASSETS    folder with the programs `etcd` and `kube-apiserver`; `kube-scheduler`, where it is there too

Started from the folder it has no nodes and no controllers: what tests need of those they write themselves. Service
accounts get their tokens from the server itself, so that rights are tried with the token that a pod would have.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import pytest
import trustme
import yaml

from shoal.devcluster import ports
from shoal_controller.kube.api import DATASETS, PREFETCHES, Object, Resource
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
CRDS = ROOT / "charts" / "shoal" / "crds"
START_TIMEOUT_S = 90.0

DEFINITIONS = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", is_namespaced=False
)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", is_namespaced=False)
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")
CLUSTER_ROLES = Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", is_namespaced=False)
CLUSTER_ROLE_BINDINGS = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", is_namespaced=False
)
ROLES = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
WEBHOOKS = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "mutatingwebhookconfigurations",
    "MutatingWebhookConfiguration",
    is_namespaced=False,
)
POLICIES = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "validatingadmissionpolicies",
    "ValidatingAdmissionPolicy",
    is_namespaced=False,
)
POLICY_BINDINGS = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "validatingadmissionpolicybindings",
    "ValidatingAdmissionPolicyBinding",
    is_namespaced=False,
)


class Refused(Exception):
    """The API server's answer was no: `status` of HTTP, and its own message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class ApiServer:
    """An API server, spoken to with one token or certificate, one request after another.

    Attributes:
        kubeconfig: a file by which programs find it.
    """

    host: str
    kubeconfig: Path
    _context: ssl.SSLContext
    _headers: Mapping[str, str]

    @classmethod
    def of(cls, kubeconfig: Path) -> ApiServer:
        configuration = kubernetes.client.Configuration()
        kubernetes.config.load_kube_config(str(kubeconfig), client_configuration=configuration)
        context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
        settings = configuration.auth_settings().values()
        headers = {setting["key"]: setting["value"] for setting in settings if setting["in"] == "header"}
        return cls(configuration.host, kubeconfig, context, headers)

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """Raises Refused."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": content_type, "Accept": "application/json"}
        request = urllib.request.Request(self.host + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, context=self._context, timeout=30) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            content = error.read()
            try:
                raise Refused(error.code, json.loads(content)["message"]) from None
            except (ValueError, KeyError):
                raise Refused(error.code, content.decode(errors="replace")) from None
        try:
            return json.loads(content)
        except ValueError:
            return content.decode()

    def get(self, resource: Resource, name: str, namespace: str = "") -> Object:
        found: Object = self.request("GET", resource.path(namespace=namespace, name=name))
        return found

    def list(self, resource: Resource, namespace: str = "") -> list[Object]:
        found: list[Object] = self.request("GET", resource.path(namespace=namespace))["items"]
        return found

    def create(self, resource: Resource, item: Mapping[str, Any], namespace: str = "") -> Object:
        body = {"apiVersion": resource.api_version, "kind": resource.kind, **item}
        made: Object = self.request("POST", resource.path(namespace=namespace), body)
        return made

    def patch(self, resource: Resource, name: str, change: Any, namespace: str = "", subresource: str = "") -> Object:
        path = resource.path(namespace=namespace, name=name, subresource=subresource)
        changed: Object = self.request("PATCH", path, change, "application/merge-patch+json")
        return changed

    def delete(self, resource: Resource, name: str, namespace: str = "") -> None:
        self.request("DELETE", resource.path(namespace=namespace, name=name))

    def has(self, resource: Resource, name: str, namespace: str = "") -> bool:
        try:
            self.get(resource, name, namespace)
        except Refused as error:
            if error.status == 404:
                return False
            raise
        return True

    def status(self, resource: Resource, name: str, namespace: str = "") -> Mapping[str, Any]:
        return self.get(resource, name, namespace).get("status") or {}

    def condition(self, resource: Resource, name: str, kind: str, namespace: str = "") -> Mapping[str, Any]:
        conditions = self.status(resource, name, namespace).get("conditions") or []
        return next((c for c in conditions if c["type"] == kind), {})

    def install_definitions(self) -> None:
        for path in sorted(CRDS.glob("*.yaml")):
            definition = yaml.safe_load(path.read_text())
            with contextlib.suppress(Refused):  # of an earlier test
                self.create(DEFINITIONS, definition)
        for resource in (DATASETS, PREFETCHES):
            wait_for(lambda resource=resource: self._serves(resource))  # type: ignore[misc]

    def _serves(self, resource: Resource) -> bool:
        try:
            self.list(resource)
        except Refused:
            return False
        return True

    def as_service_account(self, name: str, namespace: str, directory: Path) -> ApiServer:
        """The same server, spoken to with a service account's own token; made where it is not there."""
        with contextlib.suppress(Refused):
            self.create(SERVICE_ACCOUNTS, {"metadata": {"name": name}}, namespace)
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600},
        }
        path = SERVICE_ACCOUNTS.path(namespace=namespace, name=name, subresource="token")
        token = self.request("POST", path, request)["status"]["token"]
        kubeconfig = yaml.safe_load(self.kubeconfig.read_text())
        cluster = kubeconfig["clusters"][0]
        made = _kubeconfig(cluster["cluster"], {"token": token})
        target = directory / f"{name}.kubeconfig"
        target.write_text(yaml.safe_dump(made))
        return ApiServer.of(target)


def _kubeconfig(cluster: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": dict(cluster)}],
        "users": [{"name": "u", "user": dict(user)}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }


def assets() -> Path | None:
    """The folder with the programs, if there is one."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    return Path(folder) if folder and (Path(folder) / "kube-apiserver").exists() else None


@contextlib.contextmanager
def running() -> Iterator[ApiServer]:
    """An API server with Shoal's definitions. Skips the test where there is none to be had."""
    if assets() is not None:
        with tempfile.TemporaryDirectory(prefix="shoal-api-") as directory, _started(Path(directory)) as server:
            server.install_definitions()
            yield server
        return
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no Kubernetes API server: set KUBECONFIG, or KUBEBUILDER_ASSETS to a folder with kube-apiserver")
    server = ApiServer.of(Path(os.environ["KUBECONFIG"]))
    server.install_definitions()
    yield server


@contextlib.contextmanager
def _started(directory: Path) -> Iterator[ApiServer]:
    folder = assets()
    assert folder is not None
    client, peer, secure = ports.free_ports(3)
    authority = trustme.CA()
    serving = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(directory / "ca.crt")
    serving.private_key_pem.write_to_path(directory / "api.key")
    (directory / "api.crt").write_bytes(b"".join(blob.bytes() for blob in serving.cert_chain_pems))
    signing = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("sa")
    signing.private_key_pem.write_to_path(directory / "sa.key")
    (directory / "tokens.csv").write_text('test-admin,admin,admin,"system:masters"\n')
    etcd = [
        str(folder / "etcd"),
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{client}",
        f"--advertise-client-urls=http://127.0.0.1:{client}",
        f"--listen-peer-urls=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync",
    ]
    api = [
        str(folder / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{client}",
        "--bind-address=127.0.0.1",
        f"--secure-port={secure}",
        f"--tls-cert-file={directory / 'api.crt'}",
        f"--tls-private-key-file={directory / 'api.key'}",
        f"--cert-dir={directory}",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--service-account-issuer=https://shoal.test",
        f"--service-account-signing-key-file={directory / 'sa.key'}",
        f"--service-account-key-file={directory / 'sa.key'}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--allow-privileged=true",
        # Pods are written by tests, and nobody makes the default account of a namespace.
        "--disable-admission-plugins=ServiceAccount",
    ]
    ca = base64.b64encode((directory / "ca.crt").read_bytes()).decode()
    host = f"https://127.0.0.1:{secure}"
    kubeconfig = directory / "admin.kubeconfig"
    cluster = {"server": host, "certificate-authority-data": ca}
    kubeconfig.write_text(yaml.safe_dump(_kubeconfig(cluster, {"token": "test-admin"})))
    commands = {"etcd": etcd, "kube-apiserver": api}
    if (folder / "kube-scheduler").exists():
        # It waits for the server by itself.
        scheduler = [str(folder / "kube-scheduler"), f"--kubeconfig={kubeconfig}", "--leader-elect=false"]
        commands["kube-scheduler"] = [*scheduler, "--secure-port=0"]
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            log = stack.enter_context((directory / f"{name}.log").open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, stdin=subprocess.DEVNULL)
            stack.callback(_end, process)
            if name == "kube-apiserver":
                server = ApiServer.of(kubeconfig)
                wait_for(lambda server=server: _is_ready(server), START_TIMEOUT_S)  # type: ignore[misc]
        yield server


def _is_ready(server: ApiServer) -> bool:
    try:
        return bool(server.request("GET", "/readyz") == "ok")
    except (Refused, OSError):
        return False


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
