"""What both S3 readers make of a service that misbehaves, answer by answer."""

from __future__ import annotations

import http.server
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from shoal.errors import InvalidRequest, OriginChanged, OriginError, OriginUnavailable, ShoalError
from shoal.origin import Deadlines, ObjectInfo, Origin, open_origin
from tests.support.origin_contract import Pieces, content

#: More than any connection holds back, so that the beginning of a body arrives while its end is still to come.
DATA = content(4 << 20)
#: Attempts may go on for a minute, so a slow machine fails nothing; used where the last answer is a good one.
PATIENT = Deadlines(contact_s=60, read_s=60, connect_s=5, idle_s=5)
IMPATIENT = Deadlines(contact_s=0.4, read_s=0.4, connect_s=0.2, idle_s=0.2)


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. `cut` bytes of the body are announced but not sent; the connection closes at `Service.cut`."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int = 0


def part(start: int, end: int, *, e_tag: str = '"v1"', cut: int = 0) -> Answer:
    headers = {"ETag": e_tag, "Content-Range": f"bytes {start}-{end - 1}/{len(DATA)}"}
    return Answer(206, {**headers, "Last-Modified": "Tue, 24 Nov 2026 04:21:07 GMT"}, DATA[start:end], cut)


def error(status: int, code: str) -> Answer:
    return Answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def page(*objects: str, e_tag: str = "<ETag>&quot;v1&quot;</ETag>") -> Answer:
    contents = "".join(
        f"<Contents><Key>p/{key}</Key><Size>100</Size>{e_tag}"
        "<LastModified>2026-11-24T04:21:07Z</LastModified></Contents>"
        for key in objects
    )
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    return Answer(200, {"Content-Type": "application/xml"}, body.encode())


def cut_by(size: int) -> Callable[[int, int], Answer]:
    """The range asked for, whatever it is, without its last `size` bytes."""
    return lambda start, end: part(start, end, cut=size)


class Service:
    """Gives the answers of `script` in turn, the last one for ever.

    Attributes:
        script: answers, or what makes one for the range asked for.
        requests: path and If-Match of each.
        ranges: first byte and end of each that asked for a range.
        cut: connections whose answer is incomplete close when this is set, and are silent until then.
    """

    def __init__(self) -> None:
        self.script: list[Answer | Callable[[int, int], Answer]] = []
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[int, int]] = []
        self.cut = threading.Event()
        lock = threading.Lock()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with lock:
                    given = service.script.pop(0) if len(service.script) > 1 else service.script[0]
                    service.requests.append((self.path, self.headers.get("If-Match", "")))
                    if wanted := self.headers.get("Range"):
                        first, last = wanted.removeprefix("bytes=").split("-")
                        service.ranges.append((int(first), int(last) + 1))
                    answer = given if isinstance(given, Answer) else given(*service.ranges[-1])
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                try:
                    self.wfile.write(answer.body[: len(answer.body) - answer.cut])
                except ConnectionError:
                    answer = Answer(cut=1)  # the reader has had enough
                if answer.cut:
                    service.cut.wait(60)
                    self.close_connection = True

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    service = Service()
    threading.Thread(target=service.server.serve_forever, args=(0.01,), daemon=True).start()
    yield service
    service.server.shutdown()
    service.server.server_close()


@pytest.fixture
def service(running: Service) -> Service:
    running.script, running.requests, running.ranges = [], [], []
    running.cut.set()
    return running


@pytest.fixture(params=["obstore", "s3fs"])
def reader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def origin_at(service: Service, reader: str, deadlines: Deadlines) -> Origin:
    options = {"key": "k", "secret": "s", "endpoint_url": service.url, "reader": reader}
    return open_origin("s3://bucket/p", options, deadlines=deadlines)


def read(service: Service, reader: str, deadlines: Deadlines, start: int = 10, end: int = 90) -> bytes:
    return bytes(origin_at(service, reader, deadlines).read("x", "v1", start, end))


def listed(service: Service, reader: str, deadlines: Deadlines) -> list[ObjectInfo]:
    return [row for batch in origin_at(service, reader, deadlines).list() for row in batch]


@pytest.mark.parametrize(
    "trouble",
    [
        error(503, "SlowDown"),
        error(500, "InternalError"),
        error(429, "TooManyRequests"),
        part(10, 90, cut=30),
        part(10, 50),
    ],
    ids=["slow down", "internal", "too many", "cut off", "too short"],
)
def test_a_read_survives_passing_trouble(service: Service, reader: str, trouble: Answer) -> None:
    service.script = [trouble, trouble, part(10, 90)]
    assert read(service, reader, PATIENT) == DATA[10:90]
    assert len(service.requests) == 3
    assert {condition for _, condition in service.requests} == {'"v1"'}, "each attempt is conditional"


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (error(503, "SlowDown"), r"keeps failing for s3://bucket/p/x \(HTTP 503, SlowDown\)"),
        (part(10, 90, cut=30), r"does not answer for s3://bucket/p/x \(the connection broke off\)"),
        (part(10, 50), r"answer for s3://bucket/p/x that cannot be used \(.*got (10\.\.50|'bytes 10-49/)"),
    ],
)
def test_a_read_ends_when_trouble_stays(service: Service, reader: str, trouble: Answer, words: str) -> None:
    service.script = [trouble]
    with pytest.raises(OriginUnavailable, match=words):
        read(service, reader, IMPATIENT)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (error(412, "PreconditionFailed"), OriginChanged, "has changed since"),
        (error(404, "NoSuchKey"), OriginChanged, "was removed since"),
        (error(416, "InvalidRange"), OriginChanged, "has become shorter since"),
        # A service that knows no If-Match.
        (part(10, 90, e_tag='"v2"'), OriginChanged, "has changed since"),
        (error(400, "AuthorizationHeaderMalformed"), InvalidRequest, "another region"),
        (error(400, "BadThing"), OriginError, "HTTP 400, BadThing"),
    ],
)
def test_what_no_attempt_can_cure_is_said_at_once(
    service: Service, reader: str, answer: Answer, kind: type[ShoalError], words: str
) -> None:
    service.script = [answer]
    with pytest.raises(kind, match=words) as caught:
        read(service, reader, PATIENT)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is not None or answer.status == 206
    assert len(service.requests) == 1


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_from_the_byte_reached(service: Service, reader: str) -> None:
    service.script = [cut_by(1 << 20), cut_by(1 << 20), error(503, "SlowDown"), part]
    service.cut.clear()
    sink = Pieces()

    def cut_at_first(piece: memoryview) -> None:
        sink(piece)
        service.cut.set()

    origin_at(service, reader, PATIENT).stream("x", "v1", 10, len(DATA) - 10, cut_at_first)
    assert sink.data == DATA[10:-10]
    assert {condition for _, condition in service.requests} == {'"v1"'}, "each attempt is conditional"
    assert len(service.ranges) == 4
    assert service.ranges[0] == (10, len(DATA) - 10)
    assert service.ranges[1][0] > 10, "what came before the cut is not asked for again"
    reached = set(itertools.accumulate(map(len, sink.pieces), initial=10))
    for start, end in service.ranges:
        assert start in reached
        assert end == len(DATA) - 10
    assert service.ranges[3] == service.ranges[2], "an attempt without bytes reaches nothing"


def test_a_stream_of_an_object_that_changed_at_the_cut(service: Service, reader: str) -> None:
    """The second attempt finds another version: not a byte of it is handed over."""
    for answer in (error(412, "PreconditionFailed"), lambda start, end: part(start, end, e_tag='"v2"')):
        service.script, service.ranges = [cut_by(1 << 20), answer], []
        service.cut.clear()
        sink = Pieces()

        def cut_at_first(piece: memoryview, sink: Pieces = sink) -> None:
            sink(piece)
            service.cut.set()

        with pytest.raises(OriginChanged, match="has changed since"):
            origin_at(service, reader, PATIENT).stream("x", "v1", 0, len(DATA), cut_at_first)
        assert sink.data and DATA.startswith(sink.data)
        assert len(service.ranges) == 2


def test_a_stream_that_stalls_ends_at_its_deadline(service: Service, reader: str) -> None:
    service.script = [cut_by(1 << 20)]
    service.cut.clear()
    sink = Pieces()
    began = time.monotonic()
    try:
        with pytest.raises(OriginUnavailable, match=r"does not answer for s3://bucket/p/x \(no answer in time\)"):
            origin_at(service, reader, IMPATIENT).stream("x", "v1", 0, len(DATA), sink)
    finally:
        service.cut.set()
    # The deadline is 0.4 s; the default one would be twenty.
    assert time.monotonic() - began < 5
    assert sink.data and DATA.startswith(sink.data)


def test_a_slow_sink_is_not_taken_for_a_silent_origin(service: Service, reader: str) -> None:
    service.script = [part]
    sink = Pieces()

    def slow_at_first(piece: memoryview) -> None:
        if not sink.pieces:
            time.sleep(2 * IMPATIENT.idle_s)
        sink(piece)

    origin_at(service, reader, IMPATIENT).stream("x", "v1", 0, len(DATA), slow_at_first)
    assert sink.data == DATA
    assert len(service.requests) == 1


def test_an_answer_to_another_range_hands_over_nothing(service: Service, reader: str) -> None:
    """Such as all of the object, from a service that passes over ranges."""
    for answer in (Answer(200, {"ETag": '"v1"'}, DATA), part(0, 80), part(10, 91)):
        service.script, sink = [answer], Pieces()
        with pytest.raises(OriginUnavailable, match="cannot be used"):
            origin_at(service, reader, IMPATIENT).stream("x", "v1", 10, 90, sink)
        assert not sink.pieces


# -- listings --------------------------------------------------------------------------------------------------------


def test_a_listing_of_one_page_is_one_request(service: Service, reader: str) -> None:
    service.script = [page("a", "b/c")]
    assert len(listed(service, reader, PATIENT)) == 2
    assert len(service.requests) == 1


def test_a_listing_survives_passing_trouble(service: Service, reader: str) -> None:
    service.script = [error(503, "SlowDown"), error(500, "InternalError"), page("a", "b/c")]
    assert listed(service, reader, PATIENT) == [ObjectInfo("a", 100, "v1"), ObjectInfo("b/c", 100, "v1")]


def test_a_listing_ends_when_trouble_stays(service: Service, reader: str) -> None:
    service.script = [error(503, "SlowDown")]
    with pytest.raises(OriginUnavailable, match="overloaded or down, try later"):
        listed(service, reader, IMPATIENT)


def test_a_service_without_etags_is_refused(service: Service, reader: str) -> None:
    service.script = [page("a", e_tag="")]
    with pytest.raises(InvalidRequest, match="s3://bucket/p/a has no ETag"):
        listed(service, reader, PATIENT)


def test_errors_do_not_carry_credentials(service: Service, reader: str) -> None:
    options = {"key": "AKIAHUNTER2", "secret": "hunter2", "endpoint_url": service.url, "reader": reader}
    service.script = [error(403, "AccessDenied")]
    with pytest.raises(OriginError) as caught:
        open_origin("s3://bucket/p", options, deadlines=IMPATIENT).read("x", "v1", 0, 1)
    assert "hunter2" not in str(caught.value).lower()
