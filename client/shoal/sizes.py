"""Byte sizes as people type and read them: ``256MiB``, ``20GiB``, ``1.5 GB``, ``4096``.

IEC prefixes (Ki, Mi, Gi, Ti) are powers of 1024, SI prefixes (k, M, G, T) powers of 1000; the ``B`` is optional, as in
Kubernetes quantities.
"""

from __future__ import annotations

import re

from shoal.errors import InvalidRequest

_UNITS = {"": 1} | {
    prefix + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for prefix, base in ((letter, 1000), (letter + "i", 1024))
    for suffix in ("", "b")
}
_UNITS["b"] = 1
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse(text: str) -> int:
    """Return the bytes that `text` names.

    Raises:
        InvalidRequest: `text` is no size.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].lower())
    if not match or not unit:
        raise InvalidRequest(f"{text!r} is not a size: write a number with a unit, such as 256MiB, 20GiB or 1.5GB")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format(size_bytes: float) -> str:
    """Return `size_bytes` with the IEC unit that leaves one to four digits: ``0 B``, ``1.5 GiB``."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
