"""fsspec's storage options for S3 (those of `s3fs`) in terms that obstore can be told as well. Pure.

The rule: an option is honoured or reported as untranslatable, never dropped. Only what concerns fsspec's own caches and
copies, which are not used here, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from shoal.errors import InvalidRequest

_IRRELEVANT = {
    *("default_block_size", "default_fill_cache", "default_cache_type", "cache_regions", "max_concurrency"),
    *("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache", "fixed_upload_size"),
    "local_expiry_check",
}
#: Of botocore's configuration; attempts and waits are Shoal's.
_IRRELEVANT_CONFIG = {"max_pool_connections", "retries", "user_agent", "user_agent_extra", "tcp_keepalive"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What storage options and environment say about an S3 service.

    Attributes:
        endpoint: URL without a slash at the end; "" for Amazon's own.
        region: "" where nothing names one.
        key, secret, token: credentials from the options; "" where they come from elsewhere.
        profile: of the AWS configuration files; "" for the default one.
        verify: whether TLS certificates are checked, or the path of the authorities' certificates.
        connect_s, idle_s: time-outs that the options set; None where they leave them to us.
        untranslatable: options that only s3fs can honour, as people write them.
    """

    endpoint: str = ""
    region: str = ""
    is_anonymous: bool = False
    key: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    profile: str = ""
    is_virtual_hosted: bool = False
    is_requester_pays: bool = False
    verify: bool | str = True
    connect_s: float | None = None
    idle_s: float | None = None
    untranslatable: tuple[str, ...] = ()

    @property
    def service(self) -> str:
        """What errors call it."""
        return self.endpoint or "Amazon S3"

    @property
    def identity_endpoint(self) -> str:
        """What the endpoint adds to an identity: "" at Amazon, whose bucket names are unique over its endpoints."""
        host = urlsplit(self.endpoint).hostname or ""
        return "" if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else self.endpoint


def translate(options: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """`options` (resolved, without Shoal's own ``reader``) as `Settings`.

    Args:
        environment: where ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``AWS_REGION`` and ``AWS_DEFAULT_REGION`` are
            looked up for what the options leave open.

    Raises:
        InvalidRequest: an option has a value of the wrong kind, the endpoint is no URL, or only half of a key pair is
            there.
    """
    top = _Table("", {name: value for name, value in options.items() if name not in _IRRELEVANT})
    client = top.table("client_kwargs")
    config = top.table("config_kwargs", without=_IRRELEVANT_CONFIG)
    style = config.table("s3")
    key = top.text("key") or top.text("username") or client.text("aws_access_key_id")
    secret = top.text("secret") or top.text("password") or client.text("aws_secret_access_key")
    if bool(key) != bool(secret):
        raise InvalidRequest("the storage options hold only one of 'key' and 'secret': give both, or neither")
    endpoint = _endpoint(
        top.text("endpoint_url")
        or client.text("endpoint_url")
        or environment.get("AWS_ENDPOINT_URL_S3", "")
        or environment.get("AWS_ENDPOINT_URL", "")
    )
    for table in (top, client):
        # With an endpoint its scheme decides; without one, obstore speaks TLS only.
        if endpoint or table.peek("use_ssl") is not False:
            table.flag("use_ssl", True)
    verify = client.take("verify", True)
    if not isinstance(verify, bool | str):
        raise InvalidRequest("the storage option 'client_kwargs.verify' is neither a truth value nor a path")
    return Settings(
        endpoint=endpoint,
        region=top.text("region_name")
        or client.text("region_name")
        or config.text("region_name")
        or environment.get("AWS_REGION", "")
        or environment.get("AWS_DEFAULT_REGION", ""),
        is_anonymous=top.flag("anon", False),
        key=key,
        secret=secret,
        token=top.text("token") or client.text("aws_session_token"),
        profile=top.text("profile"),
        is_virtual_hosted=style.text("addressing_style") == "virtual",
        is_requester_pays=top.flag("requester_pays", False),
        verify=verify,
        connect_s=config.seconds("connect_timeout"),
        idle_s=config.seconds("read_timeout"),
        untranslatable=tuple(name for table in (top, client, config, style) for name in table.left()),
    )


class _Table:
    """A dictionary of options that forgets what has been asked for, so that what is left is what nobody understood."""

    def __init__(self, prefix: str, values: Mapping[str, Any]) -> None:
        self._prefix = prefix
        self._values = dict(values)

    def take(self, name: str, default: Any) -> Any:
        value = self._values.pop(name, None)
        return default if value is None else value

    def peek(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str) -> str:
        value = self.take(name, "")
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def seconds(self, name: str) -> float | None:
        value = self.take(name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise self._wrong(name, "a number of seconds")
        return None if value is None else float(value)

    def table(self, name: str, without: frozenset[str] | set[str] = frozenset()) -> _Table:
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return _Table(f"{self._prefix}{name}.", {k: v for k, v in value.items() if k not in without})

    def left(self) -> list[str]:
        # An empty value is a library's default spelled out, but for the one flag that is true by default.
        return [
            self._prefix + name
            for name, value in self._values.items()
            if value not in (None, False, "", {}, []) or name == "use_ssl"
        ]

    def _wrong(self, name: str, kind: str) -> InvalidRequest:
        return InvalidRequest(f"the storage option '{self._prefix}{name}' is not {kind}")


def _endpoint(text: str) -> str:
    """An endpoint URL in one spelling: it is part of identities.

    Raises:
        InvalidRequest: it is no http or https URL.
    """
    if not text:
        return ""
    parts = urlsplit(text.strip())
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
        raise InvalidRequest("the storage option 'endpoint_url' is no URL such as https://s3.example.com:9000")
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{parts.path.rstrip('/')}"
