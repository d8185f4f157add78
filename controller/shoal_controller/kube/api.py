"""The API server: requests, lists and watches of plain JSON objects. The one module that imports the `kubernetes`
client, which brings the configuration: in a pod the service account's token, which is read again as it is renewed; else
a kubeconfig with all that one may hold. Requests go through aiohttp.

The rule: every request but a watch has a deadline, and every failure leaves here as an `ApiError`.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp

from shoal.errors import ShoalError, Unavailable

#: A Kubernetes object as JSON. Parsed into values by the module of its noun.
Object = dict[str, Any]

TIMEOUT_S = 10.0
#: The server ends a watch after so long; then it is begun anew from where it was.
WATCH_S = 300
#: A watch of which nothing is heard for so long after that is dead.
WATCH_GRACE_S = 30.0
#: Objects of a list come in pages.
PAGE = 500

MERGE_PATCH = "application/merge-patch+json"


class ApiError(Unavailable):
    """The API server said no, or nothing: read the message, it is its own.

    Attributes:
        status: of HTTP; 0 where there was no answer.
    """

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status

    @property
    def is_missing(self) -> bool:
        return self.status == 404

    @property
    def is_conflict(self) -> bool:
        """Somebody else was faster: read again."""
        return self.status == 409

    @property
    def has_expired(self) -> bool:
        """The version to go on from is too old: list again."""
        return self.status == 410


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object and where it is served."""

    group: str
    version: str
    plural: str
    kind: str
    is_namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, *, namespace: str = "", name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root]
        if namespace and self.is_namespaced:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part]
        return "/".join(parts)


DATASETS = Resource("shoal.io", "v1alpha1", "datasets", "Dataset", is_namespaced=False)
PREFETCHES = Resource("shoal.io", "v1alpha1", "prefetches", "Prefetch")
NODES = Resource("", "v1", "nodes", "Node", is_namespaced=False)
PODS = Resource("", "v1", "pods", "Pod")
SECRETS = Resource("", "v1", "secrets", "Secret")
EVENTS = Resource("", "v1", "events", "Event")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")


@dataclass(frozen=True, slots=True)
class Listed:
    items: list[Object]
    version: str  #: of the list, to watch on from


@dataclass(frozen=True, slots=True)
class Watched:
    """One line of a watch. `kind` is ADDED, MODIFIED, DELETED or BOOKMARK."""

    kind: str
    item: Object


class Api(Protocol):
    """What of an API server is used here. All methods raise ApiError."""

    async def get(self, resource: Resource, name: str, *, namespace: str = "") -> Object: ...

    async def list(self, resource: Resource, *, selector: str = "", namespace: str = "") -> Listed:
        """All objects with the label `selector`, in one namespace or all."""
        ...

    def watch(
        self, resource: Resource, version: str, *, selector: str = "", namespace: str = ""
    ) -> AsyncIterator[Watched]:
        """What changes after `version`, until the server ends it."""
        ...

    async def create(self, resource: Resource, item: Object, *, namespace: str = "") -> Object: ...

    async def replace(self, resource: Resource, item: Object, *, namespace: str = "") -> Object:
        """Put `item` in the place of the version that it names. A conflict where that is not the present one."""
        ...

    async def patch(
        self, resource: Resource, name: str, change: Mapping[str, Any], *, namespace: str = "", subresource: str = ""
    ) -> Object:
        """Apply a merge patch (RFC 7386)."""
        ...

    async def delete(self, resource: Resource, name: str, *, namespace: str = "", uid: str = "") -> None: ...


#: Counts a request: verb as in Kubernetes' rights, resource, status of HTTP (0: no answer), seconds.
Answered = Callable[[str, str, int, float], None]
_METHODS = {"get": "GET", "list": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}


class HttpApi:
    """An `Api` over HTTPS. For one event loop."""

    def __init__(self, configuration: Any, answered: Answered = lambda *_: None) -> None:
        """Use `connect`. `configuration` is a `kubernetes.client.Configuration`."""
        self._configuration = configuration
        self._answered = answered
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=_ssl_context(configuration), limit=32))

    @classmethod
    async def connect(cls, answered: Answered = lambda *_: None) -> HttpApi:
        """Use the pod's service account, or else the kubeconfig that ``KUBECONFIG`` or the home directory names.

        Args:
            answered: counts requests.

        Raises:
            ShoalError: there is neither.
        """
        return cls(await asyncio.to_thread(_configuration), answered)

    async def close(self) -> None:
        await self._session.close()

    async def get(self, resource: Resource, name: str, *, namespace: str = "") -> Object:
        return await self._request("get", resource, resource.path(namespace=namespace, name=name))

    async def list(self, resource: Resource, *, selector: str = "", namespace: str = "") -> Listed:
        items: list[Object] = []
        query = {"limit": str(PAGE)} | ({"labelSelector": selector} if selector else {})
        while True:
            page = await self._request("list", resource, resource.path(namespace=namespace), query=query)
            items += page.get("items") or []
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return Listed(items, metadata.get("resourceVersion", ""))
            query["continue"] = metadata["continue"]

    async def watch(
        self, resource: Resource, version: str, *, selector: str = "", namespace: str = ""
    ) -> AsyncIterator[Watched]:
        query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
        query |= {"timeoutSeconds": str(WATCH_S)} | ({"labelSelector": selector} if selector else {})
        path = resource.path(namespace=namespace)
        url = self._configuration.host + path
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=WATCH_S + WATCH_GRACE_S)
        since, status = time.monotonic(), 0
        try:
            async with self._session.get(url, params=query, headers=self._headers(), timeout=timeout) as response:
                status = response.status
                if status >= 400:
                    raise _refused("watch", path, status, await response.read())
                pending = b""
                # By hand, because an object may be larger than aiohttp's longest line.
                async for received in response.content.iter_any():
                    *lines, pending = (pending + received).split(b"\n")
                    for line in filter(None, lines):
                        yield _watched(json.loads(line), resource)
        except ApiError:
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _unreachable(self._configuration.host, error) from error
        finally:
            self._answered("watch", resource.plural, status, time.monotonic() - since)

    async def create(self, resource: Resource, item: Object, *, namespace: str = "") -> Object:
        return await self._request("create", resource, resource.path(namespace=namespace), body=item)

    async def replace(self, resource: Resource, item: Object, *, namespace: str = "") -> Object:
        path = resource.path(namespace=namespace, name=item["metadata"]["name"])
        return await self._request("update", resource, path, body=item)

    async def patch(
        self, resource: Resource, name: str, change: Mapping[str, Any], *, namespace: str = "", subresource: str = ""
    ) -> Object:
        path = resource.path(namespace=namespace, name=name, subresource=subresource)
        return await self._request("patch", resource, path, body=change, content_type=MERGE_PATCH)

    async def delete(self, resource: Resource, name: str, *, namespace: str = "", uid: str = "") -> None:
        options = {"preconditions": {"uid": uid}} if uid else {}
        await self._request("delete", resource, resource.path(namespace=namespace, name=name), body=options)

    async def _request(
        self,
        verb: str,
        resource: Resource,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        method, since, status = _METHODS[verb], time.monotonic(), 0
        try:
            async with self._session.request(
                method,
                self._configuration.host + path,
                params=query,
                data=None if body is None else json.dumps(body).encode(),
                headers=self._headers() | ({"Content-Type": content_type} if body is not None else {}),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            ) as response:
                content = await response.read()
                status = response.status
                if status >= 400:
                    raise _refused(method, path, status, content)
                answer: Object = json.loads(content)
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _unreachable(self._configuration.host, error) from error
        finally:
            self._answered(verb, resource.plural, status, time.monotonic() - since)

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "shoal-controller"}
        # Asking renews a token that expires.
        for setting in self._configuration.auth_settings().values():
            if setting and setting.get("in") == "header" and setting.get("value"):
                headers[setting["key"]] = setting["value"]
        return headers


def _configuration() -> Any:
    """Blocks: an exec plugin may run. Raises ShoalError."""
    import kubernetes.client
    import kubernetes.config

    configuration = kubernetes.client.Configuration()
    try:
        in_cluster = Path(kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME).exists()
        if in_cluster and not os.environ.get("KUBECONFIG"):
            kubernetes.config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes.config.load_kube_config(client_configuration=configuration)
    except kubernetes.config.ConfigException as error:
        raise ShoalError(
            f"no Kubernetes API server is known ({error}): run in a pod with a service account, or name a kubeconfig "
            "in KUBECONFIG; without --kubernetes none is needed"
        ) from error
    return configuration


def _ssl_context(configuration: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file or None)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _watched(line: Object, resource: Resource) -> Watched:
    if line["type"] == "ERROR":
        status = line["object"]
        raise ApiError(f"watching {resource.plural}: {status.get('message', status)}", int(status.get("code", 0)))
    return Watched(line["type"], line["object"])


def _refused(method: str, path: str, status: int, content: bytes) -> ApiError:
    try:
        message = json.loads(content)["message"]
    except (ValueError, KeyError, TypeError):
        message = content[:200].decode(errors="replace")
    return ApiError(f"{method} {path}: {message} (HTTP {status})", status)


def _unreachable(host: str, error: BaseException) -> ApiError:
    return ApiError(f"the API server at {host} does not answer ({error!r})")
