"""Whether everybody runs the same version. Pure.

Nodes of two minor versions may be in one cluster for the time of an upgrade; what comes of two major ones nobody tried.
"""

from __future__ import annotations

import re
from collections import defaultdict

from shoal.doctor.facts import Facts, Told
from shoal.doctor.findings import Finding, Kind, Outcome, counted, listed

CHECK = "versions"

SAME = Kind(CHECK, "ok", Outcome.OK, "{version} everywhere: {who}")
MAJOR = Kind(
    CHECK,
    "major",
    Outcome.PROBLEM,
    "{version} ({who}) and {wanted} ({reference}) are not made to work together",
    "bring all to one version: {how}",
)
MINOR = Kind(
    CHECK,
    "minor",
    Outcome.WARNING,
    "{version} ({who}) beside {wanted} ({reference}) is for the time of an upgrade only",
    "finish the upgrade: {how}",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "nobody answers who could say its version")

HERE = "this client"
_CLIENT_HOW = "pip install 'shoal=={wanted}' here"
_SERVER_HOW = "install shoal {wanted} there and restart; on Kubernetes one image is for all of 'helm upgrade'"


def judge(facts: Facts) -> list[Finding]:
    versions = _versions(facts)
    if len(versions) == 1:
        return [NOBODY.found()]
    reference = next(name for name in versions if name != HERE)  # the controller where it is known
    wanted = versions[reference]
    groups: dict[str, list[str]] = defaultdict(list)
    for name, version in versions.items():
        groups[version].append(name)
    found = []
    for version, names in groups.items():
        kind = _difference(version, wanted)
        for who, how in (
            ([n for n in names if n == HERE], _CLIENT_HOW),
            ([n for n in names if n != HERE], _SERVER_HOW),
        ):
            if kind is not None and who:
                named = {"version": version, "reference": reference, "wanted": wanted}
                found.append(kind.found(who=listed(who), how=how.format(wanted=wanted), **named))
    if found:
        return found
    nodes = [name for name in versions if name.startswith("node ")]
    others = [name for name in versions if name not in nodes]
    everybody = listed([*others, *([counted(len(nodes), "node")] if nodes else [])])
    return [SAME.found(who=everybody, version=listed(sorted(set(versions.values()))))]


def _versions(facts: Facts) -> dict[str, str]:
    """By who runs it: the controller first where it is known, this client last."""
    found: dict[str, str] = {}
    for name, process in facts.answering():
        found.setdefault(name, process.version)
    if isinstance(facts.told, Told):  # of nodes that do not answer here
        for told in facts.told.nodes:
            if told.version:
                found.setdefault(facts.name_of(told.id), told.version)
    return found | {HERE: facts.version}


def _difference(one: str, other: str) -> Kind | None:
    """What two versions are to each other; None where they differ by a patch at most."""
    if one == other:
        return None
    first, second = (re.match(r"(\d+)\.(\d+)", version) for version in (one, other))
    if first is None or second is None:
        return MINOR
    if first[1] != second[1]:
        return MAJOR
    return MINOR if first[2] != second[2] else None
