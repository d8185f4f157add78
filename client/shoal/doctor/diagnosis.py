"""From facts to findings: each check in turn. Pure.

The rule: facts that are missing make a check skip, with a sentence, and no check fail.
"""

from __future__ import annotations

from types import ModuleType

from shoal.doctor import (
    clocks,
    controller,
    datasets,
    disks,
    endpoint,
    local_socket,
    machine,
    nodes,
    origins,
    versions,
)
from shoal.doctor.facts import Facts
from shoal.doctor.findings import Finding, Kind, Outcome

#: In the order in which people read them: what comes later follows, where it is wrong, from what comes before.
CHECKS: tuple[ModuleType, ...] = (
    endpoint,
    controller,
    versions,
    clocks,
    nodes,
    disks,
    local_socket,
    datasets,
    origins,
    machine,
)
_ORDER = (Outcome.PROBLEM, Outcome.WARNING, Outcome.SKIPPED, Outcome.OK)


def judge(facts: Facts) -> list[Finding]:
    """All findings: check by check, and of each the worst first."""
    found: list[Finding] = []
    for check in CHECKS:
        found += sorted(check.judge(facts), key=lambda finding: _ORDER.index(finding.outcome))
    return found


def kinds() -> list[Kind]:
    """Everything that can be found, in the order of the checks; docs/doctor.md lists it."""
    return [value for check in CHECKS for value in vars(check).values() if isinstance(value, Kind)]
