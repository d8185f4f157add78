"""``shoal node``: the cache nodes, and taking one out of service without losing what only it holds.

A drain is the controller's and the nodes'; this command asks for it and watches. So a watcher that is killed, or a
controller that restarts, does not end the drain.

The rule: ``drain`` exits with status 0 only when the nodes that own shards now hold all that the drained one holds, so
whoever waits for it may stop that node.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from shoal import sizes
from shoal.cli import connect, output, records, watching
from shoal.errors import InvalidRequest, NotFound, ShoalError, Unavailable

if TYPE_CHECKING:
    from shoal.cli.control import Control

#: Between two looks at how far a drain is.
POLL_S = 0.25
#: Nothing was handed over for so long and other nodes lack room: it will not go on by itself.
STUCK_S = 30.0

#: Replaced in tests.
sleep = time.sleep

LIST_EXAMPLES = """\b
Examples:
  shoal node list
  shoal node list --json | jq -r '.[] | select(.drained) | .id'
"""
DRAIN_EXAMPLES = """\b
Examples:
  shoal node drain 3f9a                    # the first digits of an id that 'shoal node list' shows
  shoal node drain 3f9a --timeout 3600 && systemctl stop shoal-cachenode
  shoal node drain 3f9a --no-wait
"""
UNDRAIN_EXAMPLES = """\b
Examples:
  shoal node undrain 3f9a
"""


@click.group()
def node() -> None:
    """List cache nodes, and take them out of service."""


@node.command("list", epilog=LIST_EXAMPLES)
@connect.endpoint_option
@output.json_option
def list_nodes(endpoint: str | None, as_json: bool) -> None:
    """List the cache nodes that the controller knows."""
    with connect.control(connect.cluster(endpoint)) as control:
        known = _nodes(control)
    if as_json:
        output.document(known)
    elif known:
        output.data(output.table(records.NODE_COLUMNS, map(records.node_row, known)))
    else:
        output.remark("there are no cache nodes: start one with 'shoal-cachenode'")


@node.command(epilog=DRAIN_EXAMPLES)
@click.argument("node_id", metavar="ID")
@click.option("--wait/--no-wait", default=True, help="Wait until all is handed over.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait no longer; the drain goes on."
)
@click.option("--force", is_flag=True, help="Also where no other node is left to own anything.")
@connect.endpoint_option
@output.json_option
def drain(node_id: str, wait: bool, timeout_s: float | None, force: bool, endpoint: str | None, as_json: bool) -> None:
    """Give the shards of node ID to the others, and wait until they hold them.

    ID may be the beginning of an id. The node goes on serving what it holds, and owns nothing until 'shoal node
    undrain', also after a restart. Ctrl-C ends the waiting, not the drain.
    """
    with connect.control(connect.cluster(endpoint)) as control:
        known = records.node(control.drain_node(_find(_nodes(control), node_id)["id"], force=force))
    if not wait:
        output.document(known) if as_json else output.data(
            f"node {known['id']} is draining: 'shoal node list' shows what is left, "
            f"'shoal node undrain {known['id']}' undoes it"
        )
        return
    known, failure = _follow(endpoint, known, timeout_s)
    if as_json:
        output.document(known)
    if failure:
        raise ShoalError(failure)
    if not as_json:
        output.data(f"drained node {known['id']}: other nodes hold all that it holds; it may be stopped")


@node.command(epilog=UNDRAIN_EXAMPLES)
@click.argument("node_id", metavar="ID")
@connect.endpoint_option
@output.json_option
def undrain(node_id: str, endpoint: str | None, as_json: bool) -> None:
    """Let node ID, or the one whose id begins so, own its share again."""
    with connect.control(connect.cluster(endpoint)) as control:
        before = _find(_nodes(control), node_id)
        known = records.node(control.undrain_node(before["id"]))
    if as_json:
        output.document(known)
    elif not before["draining"]:
        output.data(f"node {known['id']} was not draining: it is {known['state']}")
    elif known["state"] == "down":
        output.data(f"node {known['id']} is down, and owns its share when it is back")
    else:
        output.data(f"node {known['id']} owns its share again")


def _nodes(control: Control) -> list[records.Json]:
    return [records.node(raw) for raw in control.status().nodes]


def _find(known: list[records.Json], wanted: str) -> records.Json:
    """The node of that id, or the only one whose id begins so.

    Raises:
        NotFound: there is none.
        InvalidRequest: there are several.
    """
    matches = [each for each in known if each["id"].startswith(wanted)]
    for each in matches:
        if each["id"] == wanted:
            return each
    if not matches or not wanted:
        raise NotFound(
            f"no cache node has an id that begins with {wanted!r}: 'shoal node list' shows those that are known"
        )
    if len(matches) > 1:
        ids = ", ".join(each["id"] for each in matches)
        raise InvalidRequest(f"{wanted!r} means {len(matches)} nodes ({ids}): write more of it")
    return matches[0]


def _follow(endpoint: str | None, known: records.Json, timeout_s: float | None) -> tuple[records.Json, str]:
    """Watch a drain to its end: the node as it was last seen, and why it is not drained, "" where it is.

    Raises:
        Unavailable: the controller stayed away for `watching.SILENCE_TIMEOUT_S`.
        click.exceptions.Exit: Ctrl-C.
    """
    node_id = known["id"]
    goes_on = f"the drain goes on, 'shoal node list' shows how far it is, 'shoal node undrain {node_id}' undoes it"
    with watching.Bar(goes_on) as bar:
        known, why = _watch(endpoint, known, timeout_s, bar)
    if not why:
        return known, ""
    left = f"{_left(known)} left to hand over" if known["state"] != "down" else "not all handed over"
    return known, f"node {node_id} is not drained{why}: {left}: {known['waits_for']}; {goes_on}"


def _watch(
    endpoint: str | None, known: records.Json, timeout_s: float | None, bar: watching.Bar
) -> tuple[records.Json, str]:
    began_at = heard_at = moved_at = time.monotonic()
    least: int | None = None
    most = 0
    while True:
        try:
            # The endpoint is asked each time: a controller may come back elsewhere.
            with connect.control(connect.cluster(endpoint)) as control:
                nodes = _nodes(control)
        except Unavailable:
            if time.monotonic() - heard_at > watching.SILENCE_TIMEOUT_S:
                raise
        else:
            now = heard_at = time.monotonic()
            known = _still_draining(nodes, known["id"])
            left = known["handover_bytes"]
            if left is not None:
                # More may be left than there was at first: a map change in between gave it to owners that lack it.
                most = max(most, left)
                bar.show(f"draining {known['id']}", most - left, most, known["waits_for"])
            if left is None or least is None or left < least:
                least, moved_at = left, now
            lacking = any(other["short_bytes"] for other in nodes if other["state"] == "up")
            if known["drained"]:
                return known, ""
            if known["state"] == "down" or not any(other["state"] == "up" for other in nodes):
                return known, " and cannot be now"
            if lacking and now - moved_at >= STUCK_S:
                return known, f" and does not get on since {STUCK_S:g} s"
        if timeout_s is not None and time.monotonic() - began_at >= timeout_s:
            return known, f" after {timeout_s:g} s"
        sleep(POLL_S)


def _still_draining(nodes: list[records.Json], node_id: str) -> records.Json:
    known = next((each for each in nodes if each["id"] == node_id), None)
    if known is None:
        raise ShoalError(f"node {node_id} left the cluster before it was drained: what only it held is fetched again")
    if not known["draining"]:
        raise ShoalError(f"the drain of node {node_id} was undone meanwhile by 'shoal node undrain'")
    return known


def _left(known: records.Json) -> str:
    left = known["handover_bytes"]
    return "it is not known yet what is" if left is None else f"{sizes.format(left)} are"
