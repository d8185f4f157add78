"""What a run found: rows of one table, each a ratio, and notes on how the peers were set up.

A ratio above 1 is better for Shoal whatever the unit: rates are divided by the other's, times divide the other's. A row
whose other side is a limit compares with the limit in the same way. Rows without a target are told, not judged.

The rule: what did not run is a row as well, with its reason; no figure is ever made up for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.harness import Contender, Missing, Series, Spread, fastest
from shoal.cli import output

GIGA = 1e9
HEADERS = ("#", "WHAT", "SHOAL>", "OTHER>", "", "RATIO>", "TARGET>", "", "CPU-S/GB>", "OTHER'S>")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        claim: which line of the list in `benchmarks.__main__` it belongs to.
        peer: the other side's name, or "limit".
        ours, theirs: medians, with the smallest and the largest, in `unit`.
        target: the smallest ratio that meets the claim; None where the row is there to be read.
        skipped: why there are no figures.
    """

    claim: int
    what: str
    peer: str
    unit: str = ""
    ours: Spread | None = None
    theirs: Spread | None = None
    ratio: float | None = None
    target: float | None = None
    our_cpu_s_per_gb: float | None = None
    their_cpu_s_per_gb: float | None = None
    skipped: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target

    @property
    def verdict(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        return {True: "met", False: "MISSED", None: ""}[self.is_met]

    def cells(self) -> list[str]:
        return [
            str(self.claim),
            self.what,
            _figure(self.ours, self.unit),
            _figure(self.theirs, self.unit),
            self.peer,
            "" if self.ratio is None else f"{self.ratio:.2f} x",
            "" if self.target is None else f"{self.target:.2f} x",
            self.verdict,
            "" if self.our_cpu_s_per_gb is None else f"{self.our_cpu_s_per_gb:.2f}",
            "" if self.their_cpu_s_per_gb is None else f"{self.their_cpu_s_per_gb:.2f}",
        ]


@dataclass(slots=True)
class Findings:
    """Rows and notes of one section, in the order in which they came."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rate(self, claim: int, what: str, ours: Series, theirs: Series, target: float | None = None) -> None:
        """Bytes a second beside bytes a second."""
        self.rows.append(_compare(claim, what, "GB/s", ours, theirs, _scaled(ours.rate), _scaled(theirs.rate), target))

    def per_cpu(self, claim: int, what: str, ours: Series, theirs: Series, target: float | None = None) -> None:
        """Bytes for a CPU-second beside the same."""
        mine, other = (Spread.of(_gb_per_cpu_s(series)) for series in (ours, theirs))
        self.rows.append(_compare(claim, what, "GB/CPU-s", ours, theirs, mine, other, target))

    def value(
        self,
        claim: int,
        what: str,
        ours: Series,
        theirs: Series,
        name: str,
        unit: str,
        target: float | None = None,
        *,
        is_rate: bool = False,
    ) -> None:
        """A value of the outcomes, a time unless `is_rate`."""
        mine, other = ours.value(name), theirs.value(name)
        self.rows.append(_compare(claim, what, unit, ours, theirs, mine, other, target, is_rate=is_rate))

    def limit(self, claim: int, what: str, ours: Spread, limit: float, unit: str, cpu: float | None = None) -> None:
        """Something that must not be more than `limit`. Nothing at all counts as a thousandth of the limit."""
        ratio = limit / max(ours.median, limit / 1000)
        allowed = Spread(limit, limit, limit)
        self.rows.append(Row(claim, what, "limit", unit, ours, allowed, ratio, 1.0, cpu))

    def cost(self, claim: int, what: str, ours: Series, limit: float) -> None:
        """CPU-seconds for a GB beside the most that they may be."""
        costs = Spread.of(turn.cpu_s / turn.outcome.size_bytes * GIGA for turn in ours.turns)
        self.limit(claim, what, costs, limit, "s/GB", costs.median)

    def best(self, settings: str, use: str, variants: Mapping[str, Contender]) -> Contender:
        """The fastest of a peer's variants, by name in a note."""
        found = fastest(list(variants.values()))
        chosen = next(name for name, variant in variants.items() if variant is found)
        self.note(f"{settings}; for {use}: {chosen}")
        return found

    def skip(self, claim: int, what: str, peer: str, reason: str, target: float | None = None) -> None:
        self.rows.append(Row(claim, what, peer, target=target, skipped=reason))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @contextlib.contextmanager
    def unless_missing(self, *planned: tuple[int, str, str, float | None]) -> Iterator[None]:
        """Turn `Missing` into a skipped row for each of `planned` (claim, what, peer, target) that has none yet."""
        try:
            yield
        except Missing as reason:
            known = {(row.claim, row.what, row.peer) for row in self.rows}
            for claim, what, peer, target in planned:
                if (claim, what, peer) not in known:
                    self.skip(claim, what, peer, str(reason), target)


def table(rows: Sequence[Row]) -> str:
    return output.table(HEADERS, (row.cells() for row in sorted(rows, key=lambda row: row.claim)))


def _compare(
    claim: int,
    what: str,
    unit: str,
    ours: Series,
    theirs: Series,
    mine: Spread,
    other: Spread,
    target: float | None,
    *,
    is_rate: bool = True,
) -> Row:
    top, bottom = (mine, other) if is_rate else (other, mine)
    ratio = top.median / bottom.median if bottom.median else None
    return Row(claim, what, theirs.name, unit, mine, other, ratio, target, ours.cpu_s_per_gb, theirs.cpu_s_per_gb)


def _scaled(rate: Spread) -> Spread:
    return Spread(rate.median / GIGA, rate.least / GIGA, rate.most / GIGA)


def _gb_per_cpu_s(series: Series) -> list[float]:
    return [turn.outcome.size_bytes / GIGA / turn.cpu_s for turn in series.turns]


def _figure(spread: Spread | None, unit: str) -> str:
    return "" if spread is None else f"{_digits(spread.median)} {unit}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
