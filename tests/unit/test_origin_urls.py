"""One origin, one URL."""

from __future__ import annotations

import pytest
from fsspec.registry import known_implementations

from shoal.errors import InvalidRequest
from shoal.origin import key_path, open_origin, parse_url


@pytest.mark.parametrize(
    ("text", "canonical", "authority", "path"),
    [
        ("s3://bucket", "s3://bucket", "bucket", ""),
        ("s3://bucket/", "s3://bucket", "bucket", ""),
        ("S3A://bucket/a/b//", "s3://bucket/a/b", "bucket", "a/b"),
        ("s3://bucket/a b/%20#?x=1&token=y", "s3://bucket/a b/%20#?x=1&token=y", "bucket", "a b/%20#?x=1&token=y"),
        ("gcs://bucket/p", "gs://bucket/p", "bucket", "p"),
        (
            "az://c@acc.dfs.core.windows.net/p/",
            "abfs://c@acc.dfs.core.windows.net/p",
            "c@acc.dfs.core.windows.net",
            "p",
        ),
        ("/data/set", "file:///data/set", "", "/data/set"),
        ("//data//set/../x/", "file:///data/x", "", "/data/x"),
        ("file:///data/set/", "file:///data/set", "", "/data/set"),
        ("local:///data/a%20b", "file:///data/a%20b", "", "/data/a%20b"),
        ("/", "file:///", "", "/"),
        ("memory://a/b/", "memory://a/b", "a", "b"),
        ("memory:///a/b", "memory://a/b", "a", "b"),
        ("memory://", "memory://", "", ""),
        ("hdfs:///user/x", "hdfs:///user/x", "", "user/x"),
        ("https://host:80/d/f?v=1/", "https://host:80/d/f?v=1/", "host:80", "d/f?v=1/"),
        ("sftp://user@host/d", "sftp://user@host/d", "user@host", "d"),
        ("hf://datasets/org/name", "hf://datasets/org/name", "datasets", "org/name"),
    ],
)
def test_parts(text: str, canonical: str, authority: str, path: str) -> None:
    url = parse_url(text)
    assert (str(url), url.authority, url.path) == (canonical, authority, path)
    assert parse_url(canonical) == url, "a canonical URL is its own"


@pytest.mark.parametrize(
    "text",
    ["", "data/set", "./x", "~/x", "bucket", "s3:/b", "://x", "simplecache::s3://b/p", "zip://a.csv::s3://b/a.zip"],
)
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is no origin: write one URL such as s3://bucket/prefix"):
        parse_url(text)


@pytest.mark.parametrize("text", ["s3://", "s3:///key", "https:///x", "gs://"])
def test_a_bucket_is_needed(text: str) -> None:
    with pytest.raises(InvalidRequest, match="names no bucket or host"):
        parse_url(text)


@pytest.mark.parametrize("text", ["file://data/set", "file://host/x", "/a\0b"])
def test_a_local_path_is_absolute(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no absolute path"):
        parse_url(text)


@pytest.mark.parametrize(
    "text",
    ["https://u:hunter2@h/p", "ftp://u:hunter2@h/p", "https://h/p?X-Amz-Signature=hunter2", "s3://k:hunter2@b/p"],
)
def test_credentials_do_not_belong_into_a_url(text: str) -> None:
    with pytest.raises(InvalidRequest, match="holds credentials: leave them out") as caught:
        parse_url(text)
    assert "hunter2" not in str(caught.value)


def test_shoal_is_no_origin() -> None:
    with pytest.raises(InvalidRequest, match="Shoal's own"):
        parse_url("shoal://flights")


def test_key_paths() -> None:
    assert key_path("", "a") == "a"
    assert key_path("p/", "a/b") == "p/a/b"
    assert key_path("p/x/", "") == "p/x"


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'nosuch' in nosuch://x/y is a protocol that fsspec does not know"):
        open_origin("nosuch://x/y", {})


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"class": "no_such_package.FileSystem", "err": "Please install nosuchfs to use this"}
    monkeypatch.setitem(known_implementations, "notinstalled", known)
    with pytest.raises(InvalidRequest, match="Please install nosuchfs to use this where the controller"):
        open_origin("notinstalled://x/y", {})
