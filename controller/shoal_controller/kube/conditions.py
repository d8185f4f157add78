"""Conditions of a status: what is true of an object, since when, why, and what to do about it. Pure.

The rule: `lastTransitionTime` moves only with `status`, so it says since when.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

#: The schema's bounds; a longer sentence would have the whole status refused.
MAX_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition. `reason` is one word in CamelCase; `message` a sentence for people."""

    type: str
    status: bool | None  #: None: unknown
    reason: str
    message: str = ""
    is_trouble: bool = False  #: people should look at it: its event is a Warning


@dataclass(frozen=True, slots=True)
class Transition:
    """A condition that is now another one: worth an event."""

    reason: str
    message: str
    is_trouble: bool


def timestamp(utc_s: float) -> str:
    """RFC 3339, in whole seconds, as Kubernetes writes times."""
    return datetime.fromtimestamp(int(utc_s), UTC).isoformat().replace("+00:00", "Z")


def parse_timestamp(text: str) -> float:
    """Seconds since 1970. Raises ValueError."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def merge(
    before: Iterable[Mapping[str, Any]], wanted: Iterable[Condition], *, generation: int, now_utc_s: float
) -> list[dict[str, Any]]:
    """The conditions as a status has them, with the times of those that have not changed.

    Args:
        before: those of the present status.
        generation: of the object that they were found true of.
    """
    known = {str(condition.get("type")): condition for condition in before}
    merged = []
    for condition in wanted:
        old = known.get(condition.type, {})
        status = _STATUS[condition.status]
        is_same = old.get("status") == status and "lastTransitionTime" in old
        merged.append(
            {
                "type": condition.type,
                "status": status,
                "reason": condition.reason,
                "message": shortened(condition.message),
                "observedGeneration": generation,
                "lastTransitionTime": old["lastTransitionTime"] if is_same else timestamp(now_utc_s),
            }
        )
    return merged


def transitions(before: Iterable[Mapping[str, Any]], wanted: Iterable[Condition]) -> list[Transition]:
    """The conditions whose status or reason is another than before, of those that have something to say.

    One without a sentence repeats another's, such as `Failed` False beside `Complete` False.
    """
    known = {str(old.get("type")): (old.get("status"), old.get("reason")) for old in before}
    return [
        Transition(condition.reason, shortened(condition.message), condition.is_trouble)
        for condition in wanted
        if condition.message and known.get(condition.type) != (_STATUS[condition.status], condition.reason)
    ]


def shortened(sentence: str, limit: int = MAX_MESSAGE) -> str:
    return sentence if len(sentence) <= limit else sentence[: limit - 1] + "…"


_STATUS = {True: "True", False: "False", None: "Unknown"}
