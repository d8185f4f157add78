"""A proxy before the S3 server that fails on purpose: the whole origin is in one mood at a time.

The rule: whatever the mood, no byte is ever changed; an origin that sends wrong bytes under the right ETag is one that
nobody can guard against.
"""

from __future__ import annotations

import enum
import random
import socket
import struct
import time

from tests.support.proxy import CountingProxy

_SLOW_DOWN_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_SLOW_DOWN_BODY), _SLOW_DOWN_BODY)
)
_LATENCY_S = 0.3
_STEP_S = 0.05


class Mood(enum.Enum):
    """How the origin is."""

    WELL = enum.auto()
    SLOW_DOWN = enum.auto()  #: nine of ten connections are answered 503
    RESETS = enum.auto()  #: connections are reset after a random number of bytes
    STALLS = enum.auto()  #: nothing comes back until this is over
    LATE = enum.auto()  #: everything that comes back is late
    GONE = enum.auto()  #: connections are closed at once


class MoodyOrigin(CountingProxy):
    """The proxy. `set_mood` cuts what is open, so that a mood meets requests of kept connections too."""

    def __init__(self, target_url: str) -> None:
        self.mood = Mood.WELL
        self._rng = random.Random(0)
        super().__init__(target_url)

    def set_mood(self, mood: Mood) -> None:
        self.mood = mood
        if mood in (Mood.SLOW_DOWN, Mood.GONE):
            with self._lock:
                for each in self._open:
                    _reset(each)

    def forward(self, client: socket.socket) -> None:
        if self.mood is Mood.GONE:
            _reset(client)
            return
        if self.mood is Mood.SLOW_DOWN and self._rng.random() < 0.9:
            _refuse(client)
            return
        super().forward(client)

    def _pump(self, source: socket.socket, sink: socket.socket, inward: bool) -> None:
        super()._pump(source, _Sink(self, source, sink) if inward else sink, inward)  # type: ignore[arg-type]


class _Sink:
    """The client's socket, as the mood lets bytes through to it."""

    def __init__(self, origin: MoodyOrigin, source: socket.socket, sink: socket.socket) -> None:
        self._origin, self._source, self._sink = origin, source, sink
        self.shutdown = sink.shutdown
        self._left_until_reset = 0

    def sendall(self, data: memoryview) -> None:
        match self._origin.mood:
            case Mood.LATE:
                time.sleep(_LATENCY_S)
            case Mood.RESETS:
                self._left_until_reset = self._left_until_reset or self._origin._rng.randrange(1, 16 << 20)
                if len(data) >= self._left_until_reset:
                    self._sink.sendall(data[: self._left_until_reset - 1])
                    _reset(self._sink)
                    _reset(self._source)
                    raise ConnectionResetError("on purpose")
                self._left_until_reset -= len(data)
            case Mood.STALLS:
                while self._origin.mood is Mood.STALLS:
                    time.sleep(_STEP_S)
            case _:
                self._left_until_reset = 0
        self._sink.sendall(data)


def _refuse(client: socket.socket) -> None:
    client.settimeout(5.0)
    head = b""
    try:
        while b"\r\n\r\n" not in head and (more := client.recv(16 << 10)):
            head += more
        client.sendall(_SLOW_DOWN)
        client.shutdown(socket.SHUT_WR)
        while client.recv(16 << 10):
            pass  # what was not read would turn our close into a reset
    except OSError:
        pass


def _reset(sock: socket.socket) -> None:
    """End a connection with a reset rather than in good order; whoever uses it in another thread is woken."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
