"""One HTTP question, and everything that can become of it.

`shoal.transport` is for whoever wants bytes: it tries again, and what is not Shoal is one error for all. Here the error
is what is wanted: whether the name, the connection, the answer or the one who answers is what is wrong.

The rule: nothing is asked twice, and every wait ends at the deadline.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import os
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.doctor.facts import Clock, Silence, Trouble

_MAX_BODY_BYTES = 16 << 20
#: The first bytes of an HTTP/2 server: the head of a SETTINGS frame (RFC 9113, 4.1), with a length below 64 KiB.
_HTTP2_SETTINGS = 4
_TLS_ALERT = b"\x15\x03"


class Unanswered(Exception):
    """There is no HTTP answer."""

    def __init__(self, trouble: Trouble, reason: str) -> None:
        super().__init__(reason)
        self.silence = Silence(trouble, reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. `headers` have names in lower case; `clock` is None where it has no date."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    clock: Clock | None


def ask(
    address: str, target: str, timeout_s: float, *, method: str = "GET", headers: Mapping[str, str] | None = None
) -> Answer:
    """Ask ``host:port`` or ``unix:/path`` once.

    Raises:
        Unanswered: nothing answers in time, or not in HTTP.
    """
    until = time.monotonic() + timeout_s
    with _connected(address, until) as sock:
        asked_at, asked_wall = time.monotonic(), time.time()
        host = "localhost" if address.startswith("unix:") else address
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        try:
            sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            _check_is_http(_first_bytes(sock, until))
            round_trip_s = time.monotonic() - asked_at
            response = http.client.HTTPResponse(sock, method=method)
            response.begin()
            sock.settimeout(_left(until))
            found = {name.lower(): value for name, value in response.getheaders()}
            body = response.read(_MAX_BODY_BYTES)
            if response.length:
                raise ConnectionResetError("its answer breaks off")
        except TimeoutError as error:
            raise Unanswered(Trouble.MUTE, f"no answer within {timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(Trouble.MUTE, _words(error)) from error
        return Answer(response.status, found, body, _clock(found.get("date"), asked_wall, round_trip_s))


def _left(until: float) -> float:
    """Seconds until then. Raises TimeoutError where it has passed."""
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _connected(address: str, until: float) -> socket.socket:
    if address.startswith("unix:"):
        return _connected_locally(address.removeprefix("unix:"), until)
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout=_left(until))
    except socket.gaierror as error:
        raise Unanswered(Trouble.UNRESOLVED, error.strerror or str(error)) from error
    except (ValueError, OverflowError) as error:  # UnicodeError is one
        raise Unanswered(Trouble.UNRESOLVED, "it is no host name and port") from error
    except ConnectionRefusedError as error:
        raise Unanswered(Trouble.REFUSED, "connection refused") from error
    except TimeoutError as error:
        raise Unanswered(Trouble.UNREACHABLE, "packets are not answered") from error
    except OSError as error:
        raise Unanswered(Trouble.UNREACHABLE, _words(error)) from error


def _connected_locally(path: str, until: float) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 - a path as it was given
            raise Unanswered(Trouble.NO_SOCKET, "it is no socket")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unanswered(Trouble.NO_FILE, _words(error)) from error
    except OSError as error:
        raise Unanswered(Trouble.DENIED, _words(error)) from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_left(until))
        sock.connect(path)
    except BaseException as error:
        sock.close()
        match error:
            case PermissionError():
                raise Unanswered(Trouble.DENIED, _words(error)) from error
            case ConnectionRefusedError():
                raise Unanswered(Trouble.REFUSED, "nobody listens on it") from error
            case TimeoutError() | BlockingIOError():
                raise Unanswered(Trouble.MUTE, "it takes no more connections") from error
            case OSError():
                raise Unanswered(Trouble.UNREACHABLE, _words(error)) from error
        raise
    return sock


def _first_bytes(sock: socket.socket, until: float) -> bytes:
    """What comes first, left to be read. Where less came than tells what it is, that is what it is told by."""
    sock.settimeout(_left(until))
    return sock.recv(64, socket.MSG_PEEK)


def _check_is_http(first: bytes) -> None:
    if not first:
        raise Unanswered(Trouble.MUTE, "it closes the connection without an answer")
    if first.startswith(b"HTTP/"[: len(first)]):
        return
    if len(first) >= 4 and first[0] == 0 and first[3] == _HTTP2_SETTINGS:
        raise Unanswered(Trouble.GRPC, "it speaks HTTP/2, as gRPC does")
    if first.startswith(_TLS_ALERT):
        raise Unanswered(Trouble.STRANGER, "it speaks TLS, which Shoal does not")
    shown = first.partition(b"\n")[0].decode("ascii", "replace").strip()
    raise Unanswered(Trouble.STRANGER, f"it says {shown!r}" if shown.isprintable() and shown else "it speaks no HTTP")


def _clock(date: str | None, asked_wall: float, round_trip_s: float) -> Clock | None:
    """From a Date header, which has whole seconds, to the difference of two clocks."""
    try:
        second = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return Clock(second + 0.5 - (asked_wall + round_trip_s / 2), 0.5 + round_trip_s / 2)


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno != errno.ENOENT else "there is no such file"
    return str(error) or type(error).__name__
