"""``shoal doctor``: what is wrong with a cluster, seen from outside, and what to do about it.

    looking.look          asks everybody who can be asked: facts
    diagnosis.judge       from facts to findings: one module a check, each with everything that it can find
    findings, facts       the values in between

To find one more thing: a `Kind` in the module of its check, the fact that tells it in `facts`, who asks for it in
`looking`, and its row in docs/doctor.md (`python -m shoal.doctor.page` prints it).
"""

from shoal.doctor.diagnosis import judge, kinds
from shoal.doctor.facts import Facts, MountFact, Told, ToldJob, ToldNode, Untold
from shoal.doctor.findings import Finding, Kind, Outcome
from shoal.doctor.looking import look

__all__ = [
    "Facts",
    "Finding",
    "Kind",
    "MountFact",
    "Outcome",
    "Told",
    "ToldJob",
    "ToldNode",
    "Untold",
    "judge",
    "kinds",
    "look",
]
