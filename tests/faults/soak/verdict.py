"""Which errors the faults of the moment explain. Pure; everything else is a defect.

    OriginUnavailable    while the origin fails on purpose, of an object that no node has held all the while to which
                         nothing was done
    OriginChanged        of a version that the origin has replaced
    NotFound             of a snapshot that the controller let go of after many refreshes
    ClusterUnavailable   of a new process whose only endpoint is a controller that is away

The rule: never a wrong byte, and never an error because of a node: one fails at a time, so there is always another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.soak.plan import Kind

ORIGIN_KINDS = {
    Kind.ORIGIN_SLOWS_DOWN,
    Kind.ORIGIN_RESETS,
    Kind.ORIGIN_STALLS,
    Kind.ORIGIN_LATE,
    Kind.ORIGIN_GONE,
}
CONTROLLER_KINDS = {Kind.CONTROLLER_KILLED, Kind.CONTROLLER_STOPPED}
#: An error that began within a fault may be told so long after it: a node's answer, on its way.
_ON_ITS_WAY_S = 2.0


@dataclass(frozen=True, slots=True)
class Window:
    """When a fault of some kind was at work."""

    kind: Kind
    start: float
    end: float

    def overlaps(self, start: float, end: float) -> bool:
        return self.start <= end and start <= self.end


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the whole soak.

    Attributes:
        replaced: by path, when the origin got each version.
        served: by snapshot, from when until when it was served.
    """

    windows: Sequence[Window]
    replaced: Mapping[str, Sequence[tuple[float, int]]]
    served: Mapping[str, tuple[float, float]]


def explanation(word: Mapping[str, Any], facts: Facts) -> str:
    """Why a reader was told an error; "" where nothing explains it."""
    start, end = word["start"], word["end"]

    def during(kinds: Iterable[Kind]) -> str:
        found = (w for w in facts.windows if w.kind in kinds and w.overlaps(start - _ON_ITS_WAY_S, end))
        return next((str(window.kind) for window in found), "")

    match word["error"], word["way"]:
        case "OriginUnavailable", _ if not word.get("held"):
            return during(ORIGIN_KINDS)
        case "OriginChanged", _:
            was_replaced = any(
                at <= end and version > word["version"] for at, version in facts.replaced.get(word.get("path", ""), ())
            )
            return "the object was replaced" if was_replaced else ""
        case "NotFound" | "SnapshotNotFound" | "DatasetNotFound", _:
            _, until = facts.served.get(word.get("snapshot", ""), (0.0, float("inf")))
            return "the snapshot is served no more" if until <= end else ""
        case "ClusterUnavailable", "connect":
            return during(CONTROLLER_KINDS)
    return ""


def judge(
    words: Iterable[Mapping[str, Any]], facts: Facts
) -> tuple[list[Mapping[str, Any]], Mapping[tuple[str, str], int]]:
    """The words that nothing explains, and how often each error was explained by what."""
    defects: list[Mapping[str, Any]] = []
    explained: dict[tuple[str, str], int] = {}
    for word in words:
        reason = explanation(word, facts) if "error" in word else ""
        if reason:
            explained[word["error"], reason] = explained.get((word["error"], reason), 0) + 1
        else:
            defects.append(word)
    return defects, explained
