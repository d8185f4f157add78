"""Google Cloud Storage and Azure Blob Storage: obstore for the few options that it shares with fsspec, else fsspec.

The rule of S3 holds here too: an option is honoured or the other reader is taken, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shoal.errors import InvalidRequest
from shoal.origin import urls
from shoal.origin.base import Deadlines, Origin

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, ObjectStore, RetryConfig

    MakeStore = Callable[[ClientConfig, RetryConfig], ObjectStore]

_AZURE_HOST = ".dfs.core.windows.net"
_AZURE_OPTIONS = {"account_name", "account_key", "sas_token", "tenant_id", "client_id", "client_secret"}


def open_cloud(
    url: urls.OriginUrl, options: Mapping[str, Any], deadlines: Deadlines, *, shown: Mapping[str, Any]
) -> Origin:
    """The origin at ``gs://bucket[/prefix]`` or ``abfs://container[@account.dfs.core.windows.net][/prefix]``.

    Args:
        options: fsspec's (those of gcsfs or adlfs), resolved, and ``reader``.
        shown: the same as people may see them.

    Raises:
        InvalidRequest: an option cannot be honoured, or the package of the reader is not installed.
    """
    rest = {name: value for name, value in options.items() if value is not None}
    reader = rest.pop("reader", None)
    if reader not in (None, "obstore", "fsspec"):
        raise InvalidRequest(
            f"the storage option 'reader' is {reader!r}: for {url.protocol} write 'obstore' or 'fsspec'"
        )
    account = ""
    if url.protocol == "abfs":
        url, account = _azure_account(url, rest)
    make_store = _google(url, rest) if url.protocol == "gs" else _azure(url, rest, account)
    if reader == "obstore" and make_store is None:
        raise InvalidRequest(
            f"obstore cannot be told the storage options {', '.join(rest)}: leave out 'reader', or those"
        )
    if reader == "fsspec" or make_store is None:
        from shoal.origin.generic import open_generic

        return open_generic(url, rest, deadlines, shown={k: v for k, v in shown.items() if k != "reader"})
    try:
        from shoal.origin.objectstore import ObjectStoreOrigin
    except ImportError as error:
        raise InvalidRequest(
            f"reading {url.protocol} needs the package 'obstore': pip install 'shoal[origins]'"
        ) from error
    return ObjectStoreOrigin(
        url,
        endpoint="",
        identity=f"{url.protocol}://{url.authority}",
        service="Google Cloud Storage" if url.protocol == "gs" else "Azure Blob Storage",
        make_store=make_store,
        deadlines=deadlines,
        hint='add {"reader": "fsspec"} to the storage options',
    )


def google_config(options: Mapping[str, Any]) -> GCSConfig | None:
    """obstore's configuration for gcsfs options; None where obstore cannot be told one of them."""
    if options.keys() - {"token"}:
        return None
    match options.get("token"):
        case None | "google_default":
            return {}
        case "anon":
            return {"skip_signature": True}
        case str(path) if path.endswith(".json"):
            return {"application_credentials": path}
        case _:
            return None


def azure_config(options: Mapping[str, Any], account: str) -> AzureConfig | None:
    """obstore's configuration for adlfs options; None where obstore cannot be told one of them."""
    rest = dict(options)
    is_anonymous = rest.pop("anon", False)
    if not rest.keys() <= _AZURE_OPTIONS or not account:
        return None
    config: AzureConfig = {"account_name": account}
    if key := rest.get("account_key"):
        config["account_key"] = key
    if token := rest.get("sas_token"):
        config["sas_key"] = token
    if is_anonymous:
        config["skip_signature"] = True
    for name in ("tenant_id", "client_id", "client_secret"):
        if value := rest.get(name):
            config[name] = value
    return config


def _azure_account(url: urls.OriginUrl, options: Mapping[str, Any]) -> tuple[urls.OriginUrl, str]:
    """The URL with its account written out, which makes it unique, and the account; "" where nothing names one."""
    container, _, host = url.authority.partition("@")
    account = host.partition(".")[0] if host else str(options.get("account_name") or "")
    if account and not host:
        url = urls.OriginUrl(url.protocol, f"{container}@{account}{_AZURE_HOST}", url.path)
    return url, account


def _google(url: urls.OriginUrl, options: Mapping[str, Any]) -> MakeStore | None:
    config = google_config(options)
    if config is None:
        return None

    def make(client: ClientConfig, retries: RetryConfig) -> ObjectStore:
        from obstore.store import GCSStore

        return GCSStore(url.authority, config=config, client_options=client, retry_config=retries)

    return make


def _azure(url: urls.OriginUrl, options: Mapping[str, Any], account: str) -> MakeStore | None:
    config = azure_config(options, account)
    if config is None:
        return None
    container = url.authority.partition("@")[0]

    def make(client: ClientConfig, retries: RetryConfig) -> ObjectStore:
        from obstore.store import AzureStore

        return AzureStore(container, config=config, client_options=client, retry_config=retries)

    return make
