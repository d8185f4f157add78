"""S3 against a real server, with both readers: the contract, and what only S3 can do to us."""

from __future__ import annotations

import json
import os
import socket
import uuid
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import (
    InvalidRequest,
    OriginChanged,
    OriginDenied,
    OriginNotFound,
    OriginUnavailable,
)
from shoal.origin import Deadlines, Origin, base, open_origin
from shoal.origin.objectstore import ObjectStoreOrigin
from shoal.origin.patient import PatientOrigin
from shoal.origin.s3fs_reader import S3fsOrigin
from tests.support.origin_contract import OriginContract, content, rows, streamed
from tests.support.proxy import CountingProxy
from tests.support.weed import Weed

READERS = ("obstore", "s3fs")
#: Long enough for a busy machine; short where a test waits it out.
IMPATIENT = Deadlines(contact_s=0.3, read_s=0.3, connect_s=0.2, idle_s=0.2)


class Prefix:
    """A `Place` in a bucket."""

    def __init__(self, weed: Weed, client: Any, bucket: str, reader: str) -> None:
        self.weed, self.bucket, self.prefix = weed, bucket, uuid.uuid4().hex
        self.url = f"s3://{bucket}/{self.prefix}"
        self.options: dict[str, Any] = {**weed.storage_options, "reader": reader}
        self._client = client

    def write(self, path: str, data: bytes) -> None:
        self.put(path, data)

    def put(self, path: str, data: bytes) -> None:
        # The bare call: s3fs's own `pipe` would change some names.
        self._client.call_s3("put_object", Bucket=self.bucket, Key=f"{self.prefix}/{path}", Body=data)

    def remove(self, path: str) -> None:
        self._client.call_s3("delete_object", Bucket=self.bucket, Key=f"{self.prefix}/{path}")


@pytest.fixture(scope="module")
def bucket(s3: Weed) -> str:
    s3.create_bucket("origin-contract")
    return "origin-contract"


@pytest.fixture(scope="module")
def client(s3: Weed) -> Any:
    """Writes objects. Shared, because making an S3 client takes botocore a third of a second."""
    return s3.filesystem()


@pytest.fixture(params=READERS)
def place(s3: Weed, client: Any, bucket: str, request: pytest.FixtureRequest) -> Prefix:
    return Prefix(s3, client, bucket, request.param)


@pytest.fixture
def obstore_place(s3: Weed, client: Any, bucket: str) -> Prefix:
    return Prefix(s3, client, bucket, "obstore")


@pytest.fixture
def own_bucket(s3: Weed) -> str:
    name = f"own-{uuid.uuid4().hex[:8]}"
    s3.create_bucket(name)
    return name


class TestContract(OriginContract):
    pass


def opened(place: Prefix, **changes: Any) -> Origin:
    return open_origin(place.url, {**place.options, **changes})


def test_each_reader_is_the_one_asked_for(place: Prefix) -> None:
    wanted = ObjectStoreOrigin if place.options["reader"] == "obstore" else S3fsOrigin
    found = opened(place)
    assert isinstance(found, PatientOrigin)
    assert isinstance(found.inner, wanted)


def test_both_readers_list_the_same(obstore_place: Prefix) -> None:
    place = obstore_place
    for path in ("a", "b/c", "b/d/e", "empty"):
        place.write(path, b"" if path == "empty" else path.encode())
    first, second = opened(place), opened(place, reader="s3fs")
    assert rows(first) == rows(second)
    assert (first.url, first.identity, first.key_prefix) == (second.url, second.identity, second.key_prefix)


def test_identity_and_endpoint(place: Prefix) -> None:
    origin = opened(place)
    assert origin.endpoint == place.weed.endpoint_url
    assert origin.identity == f"s3://{place.bucket}@{place.weed.endpoint_url}"
    assert origin.key_prefix == f"{place.prefix}/"


def test_a_listing_of_many_pages(place: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PAGE_ROWS", 5)
    paths = {f"flat-{i:02}" for i in range(12)} | {f"{a}/{b}/{c}" for a in "xyz" for b in "pq" for c in range(7)}
    for path in paths:
        place.write(path, b"1")
    assert set(rows(opened(place))) == paths
    assert set(rows(open_origin(f"{place.url}/x", place.options))) == {p[2:] for p in paths if p.startswith("x/")}


def test_a_listing_deeper_than_it_is_split(place: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PAGE_ROWS", 2)
    paths = {"/".join("abcdefgh"[:depth]) + f"/{i}" for depth in range(1, 9) for i in range(3)}
    for path in paths:
        place.write(path, b"1")
    assert set(rows(opened(place))) == paths


def test_a_listing_may_be_left_early(place: Prefix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PAGE_ROWS", 2)
    for i in range(9):
        place.write(f"{i}", b"1")
    origin = opened(place)
    listing = origin.list()
    assert len(next(listing)) == 2
    listing.close()  # type: ignore[attr-defined] # both are generators
    assert len(rows(origin)) == 9


def test_directory_markers_are_no_objects(place: Prefix) -> None:
    place.put("only-marker/", b"")
    place.put("dir/", b"")
    place.put("dir/deep/", b"")
    place.put("dir/x", b"1")
    place.put("dir/empty", b"")
    place.put("", b"")  # the marker of the prefix itself
    assert set(rows(opened(place))) == {"dir/x", "dir/empty"}
    with pytest.raises(OriginNotFound, match="holds no object"):
        rows(open_origin(f"{place.url}/only-marker", place.options))


def test_an_object_beside_a_directory_of_its_name(place: Prefix) -> None:
    place.put("both", b"12")
    place.put("both/x", b"1")
    assert {p: r.size_bytes for p, r in rows(opened(place)).items()} == {"both": 2, "both/x": 1}
    # Below the URL there is something, so the URL is a prefix.
    assert set(rows(open_origin(f"{place.url}/both", place.options))) == {"x"}


def test_a_key_that_obstore_refuses_is_read_by_s3fs(obstore_place: Prefix) -> None:
    obstore_place.put("new\nline", b"1234")
    with pytest.raises(InvalidRequest, match=r'the key ".*/new\\nline" of s3://.*: add \{"reader": "s3fs"\} to the'):
        rows(opened(obstore_place))
    origin = opened(obstore_place, reader="s3fs")
    assert bytes(origin.read("new\nline", rows(origin)["new\nline"].version, 1, 3)) == b"23"


def test_s3a_is_s3(place: Prefix) -> None:
    place.write("x", b"1")
    origin = open_origin(place.url.replace("s3://", "s3a://"), place.options)
    assert origin.url == place.url
    assert set(rows(origin)) == {"x"}


def test_the_whole_bucket(place: Prefix, own_bucket: str) -> None:
    origin = open_origin(f"s3://{own_bucket}/", place.options)
    assert (origin.url, origin.key_prefix) == (f"s3://{own_bucket}", "")
    with pytest.raises(OriginNotFound, match=f"the bucket '{own_bucket}' is empty"):
        rows(origin)
    place.bucket = own_bucket
    place.write("x", b"1")
    assert set(rows(origin)) == {f"{place.prefix}/x"}


def test_a_missing_bucket(place: Prefix) -> None:
    url = "s3://no-such-bucket-anywhere/p"
    with pytest.raises(OriginNotFound, match="the bucket 'no-such-bucket-anywhere' does not exist at http://127"):
        rows(open_origin(url, place.options))


@pytest.mark.parametrize("wrong", [{"secret": "wrong"}, {"key": "wrong"}])
def test_wrong_credentials(place: Prefix, wrong: dict[str, str]) -> None:
    place.write("x", b"1")
    version = rows(opened(place))["x"].version
    origin = opened(place, **wrong)
    with pytest.raises(OriginDenied, match="refused the credentials for") as caught:
        rows(origin)
    assert isinstance(caught.value, PermissionError)
    with pytest.raises(OriginDenied, match="storage options"):
        origin.read("x", version, 0, 1)


def test_no_credentials_where_some_are_needed(place: Prefix) -> None:
    options = {"endpoint_url": place.weed.endpoint_url, "anon": True, "reader": place.options["reader"]}
    with pytest.raises(OriginDenied, match="refused the credentials for"):
        rows(open_origin(place.url, options))


def test_an_unreachable_endpoint(place: Prefix) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = {**place.options, "endpoint_url": f"http://127.0.0.1:{port}"}
    origin = open_origin(place.url, options, deadlines=IMPATIENT)
    sentence = rf"http://127.0.0.1:{port} does not answer for s3://.* \(connection refused\): check the endpoint"
    with pytest.raises(OriginUnavailable, match=sentence):
        rows(origin)
    with pytest.raises(OriginUnavailable, match=sentence):
        origin.read("x", "v", 0, 1)


def test_a_name_that_is_no_host(place: Prefix) -> None:
    options = {**place.options, "endpoint_url": "http://nowhere.invalid:9000"}
    with pytest.raises(OriginUnavailable, match=r"nowhere.invalid:9000 does not answer .*name cannot be resolved"):
        rows(open_origin(place.url, options, deadlines=IMPATIENT))


def test_a_server_that_takes_connections_and_is_silent(place: Prefix) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        options = {**place.options, "endpoint_url": f"http://127.0.0.1:{server.getsockname()[1]}"}
        with pytest.raises(OriginUnavailable, match="no answer in time"):
            rows(open_origin(place.url, options, deadlines=IMPATIENT))


# -- where credentials come from -------------------------------------------------------------------------------------


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No AWS settings of the machine: a test gives its own."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_all_from_the_environment(place: Prefix, bare_environment: pytest.MonkeyPatch, variable: str) -> None:
    place.write("x", b"123")
    bare_environment.setenv("AWS_ACCESS_KEY_ID", place.weed.access_key)
    bare_environment.setenv("AWS_SECRET_ACCESS_KEY", place.weed.secret_key)
    bare_environment.setenv(variable, place.weed.endpoint_url + "/")
    origin = open_origin(place.url, {"reader": place.options["reader"]})
    assert origin.identity == opened(place).identity
    assert bytes(origin.read("x", rows(origin)["x"].version, 0, 3)) == b"123"


def test_from_a_profile(place: Prefix, bare_environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place.write("x", b"123")
    config, credentials = tmp_path / "config", tmp_path / "credentials"
    config.write_text(f"[profile data]\nregion = eu-west-1\nendpoint_url = {place.weed.endpoint_url}\n")
    credentials.write_text(
        f"[data]\naws_access_key_id = {place.weed.access_key}\naws_secret_access_key = {place.weed.secret_key}\n"
    )
    bare_environment.setenv("AWS_CONFIG_FILE", str(config))
    bare_environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    origin = open_origin(place.url, {"profile": "data", "reader": place.options["reader"]})
    assert bytes(origin.read("x", rows(origin)["x"].version, 0, 3)) == b"123"
    with pytest.raises(InvalidRequest, match="the AWS profile 'other' is in no configuration file"):
        rows(open_origin(place.url, {"profile": "other", "reader": place.options["reader"]}))


def test_no_credentials_anywhere(place: Prefix, bare_environment: pytest.MonkeyPatch) -> None:
    options = {"endpoint_url": place.weed.endpoint_url, "reader": place.options["reader"]}
    with pytest.raises(OriginDenied, match="credentials"):
        rows(open_origin(place.url, options))


def test_options_win_over_the_environment(place: Prefix, bare_environment: pytest.MonkeyPatch) -> None:
    place.write("x", b"1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        bare_environment.setenv(name, "wrong")
    bare_environment.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    bare_environment.setenv("AWS_SKIP_SIGNATURE", "true")
    assert set(rows(opened(place))) == {"x"}


def test_references_are_resolved_where_the_origin_is_opened(
    place: Prefix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place.write("x", b"1")
    monkeypatch.setenv("ORIGIN_KEY", place.weed.access_key)
    (tmp_path / "secret").write_text(place.weed.secret_key + "\n")
    options = {**place.options, "key": "env:ORIGIN_KEY", "secret": f"file:{tmp_path / 'secret'}"}
    assert set(rows(open_origin(place.url, options))) == {"x"}


def test_options_that_only_s3fs_understands(obstore_place: Prefix) -> None:
    place = obstore_place
    place.write("x", b"1")
    options = {**place.weed.storage_options, "config_kwargs": {"s3": {"payload_signing_enabled": True}}}
    origin = open_origin(place.url, options)
    assert isinstance(origin, PatientOrigin) and isinstance(origin.inner, S3fsOrigin)
    assert set(rows(origin)) == {"x"}
    with pytest.raises(InvalidRequest, match=r"config_kwargs\.s3\.payload_signing_enabled"):
        open_origin(place.url, {**options, "reader": "obstore"})


def test_options_as_json_may_carry_them(place: Prefix) -> None:
    place.write("x", b"1")
    assert set(rows(open_origin(place.url, json.loads(json.dumps(place.options))))) == {"x"}


# -- what a read costs -----------------------------------------------------------------------------------------------


def test_a_read_asks_the_origin_for_its_bytes_and_no_more(place: Prefix, counting_s3: CountingProxy) -> None:
    data = content(300_000)
    place.write("x", data)
    origin = opened(place, endpoint_url=counting_s3.endpoint_url)
    version = rows(origin)["x"].version
    counting_s3.reset()
    for start in (0, 100_000, 200_000):
        assert bytes(origin.read("x", version, start, start + 100_000)) == data[start : start + 100_000]
    assert 300_000 <= counting_s3.bytes_from_origin <= 300_000 + 3 * 1000
    made = []
    for _ in range(5):
        counting_s3.reset()
        assert streamed(origin, "x", version, 0, 300_000) == data
        assert 300_000 <= counting_s3.bytes_from_origin <= 300_000 + 1000
        made.append(counting_s3.connections)
    # Not each time: the reader's own thread may not have given it back yet when the next one begins.
    assert 0 in made[1:], "a stream leaves its connection fit for the next"


def test_a_changed_object_costs_no_body(place: Prefix, counting_s3: CountingProxy) -> None:
    place.write("x", content(100_000))
    origin = opened(place, endpoint_url=counting_s3.endpoint_url)
    version = rows(origin)["x"].version
    place.write("x", content(100_000, seed=1))
    counting_s3.reset()
    with pytest.raises(OriginChanged):
        origin.read("x", version, 0, 100_000)
    assert counting_s3.bytes_from_origin < 2_000
