"""Dataset records travel between versions."""

from __future__ import annotations

import pytest

from shoal.datasets import DatasetRecord
from shoal.errors import InvalidRequest

RECORD = DatasetRecord(
    name="imagenet",
    origin="s3://bucket/imagenet",
    endpoint="",
    shard_size=256 << 20,
    replicas=2,
    snapshot="0" * 32,
    snapshots=("0" * 32,),
    objects=3,
    total_bytes=5,
    adhoc=True,
    pinned=True,
    quota_bytes=7,
    direct=True,
)


def test_a_record_comes_back_as_it_was_whatever_a_newer_version_adds() -> None:
    assert DatasetRecord.from_dict(RECORD.to_dict() | {"colour": "red"}) == RECORD


def test_policies_that_an_older_version_did_not_know_have_their_defaults() -> None:
    old = {key: value for key, value in RECORD.to_dict().items() if key not in ("pinned", "quota_bytes", "direct")}
    record = DatasetRecord.from_dict(old)
    assert (record.pinned, record.quota_bytes, record.direct) == (False, 0, False)
    assert (record.replicas, record.adhoc) == (2, True)


@pytest.mark.parametrize("missing", ["name", "snapshots", "replicas"])
def test_what_lacks_a_field_is_no_record(missing: str) -> None:
    broken = RECORD.to_dict()
    del broken[missing]
    with pytest.raises(InvalidRequest, match=missing):
        DatasetRecord.from_dict(broken)
