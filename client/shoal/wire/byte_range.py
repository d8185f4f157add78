"""Byte ranges of HTTP requests (RFC 9110, 14.2). Pure.

The rule: what is no single byte range is ignored, as the RFC allows, and the answer is the whole resource.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from shoal.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, end) of a resource; `is_partial` tells 206 from 200."""

    start: int
    end: int
    is_partial: bool

    @classmethod
    def parse(cls, header: str | None, size_bytes: int) -> Self:
        """Apply a Range header (RFC 9110, 14.2) to a resource of `size_bytes`.

        What is no single byte range is ignored, as the RFC allows: the answer is then the whole resource.

        Raises:
            RangeNotSatisfiable: the range begins past the end.
        """
        whole = cls(0, size_bytes, False)
        if header is None or not header.startswith("bytes="):
            return whole
        first, dash, last = header[6:].strip().partition("-")
        if not dash or not (first + last).isascii() or not (first + last).isdigit():
            return whole
        if first == "":
            length = _number(last)
            if length == 0 or size_bytes == 0:
                raise RangeNotSatisfiable(size_bytes)
            return cls(max(0, size_bytes - length), size_bytes, True)
        start = _number(first)
        if last and _number(last) < start:
            return whole
        if start >= size_bytes:
            raise RangeNotSatisfiable(size_bytes)
        end = _number(last) + 1 if last else size_bytes
        return cls(start, min(end, size_bytes), True)

    def headers(self, size_bytes: int) -> dict[str, str]:
        if not self.is_partial:
            return {"Accept-Ranges": "bytes"}
        return {"Accept-Ranges": "bytes", "Content-Range": f"bytes {self.start}-{self.end - 1}/{size_bytes}"}

    @property
    def status(self) -> int:
        return 206 if self.is_partial else 200


def _number(digits: str) -> int:
    """`digits` as a number, or one past every end: Python refuses to count thousands of them."""
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) < 20 else 10**20


class RangeNotSatisfiable(InvalidRequest):
    """The range begins past the end of the resource."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"the range begins past the end: there are {size_bytes} bytes")
        self.size_bytes = size_bytes
