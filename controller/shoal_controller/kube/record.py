"""The record as one object at the API server: a Secret, because storage options may hold secrets.

    data["record.json.gz"]     what SQLite holds elsewhere: cluster id, epoch, nodes, datasets, jobs
    data["operator.json"]      what the operator must not forget: which nodes it drained
    data["claim"]              another one for each that opened the record

One object, because one event is one transaction and the API server knows no other; and because replacing it under the
version that was read is the fence against two leaders: the first write of a deposed one is a conflict, and ends it.
Compressed, since an object holds 1 MiB (docs/operator.md has what a dataset takes of it).

The rule: `_present` is what the server has. It changes only by an answer of the server.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import json
import secrets
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, assert_never

from shoal.cluster_map import ClusterMap
from shoal.errors import StoreUnusable
from shoal_controller.events import (
    DeleteDataset,
    DeleteJob,
    DropSnapshot,
    KeepSnapshot,
    SaveDataset,
    SaveJob,
    SaveMap,
    Write,
)
from shoal_controller.kube.api import SECRETS, Api, ApiError, Object
from shoal_controller.model import Dataset, Job, JobState, SnapshotInfo
from shoal_controller.record import Contents, Record
from shoal_controller.snapshot_files import SnapshotFiles

T = TypeVar("T")

FORMAT = 1
RECORD_KEY = "record.json.gz"
OPERATOR_KEY = "operator.json"
CLAIM_KEY = "claim"
#: The server's own deadline for a request is longer; one that has not answered by then cannot be told what it did.
TIMEOUT_S = 15.0


class KubeRecord(Record):
    """A record in the Secret `name`. Methods are called in the record's thread, requests run on the loop of `api`."""

    def __init__(
        self, files: SnapshotFiles, api: Api, loop: asyncio.AbstractEventLoop, namespace: str, name: str
    ) -> None:
        """Use `open`."""
        super().__init__(files)
        self._api = api
        self._loop = loop
        self._namespace = namespace
        self._name = name
        self._object: Object = {}
        self._present: dict[str, Any] = {}

    @classmethod
    def open(
        cls, directory: Path, *, api: Api, loop: asyncio.AbstractEventLoop, namespace: str, name: str
    ) -> KubeRecord:
        """Read the record, or begin it where there is none. Snapshots' files are kept in `directory`.

        Raises:
            StoreUnusable: the directory or the API server cannot be used, or the record is another version's.
        """
        record = cls(SnapshotFiles.open(directory), api, loop, namespace, name)
        try:
            record._read()
            record.files.sweep({snapshot.digest for known in record.load().datasets for snapshot in known.snapshots})
        except BaseException:  # nobody else has it yet, and it holds the directory's lock
            record.close()
            raise
        return record

    def load(self) -> Contents:
        try:
            return Contents(
                cluster_id=self._present["cluster_id"],
                map=ClusterMap.from_json(json.dumps(self._present["map"])),
                draining=frozenset(self._present["draining"]),
                datasets=tuple(_dataset(raw) for _, raw in sorted(self._present["datasets"].items())),
                jobs=tuple(
                    sorted(map(_job, self._present["jobs"].values()), key=lambda job: (job.created_utc_s, job.id))
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    @property
    def drained(self) -> frozenset[str]:
        """Ids of the nodes that the operator drained."""
        raw = (self._object.get("data") or {}).get(OPERATOR_KEY)
        return frozenset(json.loads(base64.b64decode(raw))["drained"] if raw else ())

    def keep_drained(self, node_ids: frozenset[str]) -> None:
        """Remember which nodes the operator drained. Raises StoreUnusable."""
        self._replace({OPERATOR_KEY: json.dumps({"drained": sorted(node_ids)}).encode()})

    def _commit(self, writes: tuple[Write, ...]) -> None:
        wanted = {**self._present}
        for key in ("datasets", "jobs"):
            wanted[key] = dict(self._present[key])
        for write in writes:
            match write:
                case SaveMap(cluster_map, draining):
                    wanted |= {"map": json.loads(cluster_map.to_json()), "draining": sorted(draining)}
                case SaveDataset(dataset):
                    wanted["datasets"][dataset.name] = dataclasses.asdict(dataset)
                case DeleteDataset(name):
                    wanted["datasets"].pop(name, None)
                case SaveJob(job):
                    wanted["jobs"][job.id] = dataclasses.asdict(job)
                case DeleteJob(job_id):
                    wanted["jobs"].pop(job_id, None)
                case KeepSnapshot() | DropSnapshot():
                    pass  # files, which are `Record.write`'s
                case _:
                    assert_never(write)
        if wanted != self._present:
            self._replace({RECORD_KEY: _packed(wanted)})
            self._present = wanted

    def _read(self) -> None:
        try:
            self._object = self._wait(self._api.get(SECRETS, self._name, namespace=self._namespace))
        except ApiError as error:
            if not error.is_missing:
                raise self._unusable(error) from error
            made: Object = {
                "apiVersion": SECRETS.api_version,
                "kind": SECRETS.kind,
                "metadata": {"name": self._name},
                "type": "shoal.io/record",
            }
            try:
                self._object = self._wait(self._api.create(SECRETS, made, namespace=self._namespace))
            except ApiError as refusal:
                raise self._unusable(refusal) from refusal
        raw = (self._object.get("data") or {}).get(RECORD_KEY)
        if raw is None:
            empty = {"map": {"epoch": 0, "nodes": []}, "draining": [], "datasets": {}, "jobs": {}}
            wanted: dict[str, Any] = {"format": FORMAT, "cluster_id": secrets.token_hex(16), **empty}
            self._claim({RECORD_KEY: _packed(wanted)})
            self._present = wanted
            return
        try:
            self._present = json.loads(gzip.decompress(base64.b64decode(raw)))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        if self._present.get("format") != FORMAT:
            raise StoreUnusable(
                f"the record in Secret {self._namespace}/{self._name} was written by another version of Shoal (format "
                f"{self._present.get('format')}, this one reads {FORMAT}): run that version"
            )
        self._claim({})

    def _claim(self, data: dict[str, bytes]) -> None:
        """Make it another version, so that whoever had it open before can write no more."""
        self._replace({**data, CLAIM_KEY: secrets.token_hex(8).encode()})

    def _replace(self, data: dict[str, bytes]) -> None:
        """Put these keys into the Secret, under the version that was read."""
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        wanted = {**self._object, "data": {**(self._object.get("data") or {}), **encoded}}
        try:
            self._object = self._wait(self._api.replace(SECRETS, wanted, namespace=self._namespace))
        except ApiError as error:
            if error.is_conflict:
                raise StoreUnusable(
                    f"another controller wrote the record in Secret {self._namespace}/{self._name}: this one no longer "
                    "leads, and ends"
                ) from error
            raise self._unusable(error) from error

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)
        except TimeoutError as error:
            raise ApiError(f"no answer within {TIMEOUT_S:g} s") from error

    def _unusable(self, error: ApiError) -> StoreUnusable:
        return StoreUnusable(
            f"the record in Secret {self._namespace}/{self._name} cannot be used ({error}): the service account needs "
            "get, create and update on it, and a record holds up to 1 MiB"
        )

    def _damaged(self, error: Exception) -> StoreUnusable:
        return StoreUnusable(
            f"the record in Secret {self._namespace}/{self._name} is damaged ({error!r}): delete its key {RECORD_KEY}; "
            "Datasets are then listed anew, and nodes keep what they hold"
        )


def _packed(value: Any) -> bytes:
    # Without a time in it, equal contents are equal bytes.
    return gzip.compress(json.dumps(value, separators=(",", ":")).encode(), mtime=0)


def _dataset(raw: dict[str, Any]) -> Dataset:
    known = {field.name: raw[field.name] for field in dataclasses.fields(Dataset) if field.name in raw}
    known["snapshots"] = tuple(SnapshotInfo(**snapshot) for snapshot in raw["snapshots"])
    return Dataset(**known)


def _job(raw: dict[str, Any]) -> Job:
    known = {field.name: raw[field.name] for field in dataclasses.fields(Job) if field.name in raw}
    return Job(**{**known, "state": JobState(raw["state"]), "planning_since_s": 0.0})
