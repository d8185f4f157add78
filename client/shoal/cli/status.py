"""``shoal status``: nodes, datasets, prefetch jobs and whatever a person should know about the cluster.

The rule: with the controller gone it still says what a node knows, marks the rest as unknown, and exits with 1.
"""

from __future__ import annotations

import click

from shoal.cli import connect, output, records
from shoal.cli.connect import Cluster
from shoal.errors import Unavailable

EXAMPLES = """\b
Examples:
  shoal status
  shoal status --endpoint http://node-3:7450
  shoal status --json | jq '.nodes[] | select(.state != "up") | .id'
"""


@click.command(epilog=EXAMPLES)
@connect.endpoint_option
@output.json_option
def status(endpoint: str | None, as_json: bool) -> None:
    """Show the cluster: nodes, datasets, prefetch jobs, warnings.

    Where the controller is away, prints what the endpoint knows and exits with status 1.
    """
    known = connect.cluster(endpoint)
    failure: Unavailable | None = None
    try:
        report = _from_controller(known)
    except Unavailable as error:
        failure = error
        report = _from_endpoint(known)
    if as_json:
        output.document(report)
    else:
        output.data(_text(report))
    if failure is not None:
        raise failure


def _from_controller(known: Cluster) -> records.Json:
    with connect.control(known) as control:
        raw = control.status()
    return {
        "endpoint": known.address,
        "controller": known.controller_grpc,
        "controller_is_up": True,
        "version": raw.version,
        "epoch": raw.epoch,
        "nodes": [records.node(node) for node in raw.nodes],
        "datasets": [records.dataset(dataset) for dataset in raw.datasets],
        "jobs": [records.job(job) for job in raw.jobs],
        "warnings": list(raw.warnings),
    }


def _from_endpoint(known: Cluster) -> records.Json:
    return {
        "endpoint": known.address,
        "controller": known.controller_grpc,
        "controller_is_up": False,
        "version": known.version,
        "epoch": known.cluster_map.epoch,
        "nodes": [records.node_without_controller(node) for node in known.cluster_map.nodes],
        "datasets": [records.dataset_without_controller(record) for record in connect.datasets(known.address)],
        "jobs": None,
        "warnings": ["the controller does not answer: this is what the endpoint knew last"],
    }


def _text(report: records.Json) -> str:
    controller = report["controller"] if report["controller_is_up"] else "does not answer"
    parts = [f"epoch {report['epoch']}, version {report['version']}, controller {controller}"]
    for columns, row, rows, none in (
        (records.NODE_COLUMNS, records.node_row, report["nodes"], "no cache nodes"),
        (records.DATASET_COLUMNS, records.dataset_row, report["datasets"], "no datasets"),
        (records.JOB_COLUMNS, records.job_row, report["jobs"], ""),
    ):
        if rows:
            parts.append(output.table(columns, map(row, rows)))
        elif none:
            parts.append(none)
    if report["warnings"]:
        parts.append("\n".join(f"warning: {sentence}" for sentence in report["warnings"]))
    return "\n\n".join(parts)
