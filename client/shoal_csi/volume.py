"""What a volume is: a name for a dataset, or for one of its folders, in one snapshot. Pure.

    volumeAttributes of an inline volume or a PersistentVolume, parameters of a StorageClass

        dataset: imagenet             whose bytes
        snapshot: 3f9a…  | newest     which state of them
        subpath: train                one folder of it
        writers: refuse | read-only   what is said to a claim that would like to write

A driver keeps no list of volumes: a dynamic volume's id says which dataset it is of, and everything else is in the
volume's context, which the orchestrator gives back with each call.

The rule: what is not understood is refused by name, so that a misspelt attribute is not a silently wrong volume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from shoal import datasets
from shoal.errors import InvalidRequest

NEWEST = "newest"
#: The bound of the specification for any string; an id is a name of at most 63 characters between two fixed parts.
MAX_STRING_BYTES = 128

#: What Kubernetes and its sidecars add to a volume's attributes by themselves.
_FOREIGN = ("csi.storage.k8s.io/", "storage.kubernetes.io/")

KEYS = ("dataset", "snapshot", "subpath", "writers")
_WRITERS = ("refuse", "read-only")
_DIGEST = re.compile(r"[0-9a-f]{4,32}")
_ID = re.compile(r"shoal-v1\.(?P<dataset>.+)\.[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume as its attributes describe it.

    Attributes:
        snapshot: a digest, 4 digits or more of one, `NEWEST`, or "" where nothing is said.
        subpath: of a folder, without a slash at either end; "" for the whole dataset.
        admits_writers: a claim with a writer's access mode is served too, read-only.
    """

    dataset: str
    snapshot: str = ""
    subpath: str = ""
    admits_writers: bool = False

    @property
    def wanted_snapshot(self) -> str:
        """As `shoal.datasets.choose_snapshot` takes it: "" for the newest."""
        return "" if self.snapshot == NEWEST else self.snapshot

    def context(self) -> dict[str, str]:
        """The attributes of which `parse` makes this volume."""
        said = {
            "dataset": self.dataset,
            "snapshot": self.snapshot,
            "subpath": self.subpath,
            "writers": "read-only" if self.admits_writers else "",
        }
        return {key: value for key, value in said.items() if value}


def parse(attributes: Mapping[str, str]) -> Volume:
    """The volume that attributes or parameters describe.

    Raises:
        InvalidRequest: the dataset is missing, a key is unknown, or a value cannot be one.
    """
    said = {key: value for key, value in attributes.items() if not key.startswith(_FOREIGN)}
    if unknown := sorted(said.keys() - set(KEYS)):
        raise InvalidRequest(
            f"{unknown[0]!r} is no attribute of a Shoal volume: {', '.join(KEYS)} are (in volumeAttributes, or in the "
            "parameters of the StorageClass)"
        )
    if not said.get("dataset"):
        raise InvalidRequest(
            "a volume names its dataset: add the attribute 'dataset' ('shoal dataset list' shows them)"
        )
    writers = said.get("writers", _WRITERS[0])
    if writers not in _WRITERS:
        raise InvalidRequest(f"the attribute 'writers' is {writers!r}: write one of {', '.join(_WRITERS)}")
    return Volume(
        datasets.check_name(said["dataset"]),
        _snapshot(said.get("snapshot", "")),
        _subpath(said.get("subpath", "")),
        writers == "read-only",
    )


def volume_id(name: str, volume: Volume) -> str:
    """The id of the dynamic volume `name`: the same for the same name and parameters, on any controller."""
    told = json.dumps([name, volume.context()], sort_keys=True)
    return f"shoal-v1.{volume.dataset}.{xxhash.xxh3_128_hexdigest(told.encode())}"


def dataset_of(volume_id: str) -> str | None:
    """The dataset of a dynamic volume's id; None for an id that `volume_id` did not make."""
    match = _ID.fullmatch(volume_id)
    try:
        return datasets.check_name(match["dataset"]) if match else None
    except InvalidRequest:
        return None


def _snapshot(text: str) -> str:
    if text in ("", NEWEST) or _DIGEST.fullmatch(text):
        return text
    raise InvalidRequest(
        f"{text!r} is no snapshot: write '{NEWEST}' or 4 to 32 hex digits of its digest (see 'shoal dataset show')"
    )


def _subpath(text: str) -> str:
    parts = text.strip("/").split("/") if text.strip("/") else []
    if "\0" in text or any(part in ("", ".", "..") for part in parts):
        raise InvalidRequest(f"the subpath {text!r} is no folder of a dataset: write names with one '/' between them")
    return "/".join(parts)
