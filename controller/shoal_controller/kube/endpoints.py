"""Where the leader is: the one EndpointSlice of a Service without a selector.

A standby is ready, for it does all that a standby can, so readiness cannot choose between the replicas; and a label on
the leader's pod would need the right to change pods. The Service's address stays one, so connections of nodes and
clients find a new leader without asking the name service again.
"""

from __future__ import annotations

import ipaddress

from shoal_controller.kube.api import ENDPOINT_SLICES, Api, ApiError, Object

MANAGED_BY = "shoal-controller"


def endpoint_slice(name: str, address: str, ports: dict[str, int]) -> Object:
    """The slice of the Service `name` that leads to `address`."""
    return {
        "apiVersion": ENDPOINT_SLICES.api_version,
        "kind": ENDPOINT_SLICES.kind,
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/service-name": name,
                "endpointslice.kubernetes.io/managed-by": MANAGED_BY,
            },
        },
        "addressType": f"IPv{ipaddress.ip_address(address).version}",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": port, "port": number, "protocol": "TCP"} for port, number in sorted(ports.items())],
    }


async def publish(api: Api, namespace: str, name: str, address: str, ports: dict[str, int]) -> None:
    """Lead the Service to this replica. Raises ApiError."""
    wanted = endpoint_slice(name, address, ports)
    try:
        present = await api.get(ENDPOINT_SLICES, name, namespace=namespace)
    except ApiError as error:
        if not error.is_missing:
            raise
        await api.create(ENDPOINT_SLICES, wanted, namespace=namespace)
        return
    wanted["metadata"] |= {"resourceVersion": present["metadata"]["resourceVersion"]}
    await api.replace(ENDPOINT_SLICES, wanted, namespace=namespace)
