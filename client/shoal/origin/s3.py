"""S3 and what speaks its protocol, with one of two readers.

obstore reads unless an option asks for something it cannot be told, or ``{"reader": "s3fs"}`` asks for s3fs; both give
the same listing and the same versions. Credentials come from the options, else from where every AWS tool finds them
(environment, profile, container, instance), through botocore for both readers.

The rule: this is the only module that imports s3fs, and it does so when s3fs is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shoal.errors import InvalidRequest, OriginDenied
from shoal.origin import urls
from shoal.origin.base import Deadlines, Origin
from shoal.origin.s3_settings import Settings, translate
from shoal.origin.s3fs_reader import S3fsOrigin

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config, S3Credential

_OBSTORE, _S3FS = "obstore", "s3fs"
_DEFAULT_REGION = "us-east-1"
_FSSPEC_OPTIONS = {"use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache"}
_NO_CREDENTIALS = (
    "no AWS credentials were found: give 'key' and 'secret' as storage options, set AWS_ACCESS_KEY_ID and "
    'AWS_SECRET_ACCESS_KEY where the controller and the cache nodes run, or say {"anon": true} for a public bucket'
)


def open_s3(url: urls.OriginUrl, options: Mapping[str, Any], deadlines: Deadlines) -> Origin:
    """The origin at `url` (``s3://bucket[/prefix]``); connects to nothing yet.

    Args:
        options: fsspec's, resolved, and ``reader``.

    Raises:
        InvalidRequest: an option cannot be honoured, or the package of the reader is not installed.
    """
    rest = dict(options)
    reader = rest.pop("reader", None)
    if reader not in (None, _OBSTORE, _S3FS):
        raise InvalidRequest(f"the storage option 'reader' is {reader!r}: for S3 write 'obstore' or 's3fs'")
    settings = translate(rest, os.environ)
    if settings.untranslatable and reader == _OBSTORE:
        names = ", ".join(settings.untranslatable)
        raise InvalidRequest(f"obstore cannot be told the storage options {names}: leave out 'reader', or those")
    session = None
    if settings.profile or not (settings.is_anonymous or settings.key) or not (settings.endpoint or settings.region):
        session = _Session(settings.profile)
        settings = dataclasses.replace(
            settings,
            region=settings.region or session.variable("region"),
            endpoint=settings.endpoint or translate({"endpoint_url": session.variable("endpoint_url")}, {}).endpoint,
        )
    deadlines = dataclasses.replace(
        deadlines, connect_s=settings.connect_s or deadlines.connect_s, idle_s=settings.idle_s or deadlines.idle_s
    )
    suffix = f"@{settings.identity_endpoint}" if settings.identity_endpoint else ""
    identity = f"s3://{url.authority}{suffix}"
    if reader == _S3FS or settings.untranslatable:
        filesystem = _s3fs(rest, settings, deadlines)
        return S3fsOrigin(
            url,
            endpoint=settings.identity_endpoint,
            identity=identity,
            service=settings.service,
            filesystem=filesystem,
            deadlines=deadlines,
        )
    try:
        from shoal.origin.objectstore import ObjectStoreOrigin
    except ImportError as error:
        raise InvalidRequest("reading S3 needs the package 'obstore': pip install 'shoal[origins]'") from error
    return ObjectStoreOrigin(
        url,
        endpoint=settings.identity_endpoint,
        identity=identity,
        service=settings.service,
        make_store=functools.partial(_store, url.authority, settings, session),
        deadlines=deadlines,
        hint='add {"reader": "s3fs"} to the storage options',
    )


class _Session:
    """botocore's view of this process: profile, region, and credentials that renew themselves."""

    def __init__(self, profile: str) -> None:
        try:
            import botocore.session
        except ImportError as error:
            raise InvalidRequest(
                "AWS profiles and credentials need the package 'botocore': pip install 'shoal[origins]'"
            ) from error
        self._session = botocore.session.Session(profile=profile or None)
        self._profile = profile

    def variable(self, name: str) -> str:
        """The value that the profile gives `name`; "" where it gives none."""
        return str(self._scoped(lambda: self._session.get_scoped_config().get(name)) or "")

    def credential(self) -> S3Credential:
        """Credentials for requests of the next minutes. Called from obstore's threads, again and again."""
        found = self._scoped(self._session.get_credentials)
        if found is None:
            raise OriginDenied(_NO_CREDENTIALS)
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            # botocore renews what has less than ten minutes left, so these are good for ten; being asked is cheap.
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }

    def _scoped(self, call: Callable[[], Any]) -> Any:
        from botocore import exceptions

        try:
            return call()
        except exceptions.ProfileNotFound as error:
            raise InvalidRequest(
                f"the AWS profile {self._profile!r} is in no configuration file of this process: correct 'profile' in "
                "the storage options, or install the file where the controller and the cache nodes run"
            ) from error
        except exceptions.BotoCoreError as error:
            raise OriginDenied(f"AWS credentials cannot be had ({error}): correct the AWS configuration") from error


def _store(
    bucket: str, settings: Settings, session: _Session | None, client: ClientConfig, retries: RetryConfig
) -> ObjectStore:
    """obstore's view of `bucket`.

    obstore reads AWS_* by itself and mixes them with what it is given, variable by variable, so everything that decides
    whom we talk to, and as whom, is given: the endpoint under the name that wins, and credentials by a provider.
    """
    from obstore.store import S3Store

    config: S3Config = {
        "region": settings.region or _DEFAULT_REGION,
        "virtual_hosted_style_request": settings.is_virtual_hosted,
        "request_payer": settings.is_requester_pays,
        "skip_signature": settings.is_anonymous,
    }
    if settings.endpoint:
        endpoint = settings.endpoint
        if settings.is_virtual_hosted:
            parts = urlsplit(endpoint)
            endpoint = parts._replace(netloc=f"{bucket}.{parts.netloc}").geturl()
        config["aws_endpoint_url_s3"] = endpoint
    client = client.copy()
    if settings.verify is False:
        client["allow_invalid_certificates"] = True
    elif isinstance(settings.verify, str):
        client["root_certificate"] = _read_certificates(settings.verify)
    provider: Callable[[], S3Credential] | None
    if settings.is_anonymous:
        provider = None
    elif settings.key:
        fixed: S3Credential = {
            "access_key_id": settings.key,
            "secret_access_key": settings.secret,
            "token": settings.token or None,
            "expires_at": None,
        }
        provider = lambda: fixed  # noqa: E731 - a value that obstore wants as a function
    else:
        assert session is not None
        provider = session.credential
    return S3Store(bucket, config=config, client_options=client, retry_config=retries, credential_provider=provider)


def _s3fs(options: Mapping[str, Any], settings: Settings, deadlines: Deadlines) -> Any:
    """An `s3fs.S3FileSystem` of our own: shared with nobody, without caches, and with attempts left to us.

    Raises:
        InvalidRequest: s3fs is not installed, or does not know an option: it would pass over a misspelt one.
    """
    try:
        import aiobotocore.session
        import s3fs
    except ImportError as error:
        raise InvalidRequest("this origin needs the package 's3fs': pip install 'shoal[origins]'") from error
    found: dict[str, Any] = {name: value for name, value in options.items() if name not in ("profile", "region_name")}
    known = inspect.signature(s3fs.S3FileSystem.__init__).parameters.keys() | _FSSPEC_OPTIONS
    if unknown := sorted(found.keys() - known):
        raise InvalidRequest(f"S3 has no storage option {', '.join(map(repr, unknown))}: check the spelling")
    if settings.endpoint:
        found["endpoint_url"] = settings.endpoint
        found["client_kwargs"] = {k: v for k, v in (found.get("client_kwargs") or {}).items() if k != "endpoint_url"}
    if settings.region:
        found["client_kwargs"] = {**(found.get("client_kwargs") or {}), "region_name": settings.region}
    found["config_kwargs"] = {
        **(found.get("config_kwargs") or {}),
        "connect_timeout": deadlines.connect_s,
        "read_timeout": deadlines.idle_s,
        "retries": {"max_attempts": 0},
    }
    session = aiobotocore.session.AioSession(profile=settings.profile or None)
    session.register_component("data_loader", _service_models())
    found |= {"use_listings_cache": False, "skip_instance_cache": True, "asynchronous": False, "session": session}
    try:
        filesystem = s3fs.S3FileSystem(**found)
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(f"s3fs refuses the storage options: {error}") from error
    filesystem.retries = 1
    return filesystem


@functools.cache
def _service_models() -> Any:
    """botocore's descriptions of services. They take a tenth of a second to load and are the same for every session."""
    import botocore.loaders

    return botocore.loaders.create_loader()


def _read_certificates(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"the storage option 'client_kwargs.verify' names {path!r}, which cannot be read ({error.strerror})"
        ) from error
