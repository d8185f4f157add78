"""What a failed request to an object store or web server means for us. Pure.

Each library reports failures in its own words; its module takes those apart into a `Failure`, and this table alone says
which of `shoal.errors` that is, so that every reader of one service gives the same answer.
"""

from __future__ import annotations

import email.utils
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shoal.errors import InvalidRequest, OriginDenied, OriginError, OriginNotFound, OriginUnavailable, ShoalError
from shoal.origin import base

#: Error codes of S3 (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html) and Azure that say more than the
#: status they come with.
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_BAD_BUCKET = {"InvalidBucketName"}
_DENIED = {
    *("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "InvalidSecurity", "SignatureDoesNotMatch"),
    *("RequestTimeTooSkewed", "TokenRefreshRequired", "AuthenticationFailed"),
}
_BUSY = {"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "ThrottlingException", "ServerBusy"}
_ELSEWHERE = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}

#: What a library's description of a failure without an answer contains, and what that means; the first match counts.
_WORDS = (
    ("connection refused", "connection refused"),
    ("connectionrefused", "connection refused"),
    ("connect call failed", "connection refused"),
    ("dns error", "its name cannot be resolved"),
    ("name or service not known", "its name cannot be resolved"),
    ("name resolution", "its name cannot be resolved"),
    ("certificate", "its TLS certificate is not trusted"),
    ("timeout", "no answer in time"),
    ("timedout", "no answer in time"),
    ("timed out", "no answer in time"),
    ("incomplete", "the connection broke off"),
    ("interrupted", "the connection broke off"),
    ("reset", "the connection broke off"),
    ("closed", "the connection broke off"),
    ("disconnected", "the connection broke off"),
    ("body", "the connection broke off"),
    ("payload", "the connection broke off"),
    ("connect", "no connection"),
)


#: The reasons of those above that tell of a service that is swamped or away, rather than of one bad connection.
_SILENT = {"connection refused", "no answer in time", "no connection"}


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed request.

    Attributes:
        status: of the HTTP answer; 0 where there was none.
        code: the service's own name of the error; "" where it gave none.
        reason: a few words, for a failure without an answer.
        retry_after_s: from the answer's Retry-After; 0 where there is none.
    """

    status: int = 0
    code: str = ""
    reason: str = ""
    retry_after_s: float = 0.0

    def __str__(self) -> str:
        if not self.status:
            return self.reason or self.code or "no answer"
        return f"HTTP {self.status}, {self.code}" if self.code else f"HTTP {self.status}"


def to_error(failure: Failure, *, url: str, bucket: str, service: str) -> ShoalError:
    """The error that `failure` is for whoever asked for `url`.

    Args:
        bucket: the bucket, container or host in `url`.
        service: what answers, or does not: an endpoint URL or a name such as "Amazon S3".
    """
    status, code = failure.status, failure.code
    if code in _NO_BUCKET:
        return OriginNotFound(
            f"the bucket {bucket!r} does not exist at {service}: check the name in {url}, and the endpoint in the "
            "storage options"
        )
    if code in _BAD_BUCKET:
        return InvalidRequest(f"{service} takes {bucket!r} for no bucket name: check {url}")
    if code in _ELSEWHERE or (300 < status < 400 and status != 304):
        return InvalidRequest(
            f"the bucket {bucket!r} is in another region than the one asked ({failure}): add "
            '{"client_kwargs": {"region_name": "REGION"}} to the storage options'
        )
    if status in (401, 403) or code in _DENIED:
        return OriginDenied(
            f"{service} refused the credentials for {url} ({failure}): correct the dataset's storage options, or the "
            "environment they come from"
        )
    if status == 404:
        return OriginNotFound(f"{url} does not exist at {service}: check the URL")
    if status == 412:
        return base.changed(url, "has changed")
    if status == 416:
        return base.changed(url, "has become shorter")
    if status == 0:
        return OriginUnavailable(
            f"{service} does not answer for {url} ({failure}): check the endpoint in the storage options, and that the "
            "service runs",
            is_busy=failure.reason in _SILENT,
        )
    if status in (408, 425, 429) or (status >= 500 and status != 501) or code in _BUSY:
        return OriginUnavailable(
            f"{service} keeps failing for {url} ({failure}): it is overloaded or down, try later",
            is_busy=status in (429, 503) or code in _BUSY,
            retry_after_s=failure.retry_after_s,
        )
    return OriginError(f"{service} refused the request for {url} ({failure}): check the URL and the storage options")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what led to it, the last first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def words_for(texts: Iterable[object]) -> str:
    """Why nothing answered, from how a library puts it; the first line of that where nothing in it is known."""
    described = [f"{type(text).__name__} {text}" if isinstance(text, BaseException) else str(text) for text in texts]
    everything = " ".join(described).lower()
    for sign, words in _WORDS:
        if sign in everything:
            return words
    return described[0].partition("\n")[0].strip() if described else ""


def retry_after_s(header: str | None, *, now_s: float) -> float:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3): a number or a date; 0 where it says nothing useful.

    Args:
        now_s: the time of now, as `time.time` gives it.
    """
    text = (header or "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return 0.0
