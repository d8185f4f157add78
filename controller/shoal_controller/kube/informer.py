"""All objects of one kind, kept up to date by a list and then a watch.

The rule: what is held is what the server said last; a watch that broke is begun again from where it was, and from a new
list where the server no longer knows that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shoal_controller.kube.api import Api, ApiError, Object, Resource, Watched

log = logging.getLogger(__name__)

#: (namespace, name); the namespace of what belongs to the cluster is "".
Key = tuple[str, str]

FIRST_RETRY_S, LAST_RETRY_S = 0.5, 10.0


class Informer:
    """Run `keep` in a task. For one event loop.

    Attributes:
        objects: what is there.
        synced: set once a whole list was taken.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        on_change: Callable[[], None],
        *,
        selector: str = "",
        namespace: str = "",
        trim: Callable[[Object], Object] | None = None,
        on_restart: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        """Hold nothing yet.

        Args:
            on_change: called after every change of what is kept.
            selector: label that objects have; "": all objects.
            namespace: of the objects; "": all namespaces.
            trim: what of an object is kept: all but the managed fields, where None.
            on_restart: called with the resource's plural and why, when a watch is over: ``ended`` by the server,
                ``expired``, or ``failed``.
        """
        self.objects: dict[Key, Object] = {}
        self.synced = asyncio.Event()
        self.resource = resource
        self.namespace = namespace
        self._api = api
        self._on_change = on_change
        self._selector = selector
        self._trim = trim or without_managed_fields
        self._on_restart = on_restart

    def put(self, item: Object) -> None:
        """Take an object that the server answered with, before the watch brings it."""
        known = self.objects.get(key_of(item))
        # Compared as numbers, as the API server's own clients may since 1.35; an older one would undo what is newer.
        if known is None or _number(known) <= _number(item):
            self.objects[key_of(item)] = self._trim(item)

    async def keep(self) -> None:
        """Go on for ever."""
        version, retry_s = "", FIRST_RETRY_S
        while True:
            why = "ended"
            try:
                if not version:
                    version = await self._list()
                watch = self._api.watch(self.resource, version, selector=self._selector, namespace=self.namespace)
                async for watched in watch:
                    version = watched.item["metadata"]["resourceVersion"]
                    retry_s = FIRST_RETRY_S
                    if watched.kind != "BOOKMARK" and self._take(watched):
                        self._on_change()
            except ApiError as error:
                if error.has_expired:
                    version, why = "", "expired"
                else:
                    why = "failed"
                    plural = self.resource.plural
                    log.warning("%s are not watched for now: %s", plural, error, extra={"resource": plural})
            self._on_restart(self.resource.plural, why)
            # Also after a watch that the server ended: one that ends each at once must not be asked without a pause.
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _take(self, watched: Watched) -> bool:
        """Whether anything changed that is kept."""
        key = key_of(watched.item)
        if watched.kind == "DELETED":
            return self.objects.pop(key, None) is not None
        before, self.objects[key] = self.objects.get(key), self._trim(watched.item)
        return before is None or _without_version(before) != _without_version(self.objects[key])

    async def _list(self) -> str:
        listed = await self._api.list(self.resource, selector=self._selector, namespace=self.namespace)
        for item in listed.items:
            # Objects in a list do not say what they are.
            item.setdefault("kind", self.resource.kind)
            item.setdefault("apiVersion", self.resource.api_version)
        self.objects = {key_of(item): self._trim(item) for item in listed.items}
        self.synced.set()
        self._on_change()
        return listed.version


def without_managed_fields(item: Object) -> Object:
    """An object without the notes of who wrote which field: often the larger half."""
    return {**item, "metadata": {key: value for key, value in item["metadata"].items() if key != "managedFields"}}


def _without_version(item: Object) -> Object:
    return {**item, "metadata": {**item["metadata"], "resourceVersion": ""}}


def key_of(item: Object) -> Key:
    metadata = item["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _number(item: Object) -> int:
    version = item["metadata"].get("resourceVersion", "0")
    return int(version) if version.isdecimal() else 0
