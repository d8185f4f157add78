"""Every other fsspec protocol, through the file system that fsspec has for it.

fsspec promises no conditional read, so the version is looked up *after* each read: what still has the version then had
it while it was read. That is one `info` a read, the price of never mixing versions, and why a range is handed over in
one piece.

A version is the first of `_VERSION_FIELDS` that a file's description has, with that field's name in front, because the
listing and `info` of one file system may describe a file differently and only equal fields may be compared.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
import xxhash
from fsspec.registry import known_implementations

from shoal.errors import InvalidRequest, OriginError, OriginNotFound, OriginUnavailable, ShoalError
from shoal.origin import base, failures, pieces, urls
from shoal.origin.base import Deadlines, ObjectInfo, Sink

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

#: What says most about content first: checksums and generations before times. The size goes with every time.
_CONTENT_FIELDS = (
    *("ETag", "etag", "version_id", "VersionId", "generation"),
    *("checksum", "sha256", "md5", "md5Hash", "Content-MD5", "Digest", "content_hash", "blob_id", "sha"),
)
_TIME_FIELDS = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")
_VERSION_FIELDS = (*_CONTENT_FIELDS, *_TIME_FIELDS)
_SIZE_FIELD = "size"
#: Files described at once where a listing leaves out what a version needs.
_DESCRIBERS = 16
_HTML = "text/html"


def open_generic(
    url: urls.OriginUrl, options: Mapping[str, Any], deadlines: Deadlines, *, shown: Mapping[str, Any]
) -> GenericOrigin:
    """The origin at `url`, read by fsspec.

    Args:
        options: resolved, for the file system's constructor.
        shown: the same as people may see them. They are part of the identity: a host or a revision may be among them.

    Raises:
        InvalidRequest: fsspec does not know the protocol, its package is not installed, or it refuses the options.
    """
    try:
        kind = fsspec.get_filesystem_class(url.protocol)
    except ValueError as error:
        raise InvalidRequest(
            f"{url.protocol!r} in {url} is a protocol that fsspec does not know: check the URL"
        ) from error
    except ImportError as error:
        known = known_implementations.get(url.protocol, {})
        raise InvalidRequest(
            f"{url} cannot be read yet: {str(known.get('err', error)).rstrip('.')} where the controller and the cache "
            "nodes run"
        ) from error
    arguments = dict(options)
    if url.protocol in urls.WEB:
        arguments = _web_arguments(arguments, deadlines)
    try:
        arguments = {**kind._get_kwargs_from_urls(str(url)), **arguments}
        filesystem = kind(**arguments, skip_instance_cache=True)
        root = str(kind._strip_protocol(str(url)))
    except Exception as error:  # constructors of other people's file systems
        raise InvalidRequest(
            f"fsspec cannot open {url} with these storage options ({_short(error)}): check both"
        ) from error
    digest = f"#{xxhash.xxh3_64_hexdigest(json.dumps(shown, sort_keys=True, default=str).encode())}" if shown else ""
    return GenericOrigin(
        url, identity=f"{url.protocol}://{url.authority}{digest}", filesystem=filesystem, root=root, deadlines=deadlines
    )


def _web_arguments(options: dict[str, Any], deadlines: Deadlines) -> dict[str, Any]:
    """What fsspec's HTTP needs besides: our patience for its five minutes, and bytes as they are stored."""
    import aiohttp

    client = dict(options.get("client_kwargs") or {})
    client.setdefault(
        "timeout",
        aiohttp.ClientTimeout(total=None, sock_connect=deadlines.connect_s, sock_read=deadlines.idle_s),
    )
    headers = {"Accept-Encoding": "identity", **(options.get("headers") or {})}
    return {**options, "client_kwargs": client, "headers": headers}


class GenericOrigin:
    """An `Origin` over one fsspec file system."""

    def __init__(self, url: urls.OriginUrl, *, identity: str, filesystem: Any, root: str, deadlines: Deadlines) -> None:
        """Connects to nothing yet.

        Args:
            filesystem: used by nobody else, since its caches are dropped as it is read.
            root: the URL as the file system spells it.
        """
        self.url = str(url)
        self.endpoint = ""
        self.identity = identity
        self.key_prefix = url.path + "/" if url.path else ""
        self._is_web = url.protocol in urls.WEB
        self._service = url.authority or url.protocol
        self._filesystem, self._root, self._deadlines = filesystem, root, deadlines

    # -- listing ---------------------------------------------------------------------------------------------------

    def list(self) -> Iterator[list[ObjectInfo]]:
        """See `Origin.list`. fsspec answers with the whole listing at once; it is in memory while this runs.

        A web server has no listing: its URL is one object, unless it answers with an HTML page, whose links below the
        URL are then the objects.
        """
        self._filesystem.invalidate_cache()
        found = self._attempt(self._deadlines.contact_s, self._find)
        self._filesystem.invalidate_cache()
        rows = iter(found.items())
        is_empty = True
        with ThreadPoolExecutor(_DESCRIBERS, thread_name_prefix="shoal-list") as pool:
            while page := list(islice(rows, base.PAGE_ROWS)):
                if batch := [row for row in pool.map(self._row, *zip(*page, strict=True)) if row]:
                    is_empty = False
                    yield batch
        if is_empty:
            raise OriginNotFound(f"{self.url} holds no object: check the path, or write the objects first")

    def _find(self) -> dict[str, dict[str, Any]]:
        """Descriptions by name, as the file system spells names; of the URL itself where it is one object."""
        if self._is_web:
            info = self._filesystem.info(self._root)
            if info.get("mimetype") != _HTML:
                return {self._root: info}
        try:
            found: dict[str, dict[str, Any]] = self._filesystem.find(self._root, detail=True)
        except FileNotFoundError:
            found = {}
        if not found:
            info = self._filesystem.info(self._root) if self._filesystem.exists(self._root) else {}
            if info.get("type") == "file":
                return {self._root: info}
        return found

    def _row(self, name: str, info: Mapping[str, Any]) -> ObjectInfo | None:
        if info.get("type") == "directory" or name.endswith("/"):
            return None
        path = self._relative(name)
        if path is None:
            return None
        if info.get("size") is None or _field_of(info) is None:
            info = self._attempt(self._deadlines.read_s, lambda: self._filesystem.info(name))
        size = info.get("size")
        if size is None:
            raise InvalidRequest(
                f"{urls.join(self.url, path)} has no known size, which caching needs: register a prefix without it, or "
                "another origin"
            )
        return ObjectInfo(path, int(size), version_of(info))

    def _relative(self, name: str) -> str | None:
        """`name` below the root; None for what lies elsewhere (links of an HTML page that only look deeper)."""
        root, name = self._root.strip("/"), name.lstrip("/")
        if name == root:
            return ""
        if root and not name.startswith(root + "/"):
            return None
        path = name[len(root) + 1 :] if root else name
        return None if self._is_web and ("?" in path or "#" in path) else path

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, path: str, version: str, start: int, end: int) -> Buffer:
        """See `Origin.read`."""
        return pieces.collected(self, path, version, start, end)

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        """See `Origin.stream`. One piece, since the version is known after the bytes and each look-up is a request."""
        url = urls.join(self.url, path)
        name = f"{self._root.rstrip('/')}/{path}" if path else self._root
        base.check_range(url, start, end)
        if start < end:
            found = self._pieces(url, name, version, start, end)
            pieces.stream(found, start, end, sink, url=url, service=self._service)

    def _pieces(self, url: str, name: str, version: str, start: int, end: int) -> pieces.Pieces:
        try:
            with self._converted():
                body = self._checked(url, name, version, start, end)
        except OriginNotFound as error:
            raise base.changed(url, "was removed") from error
        if body:
            yield memoryview(body)

    def _checked(self, url: str, name: str, version: str, start: int, end: int) -> bytes:
        """[start, end) as far as it came, known to be of `version`."""
        body: bytes = self._filesystem.cat_file(name, start=start, end=end)
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(name)
        if _version(info, version.partition(":")[0]) != version:
            raise base.changed(url, "has changed")
        size = info.get("size")
        if size is not None and size < end:
            raise base.changed(url, "has become shorter")
        if len(body) == size and len(body) != end - start:
            raise OriginError(
                f"{self._service} sends all of {url} where a range was asked: Shoal needs a server that honours ranges"
            )
        return body

    def _attempt(self, deadline_s: float, call: Callable[[], T]) -> T:
        def converted() -> T:
            with self._converted():
                return call()

        return self._deadlines.attempts(deadline_s)(converted)

    @contextlib.contextmanager
    def _converted(self) -> Iterator[None]:
        try:
            yield
        except ShoalError:
            raise
        except Exception as error:  # whatever a file system of other people raises
            raise to_error(error, url=self.url, service=self._service) from error

    def close(self) -> None:
        """See `Origin.close`. The file system closes its connections when it is collected."""
        del self._filesystem


def to_error(error: Exception, *, url: str, service: str) -> ShoalError:
    """The error that an exception of an fsspec file system is.

    fsspec's HTTP says "not found" for everything, so an HTTP status or a failed connection among the causes goes first.
    """
    chain = list(failures.causes(error))
    for each in chain:
        status = getattr(each, "status", None)
        if isinstance(status, int):
            header = (getattr(each, "headers", None) or {}).get("Retry-After")
            failure = failures.Failure(status, retry_after_s=failures.retry_after_s(header, now_s=time.time()))
            return failures.to_error(failure, url=url, bucket=service, service=service)
    if any(isinstance(each, ConnectionError | TimeoutError) or _is_client_error(each) for each in chain):
        reason = failures.words_for(chain)
        return failures.to_error(failures.Failure(reason=reason), url=url, bucket=service, service=service)
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return failures.to_error(failures.Failure(404), url=url, bucket=service, service=service)
        case PermissionError():
            return failures.to_error(failures.Failure(403), url=url, bucket=service, service=service)
        case OSError():
            return OriginUnavailable(f"{url} cannot be read now ({_short(error)}): check the origin, then try again")
        case _:
            return OriginError(f"{url} cannot be read ({_short(error)}): check the URL and the storage options")


def _is_client_error(error: BaseException) -> bool:
    """Whether aiohttp could not talk to the server; its base class tells, without importing it."""
    return any(kind.__module__.startswith("aiohttp") and kind.__name__ == "ClientError" for kind in type(error).__mro__)


def _field_of(info: Mapping[str, Any]) -> str | None:
    return next((name for name in _VERSION_FIELDS if _is_value(info.get(name))), None)


def _is_value(value: Any) -> bool:
    return isinstance(value, str | int | float | datetime.datetime) and value not in ("", 0) and value is not True


def version_of(info: Mapping[str, Any]) -> str:
    """The version of a file that fsspec describes with `info`; its size alone where there is nothing better."""
    return _version(info, _field_of(info) or _SIZE_FIELD)


def _version(info: Mapping[str, Any], field: str) -> str:
    """``field:value``; with the size for a time, which alone does not tell two writes within one tick apart."""
    value = info.get(field)
    if field not in _TIME_FIELDS:
        return f"{field}:{base.unquoted(str(value))}"
    if isinstance(value, datetime.datetime):
        # Some file systems give a number here and a datetime there for the same time.
        value = (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    return f"{field}:{value if isinstance(value, str) else format(value or 0, '.6f')}-{info.get('size')}"


def _short(error: BaseException) -> str:
    return (str(error).partition("\n")[0] or type(error).__name__).strip()
