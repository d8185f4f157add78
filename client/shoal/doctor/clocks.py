"""Whether clocks agree. Pure.

Shoal's own leases and time limits count by clocks that nobody sets, so no skew takes a node for dead. What a wrong
clock breaks are signatures: S3, Google and Azure refuse a request that is 15 minutes off, and certificates begin and
end. And people read logs of several machines side by side; a node whose clock is set forward takes datasets for idle.

An answer's Date has whole seconds and travels half of the round trip, so each clock is known to within some half a
second; only what is beyond that counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low

from shoal.doctor.facts import Clock, Facts
from shoal.doctor.findings import Finding, Kind, Outcome

CHECK = "clocks"

#: Logs of two machines no longer tell what came first. A synchronised clock is off by milliseconds.
WARNING_S = 5.0
#: A third of what makes an origin refuse all requests, and clocks that drift go on doing so.
PROBLEM_S = 300.0

AGREE = Kind(CHECK, "ok", Outcome.OK, "{count} clocks agree within {within}")
OFF = Kind(
    CHECK,
    "off",
    Outcome.WARNING,
    "the clock of {who} is {skew} {side} {reference}: nothing fails of that, but logs mislead",
    "synchronise it: see 'timedatectl' or 'chronyc tracking' on that machine",
)
FAR_OFF = Kind(
    CHECK,
    "far-off",
    Outcome.PROBLEM,
    "the clock of {who} is {skew} {side} {reference}: from 15 min on S3, Google and Azure refuse its signed requests, "
    "and "
    "certificates may seem to have ended",
    "synchronise it: see 'timedatectl' or 'chronyc tracking' on that machine; on Kubernetes that is the host",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "nobody answers whose clock could be compared")

HERE = "this machine"


def judge(facts: Facts) -> list[Finding]:
    clocks = _clocks(facts)
    if len(clocks) == 1:
        return [NOBODY.found()]
    skews = compare(clocks)
    reference = "those of the others" if len(clocks) > 2 else f"that of {next(n for n in clocks if n != HERE)}"
    found = []
    for who, skew_s in skews.items():
        kind = FAR_OFF if abs(skew_s) >= PROBLEM_S else OFF if abs(skew_s) >= WARNING_S else None
        if kind is not None:
            side = "ahead of" if skew_s > 0 else "behind"
            found.append(kind.found(who=who, skew=_time(abs(skew_s)), side=side, reference=reference))
    within_s = max(clock.uncertainty_s for clock in clocks.values()) + max(map(abs, skews.values()))
    return found or [AGREE.found(count=len(clocks), within=_time(within_s))]


def compare(clocks: Mapping[str, Clock]) -> dict[str, float]:
    """By how many seconds at least each clock is ahead of what most say; less than 0: behind; 0: it may be right.

    Of two clocks, which no majority decides between, the one of this machine is compared with the other.
    """
    others = [name for name in clocks if name != HERE]
    if len(clocks) == 2 and len(others) == 1:
        reference = clocks[others[0]]
    else:
        middle = median_low(clock.offset_s for clock in clocks.values())
        reference = next(clock for clock in clocks.values() if clock.offset_s == middle)
    found = {}
    for name, clock in clocks.items():
        difference = clock.offset_s - reference.offset_s
        doubt = clock.uncertainty_s + reference.uncertainty_s if clock is not reference else 0.0
        certain = max(0.0, abs(difference) - doubt)
        found[name] = certain if difference > 0 else -certain
    return found


def _clocks(facts: Facts) -> dict[str, Clock]:
    """By whose it is. Processes of one host are named each: containers have the host's, but who knows who is where."""
    found: dict[str, Clock] = {HERE: Clock(0.0, 0.0)}
    for name, process in facts.answering():
        if process.clock is not None:
            known = found.get(name)
            if known is None or process.clock.uncertainty_s < known.uncertainty_s:
                found[name] = process.clock
    return found


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
