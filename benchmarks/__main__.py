"""How fast reads are, beside the hardware's limits and beside what people use instead: one run, one table of ratios.

    python -m benchmarks [--tiny] [--only SECTION] [--runs N] [--size 4GiB] [--json PATH] [--svg PATH]

The claims that the table's first column numbers:

1. Same node, warm: an Arrow scan through `fs.read_arrow` is at least 0.98 x that of a raw map, and costs no memory.
2. URL to usable Arrow buffer of a warm shard: at most 100 us the first time in a process, 10 us again.
3. ``fs.open(path).read()`` on the same node: at least 0.90 x that of the plain file.
4. Another node, one process: 0.90 x iperf3 without checksums, 0.80 x with; at most 0.5 CPU-s a GB, both ends.
5. 64 KiB random reads from another node: at most 150 us and 15 x s3fs; many small ranges in one call: 20 x s3fs.
6. A warm cache on another node: 2 x Flight for a CPU-second, 5 x s3fs and 1.5 x obstore; on the same node ahead of the
   mounts of JuiceFS and rclone.
7. Cold objects: at least 0.95 x the origin's best client, the first byte within 1.2 x.
8. A prefetch: at least 0.95 x the fastest parallel reader of the origin, on one node and on three.

The rule: a missed target is a line of the table like any other; the exit status tells only whether something broke.
"""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from benchmarks import chart, command, machine, report
from benchmarks.harness import Missing, progress
from benchmarks.report import Findings
from benchmarks.stage import TINY, Scale, Stage, check_room, scale
from shoal import sizes
from shoal.cli.output import SizeType

SECTIONS = ("same-node", "other-node", "mounts", "cold", "prefetch")
RESULTS = Path(__file__).parent / "results"
EXAMPLES = """\b
Examples:
  python -m benchmarks
  python -m benchmarks --only same-node --only other-node --runs 3
  python -m benchmarks --size 512MiB --runs 1 --json /tmp/reads.json --svg /tmp/reads.svg
  python -m benchmarks --tiny
"""


@click.command(epilog=EXAMPLES)
@click.option("--tiny", is_flag=True, help="A few MiB and one turn: proves that it runs, measures nothing.")
@click.option("--only", "only", multiple=True, type=click.Choice(SECTIONS), help="Run this section; may be repeated.")
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Counted turns of each contender.")
@click.option("--size", type=SizeType(), default="4GiB", show_default=True, help="Least bytes of the set.")
@command.json_option
@click.option("--svg", "svg_path", type=click.Path(dir_okay=False, path_type=Path), help="Where the chart goes.")
@command.workdir_option
def main(
    tiny: bool,
    only: Sequence[str],
    runs: int,
    size: int,
    json_path: Path | None,
    svg_path: Path | None,
    workdir: Path | None,
) -> None:
    """Measure Shoal's reads beside their limits and their alternatives, and print one table of ratios.

    Without --tiny and --only the figures go to benchmarks/results/reads.json and the chart to reads.svg there.
    """
    scope = TINY if tiny else scale(size, runs)
    if not tiny and not only:
        json_path = json_path or RESULTS / "reads.json"
        svg_path = svg_path or RESULTS / "reads.svg"
    chosen = [name for name in SECTIONS if name in only or not only]
    findings, failures = Findings(), []
    # Whoever ends this run ends all that it started, and has it unmounted and removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with command.scratch(workdir) as directory:
        host = machine.describe(directory)
        check_room(directory, scope.set_bytes)
        with Stage(directory, scope) as stage:
            for name in chosen:
                progress(f"section {name}")
                try:
                    importlib.import_module(f"benchmarks.{name.replace('-', '_')}").run(stage, findings)
                except Exception:  # noqa: BLE001 # what broke is told, and the other sections still run
                    failures.append(name)
                    click.echo(f"section {name} broke:\n{traceback.format_exc()}", err=True)
    if tiny:
        findings.rows = [replace(row, target=None) for row in findings.rows]
        findings.note("tiny: proves that everything runs; the figures mean nothing and are not judged")
    _show(findings, host, scope, failures)
    command.save(_result(findings, host, scope, failures), json_path)
    if svg_path:
        try:
            chart.write(svg_path, findings.rows, str(host))
        except Missing as reason:
            click.echo(f"no chart: {reason}", err=True)
    if failures:
        sys.exit(1)


def _show(findings: Findings, host: machine.Machine, scope: Scale, failures: Sequence[str]) -> None:
    click.echo(report.table(findings.rows))
    click.echo("\nNotes")
    click.echo(f"- machine: {host}")
    click.echo(
        f"- set: {scope.objects} Arrow files of {sizes.format(scope.object_bytes)}; medians of {scope.runs} "
        "interleaved turns after a warm-up; a ratio above 1 is better for Shoal"
    )
    click.echo("- versions: " + ", ".join(f"{name} {version}" for name, version in host.packages.items()))
    for note in findings.notes:
        click.echo(f"- {note}")
    for reason in dict.fromkeys(row.skipped for row in findings.rows if row.skipped):
        peers = sorted({row.peer for row in findings.rows if row.skipped == reason} - {"limit"})
        click.echo(f"- did not run ({', '.join(peers) or 'a limit'}): {reason}")
    for name in failures:
        click.echo(f"- broke: section {name}, see above")


def _result(findings: Findings, host: machine.Machine, scope: Scale, failures: Sequence[str]) -> dict[str, object]:
    return {
        "machine": asdict(host),
        "scale": asdict(scope),
        "rows": [asdict(row) | {"is_met": row.is_met} for row in findings.rows],
        "notes": findings.notes,
        "broke": list(failures),
    }


if __name__ == "__main__":
    main()
