"""Kubernetes quantities of bytes: ``256Mi``, ``1.5T``, ``4096``. Pure."""

from __future__ import annotations

import re

from shoal.errors import InvalidRequest

_QUANTITY = re.compile(r"(\d+)(\.\d+)?(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?")
_UNITS = {"": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGTPE", start=1)
    for suffix, base in (("i", 1024), ("", 1000))
}
_UNITS["k"] = _UNITS.pop("K")


def parse(text: str) -> int:
    """Return the bytes that `text` names, rounded down.

    Raises:
        InvalidRequest: `text` is no such quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if not match:
        raise InvalidRequest(f"{text!r} is no quantity of bytes: write a number with a unit, such as 256Mi, 20Gi or 1T")
    whole, fraction, unit = match[1], (match[2] or ".").removeprefix("."), _UNITS[match[3] or ""]
    return int(int(whole + fraction) * unit // 10 ** len(fraction))
