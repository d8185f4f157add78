"""Google and Azure: which options lead to which reader. Nothing here talks to either."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import InvalidRequest
from shoal.origin import cloud, open_origin
from shoal.origin.objectstore import ObjectStoreOrigin
from shoal.origin.patient import PatientOrigin


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({"token": "google_default"}, {}),
        ({"token": "anon"}, {"skip_signature": True}),
        ({"token": "/run/secrets/gcp.json"}, {"application_credentials": "/run/secrets/gcp.json"}),
        ({"token": "browser"}, None),
        ({"token": {"type": "service_account"}}, None),
        ({"project": "p"}, None),
    ],
)
def test_google(options: dict[str, Any], config: dict[str, Any] | None) -> None:
    assert cloud.google_config(options) == config


@pytest.mark.parametrize(
    ("options", "account", "config"),
    [
        ({}, "acc", {"account_name": "acc"}),
        ({"account_name": "acc", "account_key": "k"}, "acc", {"account_name": "acc", "account_key": "k"}),
        ({"sas_token": "s"}, "acc", {"account_name": "acc", "sas_key": "s"}),
        ({"anon": True}, "acc", {"account_name": "acc", "skip_signature": True}),
        (
            {"tenant_id": "t", "client_id": "i", "client_secret": "s"},
            "acc",
            {"account_name": "acc", "tenant_id": "t", "client_id": "i", "client_secret": "s"},
        ),
        ({"connection_string": "x"}, "acc", None),
        ({}, "", None),
    ],
)
def test_azure(options: dict[str, Any], account: str, config: dict[str, Any] | None) -> None:
    assert cloud.azure_config(options, account) == config


def test_google_origin() -> None:
    origin = open_origin("gcs://bucket/p/", {"token": "anon"})
    assert isinstance(origin, PatientOrigin) and isinstance(origin.inner, ObjectStoreOrigin)
    assert (origin.url, origin.identity, origin.key_prefix) == ("gs://bucket/p", "gs://bucket", "p/")


def test_an_azure_account_is_part_of_the_url() -> None:
    long = open_origin("abfs://c@acc.dfs.core.windows.net/p", {"anon": True})
    short = open_origin("az://c/p", {"account_name": "acc", "anon": True})
    assert isinstance(long, PatientOrigin) and isinstance(long.inner, ObjectStoreOrigin)
    assert long.url == short.url == "abfs://c@acc.dfs.core.windows.net/p"
    assert long.identity == short.identity == "abfs://c@acc.dfs.core.windows.net"


@pytest.mark.parametrize("url", ["gs://b/p", "abfs://c@acc.dfs.core.windows.net/p"])
def test_the_reader_must_exist(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"'reader' is 's3fs': for (gs|abfs) write 'obstore' or 'fsspec'"):
        open_origin(url, {"reader": "s3fs"})
    with pytest.raises(InvalidRequest, match="obstore cannot be told the storage options nonsense"):
        open_origin(url, {"reader": "obstore", "nonsense": 1})
