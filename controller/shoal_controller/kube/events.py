"""Events: what happened to an object, for whoever runs ``kubectl describe``.

The rule: an event is a courtesy. What fails to be told is logged and nothing waits for it.
"""

from __future__ import annotations

import logging
import secrets
import time

from shoal_controller.kube import conditions
from shoal_controller.kube.api import EVENTS, Api, ApiError, Object

log = logging.getLogger(__name__)

COMPONENT = "shoal-controller"
#: Events about what belongs to no namespace live here.
CLUSTER_NAMESPACE = "default"
MAX_MESSAGE = 1024


async def post(api: Api, about: Object, transition: conditions.Transition) -> None:
    """Tell of a change of `about`, an object with its kind."""
    metadata = about["metadata"]
    namespace = metadata.get("namespace") or CLUSTER_NAMESPACE
    now = conditions.timestamp(time.time())
    event: Object = {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{metadata['name'][:200]}.{secrets.token_hex(8)}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": metadata["name"],
            "namespace": metadata.get("namespace", ""),
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "reason": transition.reason,
        "message": conditions.shortened(transition.message or transition.reason, MAX_MESSAGE),
        "type": "Warning" if transition.is_trouble else "Normal",
        "source": {"component": COMPONENT},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    try:
        await api.create(EVENTS, event, namespace=namespace)
    except ApiError as error:
        log.info("an event of %s was not told: %s", metadata["name"], error)
