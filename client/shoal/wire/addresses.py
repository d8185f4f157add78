"""Where a server listens, as people write it."""

from __future__ import annotations

from shoal.errors import InvalidRequest


def split(text: str, example: str) -> tuple[str, int]:
    """Take ``HOST:PORT`` apart; an IPv6 address is in brackets. Raises InvalidRequest, with `example`."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{text!r} is no address: write HOST:PORT, such as {example}")
    return host.strip("[]"), int(port)
