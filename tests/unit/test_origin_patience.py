"""How often an origin in trouble is asked again, and that a stream goes on where it was: over a scripted reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity

from shoal.errors import InvalidRequest, OriginChanged, OriginDenied, OriginUnavailable, ShoalError
from shoal.origin import Deadlines, ObjectInfo, Sink, failures, open_origin
from shoal.origin.patient import PatientOrigin

DATA = bytes(range(256)) * 4
Step = Callable[[int, int, Sink], None]


class Scripted:
    """An origin whose streams do what `steps` say, one an attempt, the last for ever."""

    url, endpoint, identity, key_prefix = "script://o", "", "script://", ""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.asked: list[tuple[str, int, int]] = []

    def list(self) -> Iterator[list[ObjectInfo]]:
        yield [ObjectInfo("o", len(DATA), "v1")]

    def read(self, path: str, version: str, start: int, end: int) -> bytes:
        found = bytearray()
        self.stream(path, version, start, end, found.extend)
        return bytes(found)

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        self.asked.append((version, start, end))
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        step(start, end, sink)

    def close(self) -> None: ...


def well(start: int, end: int, sink: Sink) -> None:
    for at in range(start, end, 100):
        sink(memoryview(DATA)[at : min(at + 100, end)])


def breaking(after: int, error: ShoalError) -> Step:
    def step(start: int, end: int, sink: Sink) -> None:
        well(start, min(start + after, end), sink)
        raise error

    return step


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited between attempts; no time passes."""
    found: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", type("Time", (), {"sleep": staticmethod(found.append)}))
    return found


def patient(origin: Scripted, **limits: Any) -> tuple[PatientOrigin, list[OriginUnavailable]]:
    troubles: list[OriginUnavailable] = []
    return PatientOrigin(origin, Deadlines(**limits), troubles.append), troubles


def streamed(origin: PatientOrigin, start: int = 0, end: int = len(DATA)) -> bytes:
    found = bytearray()
    origin.stream("o", "v1", start, end, found.extend)
    return bytes(found)


def test_a_stream_goes_on_at_the_byte_reached_and_at_the_same_version(waits: list[float]) -> None:
    broken = OriginUnavailable("broken off")
    scripted = Scripted(breaking(150, broken), breaking(0, broken), breaking(300, broken), well)
    origin, troubles = patient(scripted)
    assert streamed(origin, 7, 1000) == DATA[7:1000]
    assert scripted.asked == [("v1", 7, 1000), ("v1", 157, 1000), ("v1", 157, 1000), ("v1", 457, 1000)]
    assert troubles == [broken] * 3
    assert len(waits) == 3 and all(0 <= wait <= 2 for wait in waits)


def test_a_failure_after_the_last_byte_is_no_loss(waits: list[float]) -> None:
    scripted = Scripted(breaking(len(DATA), OriginUnavailable("no end of the body")))
    origin, troubles = patient(scripted)
    assert streamed(origin) == DATA
    assert (len(scripted.asked), len(troubles), waits) == (1, 1, [])


def test_attempts_are_bounded_and_the_error_says_how_many(waits: list[float]) -> None:
    scripted = Scripted(breaking(0, OriginUnavailable("s3 keeps failing for s3://b/o", is_busy=True)))
    origin, troubles = patient(scripted, tries=5)
    with pytest.raises(OriginUnavailable, match=r"keeps failing for s3://b/o; tried 5 times in \d+ s") as caught:
        streamed(origin)
    assert caught.value.is_busy
    assert len(scripted.asked) == len(troubles) == 5
    scripted.asked.clear()
    with pytest.raises(OriginUnavailable, match="tried 5 times"):
        origin.read("o", "v1", 0, 10)
    assert len(scripted.asked) == 5


def test_jitter_is_full_so_that_nodes_do_not_ask_in_step(waits: list[float]) -> None:
    for _ in range(50):
        origin, _ = patient(Scripted(breaking(0, OriginUnavailable("busy"))), tries=8)
        with pytest.raises(OriginUnavailable):
            streamed(origin)
    by_attempt = [waits[n::7] for n in range(7)]
    assert all(max(each) <= min(2, 0.1 * 2**n) for n, each in enumerate(by_attempt))
    assert min(by_attempt[6]) < 0.5 < 1 < max(by_attempt[6]), "anywhere below the bound"


def test_what_the_origin_asks_to_wait_is_waited_but_not_beyond_the_deadline(waits: list[float]) -> None:
    busy = OriginUnavailable("busy", is_busy=True, retry_after_s=3)
    origin, _ = patient(Scripted(breaking(0, busy), well))
    assert streamed(origin) == DATA
    assert waits == [3]
    waits.clear()
    scripted = Scripted(breaking(0, OriginUnavailable("busy", retry_after_s=60)))
    origin, _ = patient(scripted)
    with pytest.raises(OriginUnavailable, match="busy; tried once"):
        streamed(origin)
    assert (len(scripted.asked), waits) == (1, [])


@pytest.mark.parametrize("error", [OriginChanged("changed"), OriginDenied("no"), InvalidRequest("no")])
def test_what_no_attempt_can_cure_is_said_at_once(waits: list[float], error: ShoalError) -> None:
    scripted = Scripted(breaking(100, error))
    origin, troubles = patient(scripted)
    with pytest.raises(type(error)) as caught:
        streamed(origin)
    assert caught.value is error
    assert (len(scripted.asked), troubles) == (1, [])


def test_a_failure_of_the_sink_is_not_the_origins(waits: list[float]) -> None:
    """Even where it looks like one, and where the reader takes it for one."""
    mine = OriginUnavailable("the sink's own")
    scripted = Scripted(well)
    origin, troubles = patient(scripted)

    def refuse(piece: memoryview) -> None:
        raise mine

    with pytest.raises(OriginUnavailable) as caught:
        origin.stream("o", "v1", 0, 10, refuse)
    assert caught.value is mine
    assert (len(scripted.asked), troubles) == (1, [])


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        ("-7", 0),
        ("1e9", 0),
        ("9" * 400, 0),
        ("٣", 0),
        ("soon", 0),
        ("Wed, 25 Nov 2026 02:00:30 GMT", 30),
        ("Wed, 25 Nov 2026 01:00:00 GMT", 0),
        ("Wed, 99 Nov 2026 01:00:00 GMT", 0),
    ],
)
def test_retry_after(header: str | None, seconds: float) -> None:
    now_s = 1795572000.0  # Wed, 25 Nov 2026 02:00:00 GMT
    assert failures.retry_after_s(header, now_s=now_s) == seconds


def test_which_failures_ask_for_less() -> None:
    def is_busy(**fields: Any) -> bool:
        error = failures.to_error(failures.Failure(**fields), url="u", bucket="b", service="s")
        assert isinstance(error, OriginUnavailable)
        return error.is_busy

    assert is_busy(status=503) and is_busy(status=429) and is_busy(status=500, code="SlowDown")
    assert is_busy(reason="no answer in time") and is_busy(reason="connection refused")
    assert not is_busy(status=500)
    assert not is_busy(reason="the connection broke off")


def test_patience_is_a_storage_option() -> None:
    opened = open_origin("memory://x", {"patience": {"read_s": 60, "tries": 3}})
    assert isinstance(opened, PatientOrigin)
    assert opened._deadlines == Deadlines(read_s=60, tries=3)
    assert opened.identity == open_origin("memory://x", {}).identity, "the same bytes, however long one waits for them"


@pytest.mark.parametrize("patience", [5, {"wait": 5}, {"read_s": "5"}, {"tries": 1.5}, {"idle_s": 0}, {"read_s": True}])
def test_patience_that_is_none(patience: object) -> None:
    with pytest.raises(InvalidRequest, match="'patience'"):
        open_origin("memory://x", {"patience": patience})
