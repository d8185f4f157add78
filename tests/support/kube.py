"""An API server in memory, for what needs no real one: versions, conflicts, merge patches, finalizers, watches."""

from __future__ import annotations

import asyncio
import copy
import itertools
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from shoal_controller.kube.api import ApiError, Listed, Object, Resource, Watched
from shoal_controller.kube.informer import Key, key_of

START = "2026-01-01T00:00:00Z"


class FakeApi:
    """A `shoal_controller.kube.api.Api`. For one event loop.

    Attributes:
        objects: by resource plural, then by key.
        calls: (verb, plural, name) of every write.
        failing: writes and reads raise this while it is set.
        requests: how many came, refused ones too.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[Key, Object]] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.failing: ApiError | None = None
        self.requests = 0
        self._versions = itertools.count(1)
        self._log: dict[str, list[Watched]] = {}
        self._changed = asyncio.Event()

    # What a test says

    def put(self, resource: Resource, item: Mapping[str, Any]) -> Object:
        """Create an object, or replace one whatever its version."""
        stored = copy.deepcopy(dict(item))
        metadata = stored["metadata"]
        known = self._of(resource).get(key_of(stored))
        metadata.setdefault("uid", known["metadata"]["uid"] if known else str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", START)
        metadata["generation"] = _generation(known, stored)
        stored |= {"apiVersion": resource.api_version, "kind": resource.kind}
        return self._store(resource, stored, "MODIFIED" if known else "ADDED")

    def remove(self, resource: Resource, name: str, namespace: str = "") -> None:
        """Delete an object as a person does: with finalizers it only begins to go."""
        item = self._found(resource, name, namespace)
        if item["metadata"].get("finalizers"):
            changed = copy.deepcopy(item)
            changed["metadata"].setdefault("deletionTimestamp", START)
            self._store(resource, changed, "MODIFIED")
        else:
            self._drop(resource, item)

    def read(self, resource: Resource, name: str, namespace: str = "") -> Object:
        return copy.deepcopy(self._found(resource, name, namespace))

    def has(self, resource: Resource, name: str, namespace: str = "") -> bool:
        return (namespace, name) in self._of(resource)

    async def asked(self, times: int) -> None:
        """Wait until so many more requests came."""
        until = self.requests + times
        while self.requests < until:
            await asyncio.sleep(0.001)

    def forget_history(self, resource: Resource) -> None:
        """Watches from before now are told that their version has expired."""
        self._log.setdefault(resource.plural, []).append(Watched("ERROR", {}))
        self._changed.set()

    # What the controller asks

    async def get(self, resource: Resource, name: str, *, namespace: str = "") -> Object:
        await self._arrive()
        return self.read(resource, name, namespace)

    async def list(self, resource: Resource, *, selector: str = "", namespace: str = "") -> Listed:
        await self._arrive()
        items = [item for item in self._of(resource).values() if _matches(item, selector, namespace)]
        return Listed(copy.deepcopy(items), f"L{len(self._log.setdefault(resource.plural, []))}")

    async def watch(
        self, resource: Resource, version: str, *, selector: str = "", namespace: str = ""
    ) -> AsyncIterator[Watched]:
        place = self._place(resource, version)
        while True:
            log = self._log.setdefault(resource.plural, [])
            while place < len(log):
                watched = log[place]
                place += 1
                if watched.kind == "ERROR":
                    raise ApiError("too old resource version", 410)
                if _matches(watched.item, selector, namespace):
                    yield Watched(watched.kind, copy.deepcopy(watched.item))
            self._changed.clear()
            await self._changed.wait()

    async def create(self, resource: Resource, item: Object, *, namespace: str = "") -> Object:
        await self._arrive()
        self.calls.append(("create", resource.plural, item["metadata"]["name"]))
        made = copy.deepcopy(item)
        if resource.is_namespaced:
            made["metadata"]["namespace"] = namespace
        if key_of(made) in self._of(resource):
            raise ApiError(f"{item['metadata']['name']} exists", 409)
        return copy.deepcopy(self.put(resource, made))

    async def replace(self, resource: Resource, item: Object, *, namespace: str = "") -> Object:
        await self._arrive()
        known = self._found(resource, item["metadata"]["name"], namespace)
        self.calls.append(("replace", resource.plural, item["metadata"]["name"]))
        self._check_version(known, item)
        kept = {key: known["metadata"][key] for key in ("namespace", "uid") if key in known["metadata"]}
        return copy.deepcopy(self.put(resource, {**item, "metadata": {**item["metadata"], **kept}}))

    async def patch(
        self, resource: Resource, name: str, change: Mapping[str, Any], *, namespace: str = "", subresource: str = ""
    ) -> Object:
        await self._arrive()
        known = self._found(resource, name, namespace)
        self.calls.append((f"patch {subresource}".strip(), resource.plural, name))
        self._check_version(known, change)
        allowed = {"status"} if subresource else set(change) - {"status"}
        merged = merge_patch(known, {key: value for key, value in change.items() if key in allowed})
        if not merged["metadata"].get("finalizers") and "deletionTimestamp" in merged["metadata"]:
            self._drop(resource, known)
            return merged
        return copy.deepcopy(self.put(resource, merged))

    async def delete(self, resource: Resource, name: str, *, namespace: str = "", uid: str = "") -> None:
        await self._arrive()
        self.calls.append(("delete", resource.plural, name))
        self.remove(resource, name, namespace)

    # How

    def _of(self, resource: Resource) -> dict[Key, Object]:
        return self.objects.setdefault(resource.plural, {})

    def _found(self, resource: Resource, name: str, namespace: str) -> Object:
        found = self._of(resource).get((namespace, name))
        if found is None:
            raise ApiError(f"{resource.plural} {name!r} not found", 404)
        return found

    async def _arrive(self) -> None:
        self.requests += 1
        await asyncio.sleep(0)  # others may be faster
        if self.failing is not None:
            raise self.failing

    def _check_version(self, known: Object, change: Mapping[str, Any]) -> None:
        wanted = (change.get("metadata") or {}).get("resourceVersion")
        if wanted is not None and wanted != known["metadata"]["resourceVersion"]:
            raise ApiError(f"{known['metadata']['name']} was changed", 409)

    def _store(self, resource: Resource, item: Object, kind: str) -> Object:
        item["metadata"]["resourceVersion"] = str(next(self._versions))
        self._of(resource)[key_of(item)] = item
        self._note(resource, kind, item)
        return item

    def _drop(self, resource: Resource, item: Object) -> None:
        del self._of(resource)[key_of(item)]
        gone = copy.deepcopy(item)
        gone["metadata"]["resourceVersion"] = str(next(self._versions))
        self._note(resource, "DELETED", gone)

    def _note(self, resource: Resource, kind: str, item: Object) -> None:
        self._log.setdefault(resource.plural, []).append(Watched(kind, copy.deepcopy(item)))
        self._changed.set()

    def _place(self, resource: Resource, version: str) -> int:
        """Where in the log a watch goes on: after a list (L and a place), or after the version of an object."""
        if version.startswith("L"):
            return int(version[1:])
        for place, watched in enumerate(self._log.setdefault(resource.plural, [])):
            if watched.item and watched.item["metadata"]["resourceVersion"] == version:
                return place + 1
        raise ApiError("too old resource version", 410)


def merge_patch(target: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, Mapping):
        return copy.deepcopy(change)
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _matches(item: Object, selector: str, namespace: str) -> bool:
    metadata = item["metadata"]
    if namespace and metadata.get("namespace") != namespace:
        return False
    return not selector or selector in (metadata.get("labels") or {})


def _generation(known: Object | None, item: Object) -> int:
    if known is None:
        return 1
    generation: int = known["metadata"]["generation"]
    return generation + (known.get("spec") != item.get("spec"))
