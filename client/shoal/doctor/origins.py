"""Whether those who read origins can: the controller, which lists them, and the nodes, which fetch from them. Pure.

Each is asked on its own, because each has an environment, mounts and a network of its own.
"""

from __future__ import annotations

from collections import defaultdict

from shoal.doctor.facts import Facts, OriginFact
from shoal.doctor.findings import Finding, Kind, Outcome, counted, listed, split

CHECK = "origins"

READ = Kind(CHECK, "ok", Outcome.OK, "{datasets}, of which {readers} can read the origin")
NO_DATASETS = Kind(CHECK, "none", Outcome.OK, "there are no datasets, and so no origins")
OPTIONS = Kind(
    CHECK,
    "options",
    Outcome.PROBLEM,
    "{who} cannot open the origin of dataset {dataset}, {origin}: {error}",
    "put the variable or file there that env:NAME or file:PATH refers to and restart, or correct the options: 'shoal "
    "dataset "
    "remove {dataset}' and 'add'; on Kubernetes see its Secret",
)
DENIED = Kind(
    CHECK,
    "denied",
    Outcome.PROBLEM,
    "{who} may not read the origin of dataset {dataset}, {origin}: {error}",
    "correct the credentials: what env:NAME and file:PATH refer to there, or the options; for files, the rights of the "
    "servers' "
    "user",
)
UNREACHABLE = Kind(
    CHECK,
    "unreachable",
    Outcome.PROBLEM,
    "{who} cannot reach the origin of dataset {dataset}, {origin}: {error}",
    "see that it runs, that endpoint_url is right, and that it is open from there: firewall, proxy, network policy "
    "(networkPolicy.egress)",
)
GONE = Kind(
    CHECK,
    "gone",
    Outcome.PROBLEM,
    "nothing of dataset {dataset} is left at its origin, {origin}, for {who}: {error}",
    "put the data back, or mount it at the same path everywhere where it is files; if it moved, 'shoal dataset remove "
    "{dataset}' and 'add' with its new URL",
)
CHANGED = Kind(
    CHECK,
    "changed",
    Outcome.PROBLEM,
    "the origin of dataset {dataset}, {origin}, is not what its snapshot lists: {error}",
    "'shoal dataset refresh {dataset}', and open it again: what is not cached of the old snapshot cannot be read any "
    "more",
)
FAILS = Kind(
    CHECK,
    "fails",
    Outcome.PROBLEM,
    "{who} cannot read the origin of dataset {dataset}, {origin}: {error}",
    "see the logs there, and the origin's",
)
UNSAID = Kind(
    CHECK,
    "unsaid",
    Outcome.SKIPPED,
    "whether {who} can read the origin of dataset {dataset} is not known: {reason}",
    "see what else is found about that process, then ask again",
)
TOO_MANY = Kind(
    CHECK,
    "too-many",
    Outcome.SKIPPED,
    "{count} pairs of a process and a dataset were left out, so that origins are not asked too much",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "nobody answers who could read an origin")

_KINDS = {
    "InvalidRequest": OPTIONS,
    "OriginDenied": DENIED,
    "OriginUnavailable": UNREACHABLE,
    "DeadlineExceeded": UNREACHABLE,
    "OriginNotFound": GONE,
    "OriginChanged": CHANGED,
}


def judge(facts: Facts) -> list[Finding]:
    if facts.datasets is None:
        return [NOBODY.found()]
    if not facts.datasets:
        return [NO_DATASETS.found()]
    origins = {record.name: record.origin for record in facts.datasets}
    groups: dict[tuple[str, str | None, str], list[OriginFact]] = defaultdict(list)
    for fact in facts.origins:
        if fact.error != "":
            groups[(fact.dataset, fact.error, split(fact.sentence))].append(fact)
    found = []
    for (dataset, error, said), failed in groups.items():
        who = _who(facts, [fact.who for fact in failed], dataset)
        if error in (None, "Overloaded"):
            found.append(UNSAID.found(dataset, who=who, dataset=dataset, reason=said))
        else:
            kind = _KINDS.get(error or "", FAILS)
            found.append(kind.found(dataset, who=who, dataset=dataset, origin=origins[dataset], error=said))
    if facts.unchecked_pairs:
        found.append(TOO_MANY.found(count=facts.unchecked_pairs))
    if any(finding.outcome is not Outcome.SKIPPED for finding in found):
        return found
    readers = {fact.who for fact in facts.origins if fact.error == ""}
    if not readers:
        return found or [NOBODY.found()]
    who = listed([*(["the controller"] if "" in readers else []), *_nodes(len(readers - {""}))])
    return [READ.found(datasets=counted(len(origins), "dataset"), readers=who), *found]


def _nodes(count: int) -> list[str]:
    return [counted(count, "node")] if count else []


def _who(facts: Facts, failed: list[str], dataset: str) -> str:
    """Those who failed: all nodes of a dataset are ``all nodes``, a part of them is named."""
    asked = {fact.who for fact in facts.origins if fact.dataset == dataset and fact.who}
    nodes = [who for who in failed if who]
    named = ["all nodes"] if len(nodes) > 1 and len(nodes) == len(asked) else [facts.name_of(who) for who in nodes]
    return listed([*(["the controller"] if "" in failed else []), *named])
