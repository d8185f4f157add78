"""s3fs options, understood or handed on, never dropped."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import InvalidRequest
from shoal.origin import open_origin
from shoal.origin.objectstore import ObjectStoreOrigin
from shoal.origin.patient import PatientOrigin
from shoal.origin.s3_settings import Settings, translate
from shoal.origin.s3fs_reader import S3fsOrigin


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Settings()),
        ({"key": "k", "secret": "s", "token": "t"}, Settings(key="k", secret="s", token="t")),
        ({"username": "k", "password": "s"}, Settings(key="k", secret="s")),
        (
            {"client_kwargs": {"aws_access_key_id": "k", "aws_secret_access_key": "s", "aws_session_token": "t"}},
            Settings(key="k", secret="s", token="t"),
        ),
        ({"anon": True}, Settings(is_anonymous=True)),
        ({"profile": "p"}, Settings(profile="p")),
        ({"endpoint_url": "HTTP://Host:9000/"}, Settings(endpoint="http://host:9000")),
        (
            {"client_kwargs": {"endpoint_url": "https://h/s3/", "region_name": "r"}},
            Settings(endpoint="https://h/s3", region="r"),
        ),
        ({"requester_pays": True}, Settings(is_requester_pays=True)),
        ({"client_kwargs": {"verify": False}}, Settings(verify=False)),
        ({"client_kwargs": {"verify": "/ca.pem"}}, Settings(verify="/ca.pem")),
        ({"config_kwargs": {"s3": {"addressing_style": "virtual"}}}, Settings(is_virtual_hosted=True)),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}}, Settings()),
        ({"config_kwargs": {"connect_timeout": 2, "read_timeout": 30}}, Settings(connect_s=2, idle_s=30)),
        ({"config_kwargs": {"retries": {"max_attempts": 9}, "max_pool_connections": 50}}, Settings()),
        ({"use_listings_cache": False, "default_block_size": 1, "version_aware": False, "token": None}, Settings()),
        ({"use_ssl": True, "client_kwargs": {"use_ssl": True}}, Settings()),
        ({"use_ssl": False, "endpoint_url": "http://h"}, Settings(endpoint="http://h")),
        # Only s3fs can do these.
        ({"use_ssl": False}, Settings(untranslatable=("use_ssl",))),
        ({"version_aware": True}, Settings(untranslatable=("version_aware",))),
        ({"s3_additional_kwargs": {"SSECustomerKey": "x"}}, Settings(untranslatable=("s3_additional_kwargs",))),
        ({"client_kwargs": {"api_version": "x"}}, Settings(untranslatable=("client_kwargs.api_version",))),
        (
            {"config_kwargs": {"signature_version": "s3", "s3": {"use_accelerate_endpoint": True}}},
            Settings(untranslatable=("config_kwargs.signature_version", "config_kwargs.s3.use_accelerate_endpoint")),
        ),
    ],
)
def test_translation(options: dict[str, Any], expected: Settings) -> None:
    assert translate(options, {}) == expected


def test_the_environment_fills_what_options_leave_open() -> None:
    environment = {
        "AWS_ENDPOINT_URL": "http://general",
        "AWS_ENDPOINT_URL_S3": "http://special",
        "AWS_REGION": "r1",
        "AWS_DEFAULT_REGION": "r2",
    }
    assert translate({}, environment) == Settings(endpoint="http://special", region="r1")
    del environment["AWS_ENDPOINT_URL_S3"], environment["AWS_REGION"]
    assert translate({}, environment) == Settings(endpoint="http://general", region="r2")
    options = {"endpoint_url": "http://own", "client_kwargs": {"region_name": "own"}}
    assert translate(options, environment) == Settings(endpoint="http://own", region="own")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": "k"}, "only one of 'key' and 'secret'"),
        ({"secret": "s"}, "only one of 'key' and 'secret'"),
        ({"key": 1, "secret": "s"}, "'key' is not text"),
        ({"anon": "yes"}, "'anon' is not true or false"),
        ({"client_kwargs": []}, "'client_kwargs' is not an object"),
        ({"config_kwargs": {"read_timeout": 0}}, "'config_kwargs.read_timeout' is not a number of seconds"),
        ({"client_kwargs": {"verify": 3}}, "verify' is neither"),
        ({"endpoint_url": "localhost:9000"}, "'endpoint_url' is no URL such as"),
        ({"endpoint_url": "http://u:p@h"}, "'endpoint_url' is no URL such as"),
    ],
)
def test_wrong_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        translate(options, {})


def test_secrets_are_not_in_the_representation() -> None:
    assert "hunter2" not in repr(Settings(key="hunter2", secret="hunter2", token="hunter2"))


@pytest.mark.parametrize(
    ("endpoint", "identity"),
    [
        ("", "s3://b"),
        ("https://s3.eu-west-1.amazonaws.com", "s3://b"),
        ("https://minio:9000/", "s3://b@https://minio:9000"),
    ],
)
def test_identities(endpoint: str, identity: str) -> None:
    options = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "r", "endpoint_url": endpoint or None}}
    origin = open_origin("s3://b/p", options)
    assert isinstance(origin, PatientOrigin) and isinstance(origin.inner, ObjectStoreOrigin)
    assert (origin.identity, origin.key_prefix, origin.endpoint) == (identity, "p/", identity[7:])
    assert open_origin("s3://b/p", {**options, "reader": "s3fs"}).identity == identity


def test_the_reader_follows_the_options() -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": "http://h", "version_aware": True}
    opened = open_origin("s3://b/p", options)
    assert isinstance(opened, PatientOrigin) and isinstance(opened.inner, S3fsOrigin)
    with pytest.raises(InvalidRequest, match="obstore cannot be told the storage options version_aware"):
        open_origin("s3://b/p", {**options, "reader": "obstore"})
    with pytest.raises(InvalidRequest, match="'reader' is 'boto3': for S3 write 'obstore' or 's3fs'"):
        open_origin("s3://b/p", {"reader": "boto3"})


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="S3 has no storage option 'endpont_url'"):
        open_origin("s3://b/p", {"key": "k", "secret": "s", "endpont_url": "http://h"})


def test_certificates_that_cannot_be_read_are_named() -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": "https://h", "client_kwargs": {"verify": "/no/ca.pem"}}
    with pytest.raises(InvalidRequest, match=r"'/no/ca\.pem', which cannot be read"):
        open_origin("s3://b/p", options)
