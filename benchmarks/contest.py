"""Lines of a comparison of several contenders with the first one, in bytes or in operations a second.

The rule: each line says what its rate cost: the CPU-seconds of everybody, and the servers' part of them, for a GB or
for 1,000 operations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness import Contender, Series, Spread, Turn, interleave
from benchmarks.path_reads import DRIVE_BYTES, OPERATIONS
from shoal.cli import output

HEADERS = ("WHAT", "WHO", "RATE>", "LEAST>", "MOST>", "RATIO>", "TARGET>", "", "CPU-S>", "SERVERS'>", "FOR", "")

#: More than this share of a line's bytes from a drive is said: its rate is not one of memory then.
WARM_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Line:
    """How one contender did.

    Attributes:
        is_operations: operations are counted instead of bytes.
        rate: bytes or operations a second.
        ratio: the first contender's rate to this one's; None for the first itself.
        target: the least ratio that is wanted, if any is.
        cpu_s, servers_cpu_s: for a GB or for 1,000 operations.
        drive_share: of the bytes, how many the reader had read from a drive.
    """

    what: str
    who: str
    is_operations: bool
    rate: Spread
    ratio: float | None
    target: float | None
    cpu_s: float
    servers_cpu_s: float
    drive_share: float

    @property
    def is_met(self) -> bool | None:
        return None if self.ratio is None or self.target is None else self.ratio >= self.target

    def cells(self, *, is_judged: bool) -> list[str]:
        verdict = {True: "met", False: "MISSED", None: ""}[self.is_met if is_judged else None]
        return [
            self.what,
            self.who,
            *(self._told(value) for value in (self.rate.median, self.rate.least, self.rate.most)),
            "" if self.ratio is None else f"{self.ratio:.2f} x",
            "" if self.target is None else f"{self.target:.2f} x",
            verdict,
            f"{self.cpu_s:.3f}",
            f"{self.servers_cpu_s:.3f}",
            "1,000" if self.is_operations else "GB",
            f"{self.drive_share:.0%} from the drive" if self.drive_share > WARM_SHARE else "",
        ]

    def _told(self, rate: float) -> str:
        return f"{rate:,.0f} /s" if self.is_operations else f"{rate / 1e9:.2f} GB/s"


def compare(
    what: str,
    contenders: Sequence[Contender],
    runs: int,
    targets: Mapping[str, float],
    before: Callable[[], object] | None = None,
) -> list[Line]:
    """Have all take turns; a line for each, in their order.

    Args:
        targets: by contender's name, for the first one's rate to that one's.
        before: called before each turn; not counted.
    """
    return judge(what, list(interleave(contenders, runs, alternates=True, before=before).values()), targets)


def judge(what: str, every: Sequence[Series], targets: Mapping[str, float]) -> list[Line]:
    """A line for each of `every`, whose first is compared with the others. Pure."""
    rates = [Spread.of(_amount(turn) / turn.outcome.seconds for turn in series.turns) for series in every]
    ratios = [None, *(rates[0].median / rate.median for rate in rates[1:])]
    return [_line(what, *of_one, targets) for of_one in zip(every, rates, ratios, strict=True)]


def table(lines: Sequence[Line], *, is_judged: bool) -> str:
    return output.table(HEADERS, (line.cells(is_judged=is_judged) for line in lines))


def _line(what: str, series: Series, rate: Spread, ratio: float | None, targets: Mapping[str, float]) -> Line:
    is_operations = OPERATIONS in series.turns[0].outcome.values
    unit = 1e3 if is_operations else 1e9
    cpu_s = statistics.median(turn.cpu_s / _amount(turn) for turn in series.turns) * unit
    servers = statistics.median(turn.servers_cpu_s / _amount(turn) for turn in series.turns) * unit
    drive = sum(turn.outcome.values.get(DRIVE_BYTES, 0) for turn in series.turns)
    share = drive / max(1, sum(turn.outcome.size_bytes for turn in series.turns))
    return Line(what, series.name, is_operations, rate, ratio, targets.get(series.name), cpu_s, servers, share)


def _amount(turn: Turn) -> float:
    """Operations, where they are counted, else bytes."""
    return turn.outcome.values.get(OPERATIONS, turn.outcome.size_bytes)
