"""The figures of a soak: how long reads took during each kind of fault, and what memory did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.faults.soak.verdict import Window

#: A fault is felt so long after it ended: connections are made again, maps fetched.
AFTERMATH_S = 1.0
#: Growth that is none, in a process that lived so long. A reader has all its threads, connections, snapshots and held
#: buffers only after minutes: one of five minutes of life was still taking them, one of thirty grows by 24 MiB.
FLAT_MIB, LONG_LIFE_S = 64.0, 600.0
#: The share of a quarter's samples that are its quiet ones.
_QUIET = 0.1
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Durations:
    """How long reads took, in milliseconds; `count` of them."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, took_s: npt.NDArray[np.float64]) -> Durations:
        if not len(took_s):
            return cls(0, 0.0, 0.0, 0.0)
        p50, p99, most = (float(x) * 1e3 for x in (*np.percentile(took_s, (50, 99)), took_s.max()))
        return cls(len(took_s), round(p50, 1), round(p99, 1), round(most, 1))


def durations(
    starts: npt.NDArray[np.float64], took_s: npt.NDArray[np.float64], windows: Sequence[Window]
) -> dict[str, Durations]:
    """By kind of fault, the reads that overlap one; "calm": those that overlap none."""
    calm = np.ones(len(starts), bool)
    found = {}
    for kind in dict.fromkeys(window.kind for window in windows):
        during = np.zeros(len(starts), bool)
        for window in windows:
            if window.kind is kind:
                during |= (starts <= window.end + AFTERMATH_S) & (starts + took_s >= window.start)
        calm &= ~during
        found[str(kind)] = Durations.of(took_s[during])
    return {"calm": Durations.of(took_s[calm]), **found}


@dataclass(frozen=True, slots=True)
class Memory:
    """Anonymous memory of one process: it lived `lived_s`, and was sampled all the while.

    Attributes:
        mib_per_hour: slope of a line through the second half of its samples.
        growth_mib: from the second quarter of its life to the last, of what it held in the quietest tenth of either. A
            node gives free pages back every 10 s; what it has in between is what its latest burst touched.
    """

    name: str
    lived_s: float
    first_mib: float
    last_mib: float
    max_mib: float
    mib_per_hour: float
    growth_mib: float

    @property
    def is_flat(self) -> bool:
        """Whether it did not grow; short lives say nothing, because a process takes what it needs first."""
        return self.lived_s < LONG_LIFE_S or self.growth_mib < FLAT_MIB

    @classmethod
    def of(cls, name: str, samples: Sequence[tuple[float, int]]) -> Memory:
        at, size = np.array(samples, np.float64).T
        half = len(at) // 2
        slope = float(np.polyfit(at[half:] - at[half], size[half:], 1)[0]) if len(at) - half > 2 else 0.0
        quarter = max(1, len(at) // 4)
        early = size[quarter : 2 * quarter] if len(at) > 4 else size
        growth = np.quantile(size[-quarter:], _QUIET) - np.quantile(early, _QUIET)
        mib = [round(float(x) / _MIB, 1) for x in (size[0], size[-1], size.max(), slope * 3600, growth)]
        return cls(name, round(float(at[-1] - at[0]), 1), *mib)


@dataclass(slots=True)
class Report:
    """All that is told at the end. `defects` is empty in a soak that passed."""

    seed: int
    minutes: float
    commit: str
    reads: int = 0
    bytes: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    durations: dict[str, Durations] = field(default_factory=dict)
    explained: dict[str, int] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    defects: list[Mapping[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def table(self) -> str:
        lines = [
            f"seed {self.seed}, {self.minutes:g} minutes, {self.commit}",
            f"{self.reads:,} reads, {self.bytes / 1e9:.1f} GB, every byte compared",
            "",
            f"{'reads during':45} {'faults':>6} {'reads':>8} {'p50 ms':>8} {'p99 ms':>9} {'max ms':>9}",
        ]
        for kind, found in self.durations.items():
            count = str(self.actions.get(kind, ""))
            lines.append(
                f"{kind:45} {count:>6} {found.count:>8,} {found.p50_ms:>8} {found.p99_ms:>9} {found.max_ms:>9}"
            )
        lines += ["", *(f"not done: {count} x {what}" for what, count in self.skipped.items())]
        lines += ["", "errors that the faults explain:" if self.explained else "no errors that the faults explain"]
        lines += [f"  {count:>6} {what}" for what, count in self.explained.items()]
        head = ("lived s", "first", "last", "max", "per hour", "growth")
        lines += ["", f"{'memory, MiB (anonymous)':30}" + "".join(f"{word:>10}" for word in head)]
        for m in sorted(self.memory, key=lambda m: (m.name, -m.lived_s)):
            figures = (m.lived_s, m.first_mib, m.last_mib, m.max_mib, m.mib_per_hour, m.growth_mib)
            lines.append(f"{m.name:30}" + "".join(f"{figure:>10}" for figure in figures))
        lines += ["", f"{len(self.defects)} defects" if self.defects else "no defects"]
        kinds = Counter(_kind(defect) for defect in self.defects)
        lines += [f"  {count:>6} {kind}" for kind, count in kinds.most_common()]
        return "\n".join(lines)


def _kind(defect: Mapping[str, Any]) -> str:
    if "error" in defect:
        return f"{defect['error']} ({defect['way']}): {defect['message'][:160]}"
    return next(f"{key}: {str(value)[:200]}" for key, value in defect.items())


def read_times(paths: Iterable[Path]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """When reads began and how long they took, from the files of all readers."""
    pairs = []
    for path in paths:
        values = np.fromfile(path, np.float64)
        pairs.append(values[: len(values) // 2 * 2].reshape(-1, 2))  # a reader that was killed may have cut its last
    both = np.concatenate(pairs) if pairs else np.empty((0, 2))
    return both[:, 0], both[:, 1]
