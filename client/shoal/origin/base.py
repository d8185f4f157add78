"""What every origin can do, and the patience it may have while doing it.

An origin is where a dataset really lives. It is listed once for a snapshot and read in parts by cache nodes, never
written. The rule: an origin raises nothing but `shoal.errors`; whatever its library throws is converted inside its own
module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NoReturn, Protocol, Self

import tenacity

from shoal.errors import InvalidRequest, OriginChanged, OriginNotFound, OriginUnavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Rows in one batch of a listing, and keys in one page of an S3 answer.
PAGE_ROWS = 1000

Sink = Callable[[memoryview], None]
"""Takes the next piece of a range. The view, of format "B", is valid only during the call."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One row of a listing.

    Attributes:
        path: below the origin's URL, "/" between names; "" when the URL is itself one object.
        size_bytes: of the object.
        version: what the origin calls this content (an ETag, a generation, a time and size). Equal versions of one path
            mean equal bytes; the text is opaque to everybody but the origin that gave it.
    """

    path: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long an origin may keep us waiting, in seconds.

    An attempt fails after `connect_s` without a connection or `idle_s` without a byte; one that makes progress is never
    cut off. No attempt starts in the last `idle_s` of its deadline, so a silent origin costs a deadline, no more.

    Attributes:
        contact_s: for the first answer while listing, where a person waits for ``shoal dataset add``.
        read_s: for each read, and for each further page of a listing.
        tries: attempts of one read or page, at most; with `read_s` the bound on what an origin in trouble is asked.
    """

    contact_s: float = 10.0
    read_s: float = 20.0
    connect_s: float = 3.0
    idle_s: float = 8.0
    tries: int = 12

    @classmethod
    def parse(cls, raw: object) -> Self:
        """From the storage option ``patience``: ``{"read_s": 60, "tries": 30}``; what is not named has its default.

        Raises:
            InvalidRequest: it is something else.
        """
        names = [each.name for each in fields(cls)]
        if not isinstance(raw, dict) or not raw.keys() <= set(names):
            raise InvalidRequest(
                f"the storage option 'patience' is {raw!r}: write an object with any of {', '.join(names)}"
            )
        for name, value in raw.items():
            is_number = isinstance(value, int if name == "tries" else int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < 86_400:
                raise InvalidRequest(f"'{name}' in the storage option 'patience' is {value!r}: write a positive number")
        return cls(**raw)

    def retry_s(self, deadline_s: float) -> float:
        """How long after its start an operation with `deadline_s` may begin another attempt."""
        return max(deadline_s - self.idle_s, 0.0)

    def attempts(self, deadline_s: float) -> tenacity.Retrying:
        """A retry loop for `OriginUnavailable`: exponential waits of 0.1 to 2 s with full jitter, or what it asks for.

        What the last attempt raised is raised with how often it was tried. An origin that asks for a wait beyond the
        deadline is not waited for.
        """
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(OriginUnavailable),
            wait=_wait_s,
            stop=tenacity.stop_any(
                tenacity.stop_before_delay(self.retry_s(deadline_s)), tenacity.stop_after_attempt(self.tries)
            ),
            retry_error_callback=_gave_up,
        )


_JITTER = tenacity.wait_random_exponential(multiplier=0.1, max=2)


def _wait_s(state: tenacity.RetryCallState) -> float:
    return max(_JITTER(state), _error_of(state).retry_after_s)


def _gave_up(state: tenacity.RetryCallState) -> NoReturn:
    error = _error_of(state)
    count = state.attempt_number
    tried = f"tried {count} times in {state.seconds_since_start or 0:.0f} s" if count > 1 else "tried once"
    raise OriginUnavailable(f"{error}; {tried}", is_busy=error.is_busy, retry_after_s=error.retry_after_s) from error


def _error_of(state: tenacity.RetryCallState) -> OriginUnavailable:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, OriginUnavailable), "nothing else is retried"
    return error


class Origin(Protocol):
    """A dataset's origin. Thread-safe: `read` is called from many threads at once.

    Attributes:
        url: canonical URL of the prefix or object: no slash at the end, no credentials.
        endpoint: the service behind the URL where the protocol has several (an S3 endpoint URL); "" where the URL alone
            is unique.
        identity: what object keys name the origin by. It does not depend on where the prefix was cut
            (``s3://bucket@endpoint``), so that datasets over nested prefixes share shards.
        key_prefix: the rest of the prefix, with a slash at the end unless it is empty. See `key_path`.
    """

    @property
    def url(self) -> str: ...

    @property
    def endpoint(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def key_prefix(self) -> str: ...

    def list(self) -> Iterator[list[ObjectInfo]]:
        """Every object below the URL, in batches, in any order, each path once.

        Raises:
            OriginNotFound: nothing is there; the message says whether the bucket is missing or the prefix is empty.
            OriginDenied, OriginUnavailable, OriginError: the origin's own answer.
            InvalidRequest: an object has a name that cannot be a path.
        """
        ...

    def read(self, path: str, version: str, start: int, end: int) -> Buffer:
        """Bytes [start, end) of `version` of the object at `path`. Blocks.

        Returns:
            A buffer of exactly ``end - start`` bytes that nobody else holds, valid as long as it is referenced. For no
            bytes (``start == end``) nothing is asked: they are of any version.

        Raises:
            OriginChanged: the object has another version now, is shorter, or is gone.
            OriginDenied, OriginUnavailable, OriginError: the origin's own answer.
        """
        ...

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        """Hand bytes [start, end) of `version` to `sink` as they come, in order, without a gap and each once. Blocks.

        `sink` is called in the calling thread, the first time as soon as some bytes are here. Pieces are of 1 MiB at
        most, but for origins that can be checked only whole: those hand over the range in one piece. One attempt: after
        a failure in the middle `sink` has had the beginning, and `shoal.origin.patient` asks for the rest. What `sink`
        raises goes through unchanged and ends the read.

        Raises:
            OriginChanged: as `read`. Bytes of `version` may have been handed over before, of another never.
            OriginDenied, OriginUnavailable, OriginError: the origin's own answer.
        """
        ...

    def close(self) -> None:
        """Let go of connections. Nothing may be called afterwards."""
        ...


def key_path(key_prefix: str, path: str) -> str:
    """The object's full path inside the origin's `identity`: what object keys are made from.

    ``key_path("train/", "a/0.arrow") == "train/a/0.arrow"``; the path "" is the prefix itself, an object.
    """
    return key_prefix + path if path else key_prefix.removesuffix("/")


def check_range(url: str, start: int, end: int) -> None:
    """Raise `InvalidRequest` unless ``0 <= start <= end``."""
    if not 0 <= start <= end:
        raise InvalidRequest(f"bytes {start} to {end} of {url} are no range: 0 <= start <= end is needed")


def changed(url: str, reason: str) -> OriginChanged:
    """The error for an object that is not what the snapshot lists."""
    return OriginChanged(
        f"{url} {reason} since the snapshot was made: run 'shoal dataset refresh NAME' and open the dataset again"
    )


def wrong_length(url: str, got_bytes: int, wanted_bytes: int, service: str) -> OriginUnavailable:
    """The error for a body that is not what was asked; worth another attempt."""
    return OriginUnavailable(
        f"{service} sent {got_bytes} bytes of {url} where {wanted_bytes} were asked for: the connection is bad, try "
        "later"
    )


def unusable(url: str, service: str, reason: str) -> OriginUnavailable:
    """The error for an answer that is not to the question, such as another range; worth another attempt."""
    return OriginUnavailable(f"{service} gave an answer for {url} that cannot be used ({reason}): try later")


def nothing_there(url: str, bucket: str, service: str) -> OriginNotFound:
    """The error for a prefix without objects; `bucket` is given where the URL names all of one."""
    what = f"the bucket {bucket!r} is empty" if bucket else f"{url} holds no object"
    return OriginNotFound(f"{what} (the bucket is there, at {service}): check the path, or write the objects first")


def e_tag_version(e_tag: str | None, url: str) -> str:
    """An ETag without its quotes; a weak one (``W/"…"``) as it is.

    A version id is never used beside it: a listing has none, and keys must not depend on how an object was found.

    Raises:
        InvalidRequest: there is none, so that nothing tells one version from the next.
    """
    if not e_tag:
        raise InvalidRequest(f"{url} has no ETag, so its versions cannot be told apart: use another origin")
    return unquoted(e_tag)


def unquoted(e_tag: str) -> str:
    """`e_tag` without the quotes around it."""
    return e_tag[1:-1] if len(e_tag) > 1 and e_tag[0] == e_tag[-1] == '"' else e_tag


def if_match(version: str) -> str:
    """The If-Match header for what `e_tag_version` gave."""
    return version if version.startswith("W/") else f'"{version}"'
