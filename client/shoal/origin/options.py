"""Storage options: fsspec's own dictionary, as people give it, with references to secrets in place of secrets. Pure but
for reading what a reference names.

    {"key": "env:ORIGIN_KEY", "secret": "file:/run/secrets/origin"}

The rule: what is printed, logged or answered has gone through `redact`; only the origin that is opened sees values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.errors import InvalidRequest

HIDDEN = "***"
_SECRET = re.compile(
    r"secret|token|passw|pwd|passphrase|credential|key|auth|cookie|signature|\bsig\b|\bsas\b|sas_|_sas|connection_?string",
    re.IGNORECASE,
)
_ENVIRONMENT, _FILE = "env:", "file:"
_USER_INFO = re.compile(r"(?<=://)[^/?#@\s]*:[^/?#\s]*(?=@)")
_QUERY_SECRET = re.compile(rf"(?<=[?&])([^=&#\s]*(?:{_SECRET.pattern})[^=&#\s]*)=(?!\*\*\*)[^&#\s]+", re.IGNORECASE)


def parse_options(text: str) -> dict[str, Any]:
    """The JSON object that ``--storage-options`` gives; "" is an empty one.

    Raises:
        InvalidRequest: `text` is no JSON, with the position; or no object. The text itself is not repeated: it may hold
            secrets.
    """
    if not text.strip():
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the storage options are no JSON: {error.msg} at line {error.lineno}, column {error.colno}; write an "
            'object such as {"anon": true}'
        ) from error
    if not isinstance(options, dict):
        raise InvalidRequest(
            f'the storage options are a JSON {type(options).__name__}: write an object such as {{"anon": true}}'
        )
    return options


def resolve_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with every ``env:NAME`` and ``file:PATH`` string, however deep, replaced by what it refers to.

    A file's last line break is not part of the secret. ``file://…`` is a URL, not a reference.

    Raises:
        InvalidRequest: the variable is not set or the file cannot be read, with its name.
    """
    return {name: _resolve(value) for name, value in options.items()}


def redact(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` for people: values under names that look secret become ``***``, and so do credentials in URLs.

    References stay, since they say where a secret is and not what it is; so do true, false and null.
    """
    return {name: _redact(value, bool(_SECRET.search(name))) for name, value in options.items()}


def redact_url(text: str) -> str:
    """`text` with passwords before an ``@`` and values of secret-looking query parameters of any URL in it hidden."""
    if "://" not in text:
        return text
    return _QUERY_SECRET.sub(rf"\1={HIDDEN}", _USER_INFO.sub(HIDDEN, text))


def _is_reference(text: str) -> bool:
    return text.startswith(_ENVIRONMENT) or (text.startswith(_FILE) and not text.startswith(_FILE + "//"))


def _resolve(value: Any) -> Any:
    match value:
        case dict():
            return {name: _resolve(each) for name, each in value.items()}
        case list():
            return [_resolve(each) for each in value]
        case str() if _is_reference(value):
            return _look_up(value)
        case _:
            return value


def _look_up(reference: str) -> str:
    kind, _, name = reference.partition(":")
    if kind + ":" == _ENVIRONMENT:
        if name not in os.environ:
            raise InvalidRequest(
                f"the storage options refer to the environment variable {name!r}, which is not set in this process: "
                "set it where the controller and the cache nodes run"
            )
        return os.environ[name]
    try:
        return Path(name).read_text("utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"the storage options refer to the file {name!r}, which cannot be read "
            f"({getattr(error, 'strerror', None) or error}): put it where the controller and the cache nodes run"
        ) from error


def _redact(value: Any, secret: bool) -> Any:
    match value:
        case dict():
            return {name: _redact(each, secret or bool(_SECRET.search(str(name)))) for name, each in value.items()}
        case list():
            return [_redact(each, secret) for each in value]
        case bool() | None:
            return value
        case str() if _is_reference(value):
            return value
        case _ if secret:
            return HIDDEN
        case str():
            return redact_url(value)
        case _:
            return value
