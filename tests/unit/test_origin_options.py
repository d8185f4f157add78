"""Storage options: what is parsed, what a reference becomes, and what must never be seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.origin import parse_options, redact, redact_url, resolve_options


def test_parses_an_object() -> None:
    assert parse_options('{"anon": true, "client_kwargs": {"region_name": "x"}}') == {
        "anon": True,
        "client_kwargs": {"region_name": "x"},
    }
    assert parse_options("") == parse_options("  \n") == {}


def test_bad_json_is_refused_with_its_position_and_without_its_text() -> None:
    with pytest.raises(InvalidRequest, match="line 2, column 11") as caught:
        parse_options('{"key": "AKIA",\n"secret": hunter2}')
    assert "hunter2" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ('"anon"', "str"), ("3", "int"), ("null", "NoneType")])
def test_what_is_no_object_is_refused(text: str, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=f"are a JSON {kind}"):
        parse_options(text)


def test_references_are_resolved_however_deep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORIGIN_KEY", "k")
    secret = tmp_path / "secret"
    secret.write_text("line 1\nline 2\r\n")
    options = {
        "key": "env:ORIGIN_KEY",
        "deep": {"list": ["env:ORIGIN_KEY", {"secret": f"file:{secret}"}, 3, None]},
        "plain": "environment",
        "url": f"file://{secret}",
    }
    assert resolve_options(options) == {
        "key": "k",
        "deep": {"list": ["k", {"secret": "line 1\nline 2"}, 3, None]},
        "plain": "environment",
        "url": f"file://{secret}",
    }
    assert options["key"] == "env:ORIGIN_KEY", "the argument is not changed"


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORIGIN_KEY", raising=False)
    with pytest.raises(InvalidRequest, match="'ORIGIN_KEY', which is not set"):
        resolve_options({"a": ["env:ORIGIN_KEY"]})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none', which cannot be read \(No such file"):
        resolve_options({"secret": f"file:{tmp_path / 'none'}"})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"binary', which cannot be read \('utf-8'"):
        resolve_options({"secret": f"file:{tmp_path / 'binary'}"})


@pytest.mark.parametrize(
    "name",
    [
        *(
            "key",
            "secret",
            "token",
            "password",
            "aws_secret_access_key",
            "aws_session_token",
            "sas_token",
            "account_key",
        ),
        *("connection_string", "Authorization", "credential", "CREDENTIALS", "api-key", "passphrase", "cookie", "sig"),
    ],
)
def test_secret_names_are_hidden(name: str) -> None:
    assert redact({name: "hunter2"}) == {name: "***"}
    assert redact({"outer": [{name: "hunter2"}]}) == {"outer": [{name: "***"}]}
    assert redact({name: {"anything": ["hunter2", 7]}}) == {name: {"anything": ["***", "***"]}}


def test_references_flags_and_plain_values_are_shown() -> None:
    options: dict[str, Any] = {
        "key": "env:ORIGIN_KEY",
        "secret": "file:/run/secrets/origin",
        "token": None,
        "use_auth": True,
        "endpoint_url": "http://127.0.0.1:8333",
        "client_kwargs": {"region_name": "eu-west-1", "timeout": 3},
    }
    assert redact(options) == options


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:hunter2@host/p", "https://***@host/p"),
        ("ftp://u:p@ss@host/p", "ftp://***@host/p"),
        ("https://host/p?X-Amz-Signature=abc&x=1", "https://host/p?X-Amz-Signature=***&x=1"),
        ("https://host/p?a=1&sig=abc%3D&sv=2", "https://host/p?a=1&sig=***&sv=2"),
        ("https://host/p?token=***", "https://host/p?token=***"),
        ("sftp://user@host/p", "sftp://user@host/p"),
        ("http://host:80/a@b:c", "http://host:80/a@b:c"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("no url: a@b", "no url: a@b"),
    ],
)
def test_credentials_in_urls(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact({"proxy": url}) == {"proxy": shown}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), _JSON, max_size=4))
def test_redacted_options_stay_options(options: dict[str, Any]) -> None:
    once = redact(options)
    assert parse_options(json.dumps(once)) == once
    assert redact(once) == once
