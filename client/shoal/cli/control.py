"""The controller's gRPC service as typed calls that raise `shoal.errors`.

The rule: every call has a deadline, and a controller that is not there is told apart from an origin that is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from shoal.errors import ClusterUnavailable, ShoalError
from shoal.wire import grpc_errors
from shoal.wire import shoal_pb2 as pb
from shoal.wire.shoal_pb2_grpc import ControlStub

CALL_TIMEOUT_S = 30.0
#: Listing an origin of many millions of objects takes its time; the controller gives up by itself long before.
LISTING_TIMEOUT_S = 3600.0
#: Every node loads the snapshot and looks at what it has before it says whether its share fits.
PLANNING_TIMEOUT_S = 600.0
#: A watch begins anew after so long, so that one on a connection that died silently does not wait for ever.
WATCH_TIMEOUT_S = 60.0

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the controller is inside the cluster, a proxy leads out of it
    ("grpc.min_reconnect_backoff_ms", 5000),  # also the time limit of one attempt to connect
)


class Control:
    """A channel to the controller. A context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub: Any = ControlStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def add_dataset(
        self,
        name: str,
        origin: str,
        *,
        shard_size: int,
        replicas: int,
        storage_options: str,
        pinned: bool = False,
        quota_bytes: int = 0,
        direct: bool = False,
    ) -> pb.Dataset:
        request = pb.AddDatasetRequest(
            name=name,
            origin=origin,
            shard_size=shard_size,
            replicas=replicas,
            storage_options=storage_options,
            pinned=pinned,
            quota_bytes=quota_bytes,
            direct=direct,
        )
        answer: pb.Dataset = self._call("AddDataset", request, LISTING_TIMEOUT_S)
        return answer

    def datasets(self) -> list[pb.Dataset]:
        answer: pb.ListDatasetsResponse = self._call("ListDatasets", pb.ListDatasetsRequest())
        return list(answer.datasets)

    def dataset(self, name: str) -> pb.Dataset:
        answer: pb.Dataset = self._call("GetDataset", pb.GetDatasetRequest(name=name))
        return answer

    def refresh_dataset(self, name: str) -> pb.Dataset:
        answer: pb.Dataset = self._call("RefreshDataset", pb.RefreshDatasetRequest(name=name), LISTING_TIMEOUT_S)
        return answer

    def set_dataset(
        self,
        name: str,
        *,
        replicas: int | None = None,
        pinned: bool | None = None,
        quota_bytes: int | None = None,
        direct: bool | None = None,
    ) -> pb.Dataset:
        """Change what is not None."""
        request = pb.SetDatasetRequest(
            name=name, replicas=replicas, pinned=pinned, quota_bytes=quota_bytes, direct=direct
        )
        answer: pb.Dataset = self._call("SetDataset", request)
        return answer

    def remove_dataset(self, name: str) -> None:
        self._call("RemoveDataset", pb.RemoveDatasetRequest(name=name))

    def start_prefetch(self, dataset: str, prefix: str) -> pb.PrefetchJob:
        request = pb.StartPrefetchRequest(dataset=dataset, prefix=prefix)
        answer: pb.PrefetchJob = self._call("StartPrefetch", request, PLANNING_TIMEOUT_S)
        return answer

    def watch_prefetch(self, job_id: str) -> Iterator[pb.PrefetchJob]:
        """The job now, then at each change, until it is finished or `WATCH_TIMEOUT_S` have passed."""
        heard = False
        try:
            for job in self._stub.WatchPrefetch(pb.WatchPrefetchRequest(job_id=job_id), timeout=WATCH_TIMEOUT_S):
                heard = True
                yield job
        except grpc.RpcError as error:
            if heard and _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            raise self._error(error) from error

    def prefetches(self) -> list[pb.PrefetchJob]:
        answer: pb.ListPrefetchesResponse = self._call("ListPrefetches", pb.ListPrefetchesRequest())
        return list(answer.jobs)

    def cancel_prefetch(self, job_id: str) -> pb.PrefetchJob:
        answer: pb.PrefetchJob = self._call("CancelPrefetch", pb.CancelPrefetchRequest(job_id=job_id))
        return answer

    def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> pb.Status:
        answer: pb.Status = self._call("GetStatus", pb.GetStatusRequest(), timeout_s)
        return answer

    def drain_node(self, node_id: str, *, force: bool = False) -> pb.NodeStatus:
        answer: pb.NodeStatus = self._call("DrainNode", pb.DrainNodeRequest(id=node_id, force=force))
        return answer

    def undrain_node(self, node_id: str) -> pb.NodeStatus:
        answer: pb.NodeStatus = self._call("UndrainNode", pb.UndrainNodeRequest(id=node_id))
        return answer

    def _call(self, method: str, request: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: grpc.RpcError) -> ShoalError:
        # A controller that stops cancels its calls; nothing here does.
        gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if _code(error) in gone and not _is_named(error):
            return ClusterUnavailable(
                f"the controller does not answer at {self.address}: reads work without it, but this command needs it; "
                "start it again"
            )
        return grpc_errors.from_rpc_error(error, target=f"the controller at {self.address}")


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.Call) else None


def _is_named(error: grpc.RpcError) -> bool:
    """Whether the controller itself said no, and not gRPC."""
    metadata: Any = (error.trailing_metadata() if isinstance(error, grpc.Call) else None) or ()
    return any(key == grpc_errors.METADATA_KEY for key, _ in metadata)
