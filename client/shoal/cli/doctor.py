"""``shoal doctor``: looks at a cluster from outside, and says what is wrong and what to do about it.

What is asked and what is made of the answers is `shoal.doctor`; here is how it looks, and the two questions that other
commands ask as well: the controller's gRPC service, and this machine's mounts.

The rule: it needs nothing to work. Whatever is missing or broken, gRPC on this machine included, is a finding.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

import click

from shoal import doctor as checkup
from shoal.cli import connect, output, records
from shoal.cli import mount as mounting
from shoal.doctor import Finding, MountFact, Outcome, Told, ToldJob, ToldNode, Untold
from shoal.errors import ShoalError
from shoal.local import DEFAULT_SOCKET
from shoal.origin import redact_url
from shoal.version import VERSION

if TYPE_CHECKING:
    from shoal.wire import shoal_pb2 as pb

#: That each answer is waited for.
TIMEOUT_S = 5.0
_COLOURS = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.PROBLEM: "red", Outcome.SKIPPED: "cyan"}

EXAMPLES = """\b
Examples:
  shoal doctor
  shoal doctor --endpoint http://node-3:7450 --timeout 20
  SHOAL_SOCKET=/run/shoal/node.sock shoal doctor
  shoal doctor --json | jq -r '.findings[] | select(.outcome == "problem") | .remedy'
  shoal doctor >/dev/null || echo 'something is wrong'
"""


@click.command(epilog=EXAMPLES)
@connect.endpoint_option
@click.option(
    "--socket",
    "socket_path",
    envvar="SHOAL_SOCKET",
    show_envvar=True,
    metavar="PATH",
    help=f"The local node's socket.  [default: {DEFAULT_SOCKET}]",
    show_default=False,
)
@click.option(
    "--timeout",
    "timeout_s",
    default=TIMEOUT_S,
    type=click.FloatRange(min=0.1, max=600),
    metavar="SECONDS",
    help="Wait no longer for each answer.",
)
@output.json_option
def doctor(endpoint: str | None, socket_path: str | None, timeout_s: float, as_json: bool) -> None:
    """Find out what is wrong with a cluster, and what to do about it.

    Looks from here, changes nothing, and goes on whatever does not answer: endpoint, controller, versions, clocks,
    nodes, disks, local socket, datasets, origins, this machine. Exits with status 1 where there is a problem; warnings
    are none.
    """
    facts = checkup.look(
        endpoint or "",
        socket_path or DEFAULT_SOCKET,
        socket_is_given=bool(socket_path),
        timeout_s=timeout_s,
        tell=_tell,
        list_mounts=_mounts,
    )
    findings = checkup.judge(facts)
    counts = Counter(finding.outcome for finding in findings)
    if as_json:
        output.document(
            {
                "version": VERSION,
                "endpoint": redact_url(endpoint) if endpoint else None,
                "healthy": not counts[Outcome.PROBLEM],
                "counts": {str(outcome): counts[outcome] for outcome in Outcome},
                "findings": [_json(finding) for finding in findings],
            }
        )
    else:
        output.data(_text(findings))
    if counts[Outcome.PROBLEM]:
        raise click.exceptions.Exit(1)


# What it looks like.


def _json(finding: Finding) -> records.Json:
    known = dataclasses.asdict(finding)
    return known | {
        "outcome": str(finding.outcome),
        "subject": finding.subject or None,
        "remedy": finding.remedy or None,
    }


def _text(findings: list[Finding]) -> str:
    """A line a finding, its remedy below; on a terminal wrapped and in colour."""
    width = max(len(finding.check) for finding in findings)
    indent = " " * (width + 11)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    lines = []
    for finding in findings:
        # Padded before it is coloured, for colours have a length too; click takes them out where nobody sees them.
        outcome = click.style(f"{finding.outcome:<7}", fg=_COLOURS[finding.outcome])
        lines.append(f"{finding.check:<{width}}  {outcome}  {_wrapped(finding.sentence, indent, columns)}")
        if finding.remedy:
            lines.append(f"{indent}{_wrapped(f'remedy: {finding.remedy}', indent, columns)}")
    return "\n".join([*lines, "", _summary(findings)])


def _wrapped(text: str, indent: str, columns: int) -> str:
    if not columns:
        return text
    room = max(40, columns - len(indent))
    return f"\n{indent}".join(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False))


def _summary(findings: list[Finding]) -> str:
    counts = Counter(finding.outcome for finding in findings)
    said = [f"{counts[o]} {o}{'' if counts[o] == 1 else 's'}" for o in (Outcome.PROBLEM, Outcome.WARNING) if counts[o]]
    if counts[Outcome.SKIPPED]:
        said.append(f"{counts[Outcome.SKIPPED]} not checked")
    return ", ".join(said) or "nothing is wrong, as far as can be seen from here"


# What only commands ask.


def _tell(address: str, timeout_s: float) -> Told | Untold:
    """What the controller says over gRPC, at ``host:port``."""
    try:
        from shoal.cli.control import Control
    except ImportError as error:
        return Untold(str(error), is_installed=False)
    try:
        with Control(address) as control:
            return _told(control.status(timeout_s=timeout_s))
    except ShoalError as error:
        return Untold(str(error).partition(": ")[0])


def _told(raw: pb.Status) -> Told:
    return Told(
        nodes=tuple(
            ToldNode(
                id=node.node.id,
                version=node.version,
                condition=node.condition,
                used_bytes=node.used_bytes,
                capacity_bytes=node.capacity_bytes,
                short_bytes=node.short_bytes,
                drained=node.drained,
                waits_for=node.waits_for,
                contest=node.contest,
            )
            for node in raw.nodes
        ),
        jobs=tuple(
            ToldJob(job["id"], records.job_target(job), job["state"], job["reason"], job["finished_at"])
            for job in map(records.job, raw.jobs)
        ),
    )


def _mounts(timeout_s: float) -> tuple[MountFact, ...] | None:
    try:
        known = mounting.listed(timeout_s=timeout_s)
    except (ShoalError, OSError, ValueError):
        return None
    return tuple(MountFact(m["mountpoint"], m["dataset"], m["state"], m["reason"] or "") for m in known)
