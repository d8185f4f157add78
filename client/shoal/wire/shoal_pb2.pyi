from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Node(_message.Message):
    __slots__ = ("id", "address", "weight", "topology", "state")
    class TopologyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    weight: int
    topology: _containers.ScalarMap[str, str]
    state: str
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., weight: _Optional[int] = ..., topology: _Optional[_Mapping[str, str]] = ..., state: _Optional[str] = ...) -> None: ...

class ClusterMap(_message.Message):
    __slots__ = ("epoch", "nodes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    def __init__(self, epoch: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("name", "origin", "shard_size", "replicas", "snapshot", "objects", "bytes", "snapshots", "created_at", "refreshed_at", "cached_bytes", "storage_options", "adhoc", "endpoint", "pinned", "quota_bytes", "direct")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    SHARD_SIZE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    REFRESHED_AT_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    ADHOC_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    name: str
    origin: str
    shard_size: int
    replicas: int
    snapshot: str
    objects: int
    bytes: int
    snapshots: _containers.RepeatedScalarFieldContainer[str]
    created_at: str
    refreshed_at: str
    cached_bytes: int
    storage_options: str
    adhoc: bool
    endpoint: str
    pinned: bool
    quota_bytes: int
    direct: bool
    def __init__(self, name: _Optional[str] = ..., origin: _Optional[str] = ..., shard_size: _Optional[int] = ..., replicas: _Optional[int] = ..., snapshot: _Optional[str] = ..., objects: _Optional[int] = ..., bytes: _Optional[int] = ..., snapshots: _Optional[_Iterable[str]] = ..., created_at: _Optional[str] = ..., refreshed_at: _Optional[str] = ..., cached_bytes: _Optional[int] = ..., storage_options: _Optional[str] = ..., adhoc: _Optional[bool] = ..., endpoint: _Optional[str] = ..., pinned: _Optional[bool] = ..., quota_bytes: _Optional[int] = ..., direct: _Optional[bool] = ...) -> None: ...

class AddDatasetRequest(_message.Message):
    __slots__ = ("name", "origin", "shard_size", "replicas", "storage_options", "pinned", "quota_bytes", "direct")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    SHARD_SIZE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STORAGE_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    name: str
    origin: str
    shard_size: int
    replicas: int
    storage_options: str
    pinned: bool
    quota_bytes: int
    direct: bool
    def __init__(self, name: _Optional[str] = ..., origin: _Optional[str] = ..., shard_size: _Optional[int] = ..., replicas: _Optional[int] = ..., storage_options: _Optional[str] = ..., pinned: _Optional[bool] = ..., quota_bytes: _Optional[int] = ..., direct: _Optional[bool] = ...) -> None: ...

class SetDatasetRequest(_message.Message):
    __slots__ = ("name", "replicas", "pinned", "quota_bytes", "direct")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    name: str
    replicas: int
    pinned: bool
    quota_bytes: int
    direct: bool
    def __init__(self, name: _Optional[str] = ..., replicas: _Optional[int] = ..., pinned: _Optional[bool] = ..., quota_bytes: _Optional[int] = ..., direct: _Optional[bool] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets",)
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    def __init__(self, datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RefreshDatasetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveDatasetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class RemoveDatasetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartPrefetchRequest(_message.Message):
    __slots__ = ("dataset", "prefix")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    prefix: str
    def __init__(self, dataset: _Optional[str] = ..., prefix: _Optional[str] = ...) -> None: ...

class WatchPrefetchRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ListPrefetchesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPrefetchesResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[PrefetchJob]
    def __init__(self, jobs: _Optional[_Iterable[_Union[PrefetchJob, _Mapping]]] = ...) -> None: ...

class CancelPrefetchRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class PrefetchJob(_message.Message):
    __slots__ = ("id", "dataset", "snapshot", "prefix", "state", "bytes_total", "bytes_done", "reason", "created_at", "finished_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    dataset: str
    snapshot: str
    prefix: str
    state: str
    bytes_total: int
    bytes_done: int
    reason: str
    created_at: str
    finished_at: str
    def __init__(self, id: _Optional[str] = ..., dataset: _Optional[str] = ..., snapshot: _Optional[str] = ..., prefix: _Optional[str] = ..., state: _Optional[str] = ..., bytes_total: _Optional[int] = ..., bytes_done: _Optional[int] = ..., reason: _Optional[str] = ..., created_at: _Optional[str] = ..., finished_at: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("epoch", "nodes", "datasets", "jobs", "warnings", "version")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    jobs: _containers.RepeatedCompositeFieldContainer[PrefetchJob]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    version: str
    def __init__(self, epoch: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ..., jobs: _Optional[_Iterable[_Union[PrefetchJob, _Mapping]]] = ..., warnings: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node", "used_bytes", "capacity_bytes", "condition", "seconds_since_report", "version", "handover_bytes", "short_bytes", "draining", "drained", "waits_for", "contest")
    NODE_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_REPORT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHORT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    CONTEST_FIELD_NUMBER: _ClassVar[int]
    node: Node
    used_bytes: int
    capacity_bytes: int
    condition: str
    seconds_since_report: float
    version: str
    handover_bytes: int
    short_bytes: int
    draining: bool
    drained: bool
    waits_for: str
    contest: str
    def __init__(self, node: _Optional[_Union[Node, _Mapping]] = ..., used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., condition: _Optional[str] = ..., seconds_since_report: _Optional[float] = ..., version: _Optional[str] = ..., handover_bytes: _Optional[int] = ..., short_bytes: _Optional[int] = ..., draining: _Optional[bool] = ..., drained: _Optional[bool] = ..., waits_for: _Optional[str] = ..., contest: _Optional[str] = ...) -> None: ...

class DrainNodeRequest(_message.Message):
    __slots__ = ("id", "force")
    ID_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    id: str
    force: bool
    def __init__(self, id: _Optional[str] = ..., force: _Optional[bool] = ...) -> None: ...

class UndrainNodeRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: Node
    def __init__(self, node: _Optional[_Union[Node, _Mapping]] = ...) -> None: ...

class Orders(_message.Message):
    __slots__ = ("map", "datasets", "prefetches", "controller_http", "cluster_id")
    MAP_FIELD_NUMBER: _ClassVar[int]
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_HTTP_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ID_FIELD_NUMBER: _ClassVar[int]
    map: ClusterMap
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    prefetches: _containers.RepeatedCompositeFieldContainer[PrefetchOrder]
    controller_http: str
    cluster_id: str
    def __init__(self, map: _Optional[_Union[ClusterMap, _Mapping]] = ..., datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ..., prefetches: _Optional[_Iterable[_Union[PrefetchOrder, _Mapping]]] = ..., controller_http: _Optional[str] = ..., cluster_id: _Optional[str] = ...) -> None: ...

class PrefetchOrder(_message.Message):
    __slots__ = ("job_id", "dataset", "snapshot", "prefix", "run")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    dataset: str
    snapshot: str
    prefix: str
    run: bool
    def __init__(self, job_id: _Optional[str] = ..., dataset: _Optional[str] = ..., snapshot: _Optional[str] = ..., prefix: _Optional[str] = ..., run: _Optional[bool] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("node", "epoch", "used_bytes", "capacity_bytes", "condition", "cached", "prefetches", "leaving", "version", "handover_bytes", "short_bytes")
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHORT_BYTES_FIELD_NUMBER: _ClassVar[int]
    node: Node
    epoch: int
    used_bytes: int
    capacity_bytes: int
    condition: str
    cached: _containers.RepeatedCompositeFieldContainer[CachedSnapshot]
    prefetches: _containers.RepeatedCompositeFieldContainer[PrefetchShare]
    leaving: bool
    version: str
    handover_bytes: int
    short_bytes: int
    def __init__(self, node: _Optional[_Union[Node, _Mapping]] = ..., epoch: _Optional[int] = ..., used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., condition: _Optional[str] = ..., cached: _Optional[_Iterable[_Union[CachedSnapshot, _Mapping]]] = ..., prefetches: _Optional[_Iterable[_Union[PrefetchShare, _Mapping]]] = ..., leaving: _Optional[bool] = ..., version: _Optional[str] = ..., handover_bytes: _Optional[int] = ..., short_bytes: _Optional[int] = ...) -> None: ...

class CachedSnapshot(_message.Message):
    __slots__ = ("snapshot", "bytes_primary", "bytes_held")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PRIMARY_FIELD_NUMBER: _ClassVar[int]
    BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    snapshot: str
    bytes_primary: int
    bytes_held: int
    def __init__(self, snapshot: _Optional[str] = ..., bytes_primary: _Optional[int] = ..., bytes_held: _Optional[int] = ...) -> None: ...

class PrefetchShare(_message.Message):
    __slots__ = ("job_id", "epoch", "bytes_total", "bytes_done", "bytes_short", "complete", "failure")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_SHORT_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    epoch: int
    bytes_total: int
    bytes_done: int
    bytes_short: int
    complete: bool
    failure: str
    def __init__(self, job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., bytes_total: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_short: _Optional[int] = ..., complete: _Optional[bool] = ..., failure: _Optional[str] = ...) -> None: ...

class ReportAck(_message.Message):
    __slots__ = ("epoch", "unknown")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    unknown: bool
    def __init__(self, epoch: _Optional[int] = ..., unknown: _Optional[bool] = ...) -> None: ...
