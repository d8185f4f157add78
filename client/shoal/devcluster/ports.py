"""TCP ports for servers that are killed and come back: the same ones again, or ones that stay free in between."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SPAN = 10_000
_MIN_PORT = 1024


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on `host`:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, avoid: frozenset[int] = frozenset()) -> list[int]:
    """`count` distinct free ports of 127.0.0.1, none of them in `avoid`.

    They lie below the range that the kernel gives to outgoing connections: otherwise a client's connection could take
    the port of a dead server, and the server could not come back.

    Raises:
        OSError: there are no free ports.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_candidates(), k=len(_candidates())):
        if len(found) == count:
            break
        if port not in avoid and is_free(port):
            found.append(port)
    if len(found) < count:
        raise OSError(f"no {count} free ports on 127.0.0.1")
    return found


def _candidates() -> range:
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    # A machine that gives nearly every port to outgoing connections leaves no better choice than among those.
    return range(first - _SPAN, first) if first - _SPAN >= _MIN_PORT else range(20_000, 20_000 + _SPAN)
