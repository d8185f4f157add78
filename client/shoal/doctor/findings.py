"""What can be found, and what was: values. Pure.

The rule: a kind of finding has one sentence and one remedy, written once, as templates. docs/doctor.md lists them from
here, so that what people read there is what the command says.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"  #: works, and somebody should know
    PROBLEM = "problem"  #: something does not work, or will not
    SKIPPED = "skipped"  #: could not be checked; the sentence says why


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        check: what was checked, the first word of `kind`.
        kind: its name, which never changes.
        subject: the thing that it is about, such as ``node 3f9a``; "" for the whole cluster.
        remedy: what to do; "" where there is nothing.
    """

    check: str
    kind: str
    outcome: Outcome
    subject: str
    sentence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Kind:
    """Something that can be found.

    Attributes:
        check: what is checked, one of `diagnosis.CHECKS`.
        what: told apart from the check's other kinds.
        sentence, remedy: templates: what is in braces is named when it is found.
    """

    check: str
    what: str
    outcome: Outcome
    sentence: str
    remedy: str = ""

    @property
    def name(self) -> str:
        return f"{self.check}-{self.what}"

    def found(self, subject: str = "", /, **named: object) -> Finding:
        return Finding(
            self.check,
            self.name,
            self.outcome,
            subject,
            self.sentence.format(**named),
            self.remedy.format(**named),
        )


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in a sentence: ``a, b and c``; of many the first few and how many more."""
    shown = [*names[:most], f"{len(names) - most} more"] if len(names) > most + 1 else [*names]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def counted(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def split(sentence: str) -> str:
    """What an error says is wrong, without the remedy that follows the colon: a finding has one of its own."""
    return sentence.partition(": ")[0]
