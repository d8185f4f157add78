"""What each failure of a service means, and what people are told."""

from __future__ import annotations

import pytest

from shoal.errors import (
    InvalidRequest,
    OriginChanged,
    OriginDenied,
    OriginError,
    OriginNotFound,
    OriginUnavailable,
    ShoalError,
)
from shoal.origin import Deadlines, base, failures
from shoal.origin.failures import Failure


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (Failure(404, "NoSuchBucket"), OriginNotFound, "the bucket 'b' does not exist at Amazon S3: check the name"),
        (Failure(404, "ContainerNotFound"), OriginNotFound, "the bucket 'b' does not exist"),
        (Failure(404, "NoSuchKey"), OriginNotFound, "s3://b/p does not exist"),
        (Failure(404), OriginNotFound, "s3://b/p does not exist"),
        (Failure(400, "InvalidBucketName"), InvalidRequest, "takes 'b' for no bucket name"),
        (Failure(301, "PermanentRedirect"), InvalidRequest, '"region_name": "REGION"'),
        (Failure(400, "AuthorizationHeaderMalformed"), InvalidRequest, "another region"),
        (
            Failure(403, "AccessDenied"),
            OriginDenied,
            r"refused the credentials for s3://b/p \(HTTP 403, AccessDenied\)",
        ),
        (Failure(401), OriginDenied, "refused the credentials"),
        (Failure(400, "ExpiredToken"), OriginDenied, "ExpiredToken"),
        (Failure(412, "PreconditionFailed"), OriginChanged, "has changed since"),
        (Failure(416, "InvalidRange"), OriginChanged, "has become shorter since"),
        (
            Failure(reason="connection refused"),
            OriginUnavailable,
            r"does not answer for s3://b/p \(connection refused\)",
        ),
        (Failure(), OriginUnavailable, "no answer"),
        (Failure(429), OriginUnavailable, "overloaded or down, try later"),
        (Failure(500, "InternalError"), OriginUnavailable, "keeps failing"),
        (Failure(503, "SlowDown"), OriginUnavailable, "HTTP 503, SlowDown"),
        (Failure(400, "RequestTimeout"), OriginUnavailable, "RequestTimeout"),
        (Failure(501, "NotImplemented"), OriginError, "refused the request"),
        (Failure(400, "Whatever"), OriginError, r"refused the request for s3://b/p \(HTTP 400, Whatever\)"),
        (Failure(418), OriginError, "HTTP 418"),
    ],
)
def test_failures(failure: Failure, kind: type[ShoalError], words: str) -> None:
    error = failures.to_error(failure, url="s3://b/p", bucket="b", service="Amazon S3")
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tcp connect error: Connection refused (os error 111)", "connection refused"),
        ("kind: ConnectionRefused", "connection refused"),
        ("Connect call failed ('127.0.0.1', 1)", "connection refused"),
        ("[Errno -2] Name or service not known", "its name cannot be resolved"),
        ("invalid peer certificate: UnknownIssuer", "its TLS certificate is not trusted"),
        ("operation timed out", "no answer in time"),
        ("IncompleteBody", "the connection broke off"),
        ("Server disconnected", "the connection broke off"),
        ("something new\nand more", "something new"),
    ],
)
def test_words_for_what_libraries_say(text: str, words: str) -> None:
    assert failures.words_for([text]) == words


def test_words_look_at_causes_too() -> None:
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise RuntimeError("cannot") from error
    except RuntimeError as error:
        assert failures.words_for(failures.causes(error)) == "connection refused"


def test_etags() -> None:
    assert base.e_tag_version('"abc-2"', "u") == "abc-2"
    assert base.if_match("abc-2") == '"abc-2"'
    assert base.e_tag_version('W/"abc"', "u") == 'W/"abc"'
    assert base.if_match('W/"abc"') == 'W/"abc"'
    for missing in (None, ""):
        with pytest.raises(InvalidRequest, match="has no ETag"):
            base.e_tag_version(missing, "u")


def test_attempts_end_in_time_for_the_last_one_to_fail() -> None:
    limits = Deadlines(contact_s=10, read_s=20, connect_s=3, idle_s=8)
    assert (limits.retry_s(limits.contact_s), limits.retry_s(limits.read_s)) == (2, 12)
    assert Deadlines(idle_s=30).retry_s(20) == 0


def test_attempts_repeat_only_what_may_pass() -> None:
    calls: list[int] = []

    def fail(error: Exception) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise error

    patient = Deadlines(read_s=60, idle_s=0)
    patient.attempts(60)(fail, OriginUnavailable("busy"))
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(OriginDenied):
        patient.attempts(60)(fail, OriginDenied("no"))
    assert len(calls) == 1
