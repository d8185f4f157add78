"""``shoal plan``: what each rank of a job will read, how much of it is on its own node, and what would be fetched.

The rule: it computes the plan that the ranks would compute, and reads nothing but the index.
"""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from shoal import sizes
from shoal.cli import connect, files, output
from shoal.cluster import Cluster
from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import InvalidRequest, ShoalError
from shoal.placement import Placement
from shoal.snapshot import Snapshot
from shoal.streaming import indexing
from shoal.streaming import plan as plans
from shoal.streaming.forecast import Forecast, forecast
from shoal.streaming.index import Index
from shoal.streaming.plan import Homes, Plan
from shoal.streaming.selection import Selection
from shoal.streaming.steps import Schedule

#: Ranks that have a row each; of more, there is one for each node.
RANKS_SHOWN = 16
BAR_WIDTH = 32
LOCAL, PEER, COLD = "█", "▒", "·"

EXAMPLES = """\b
Examples:
  shoal plan imagenet/train --world-size 64 --batch-size 256 --shuffle
  shoal plan 'tokens/*.arrow' --world-size 8 --batch-size 32 --nodes 4
  shoal plan tokens --world-size 2 --batch-size 32 --nodes 3f9a12,77b0c4 --json | jq .local_share
"""


@click.command(epilog=EXAMPLES)
@click.argument("path", metavar="NAME[@SNAPSHOT][/GLOB]")
@click.option("--world-size", type=click.IntRange(1), required=True, help="Ranks.")
@click.option("--batch-size", type=click.IntRange(1), required=True, help="Samples a rank and step.")
@click.option("--shuffle/--no-shuffle", default=False, help="Shuffle, as the stream will.")
@click.option("--seed", type=int, default=0, help="Of the shuffle.")
@click.option("--epoch", type=click.IntRange(0), default=0, help="Which epoch.")
@click.option("--drop-last", is_flag=True, help="Leave out the samples that make no whole step.")
@click.option("--format", "kind", metavar="NAME", help="arrow, parquet, tar or objects; default: by the names.")
@click.option(
    "--nodes",
    metavar="N|ID,ID…",
    help="Where the ranks run, as many on each, in order: ids or their beginnings; or a number of equal nodes that are "
    "only imagined. Default: the nodes that are up.",
)
@click.option("--steps", type=click.IntRange(1), help="Count only the first steps.")
@connect.endpoint_option
@output.json_option
def plan(
    path: str,
    world_size: int,
    batch_size: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    drop_last: bool,
    kind: str | None,
    nodes: str | None,
    steps: int | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Show what each rank of a training job will read.

    Local is what the rank's own node owns, peer what another one does; cold is what no node holds yet.
    """
    fs = files.filesystem(endpoint)
    pinned, inside = fs.locate(files.path_of(path))
    snapshot, cluster = pinned.snapshot, fs.cluster
    selection = Selection.of_path(snapshot, inside, kind)
    index = indexing.fetch(cluster, snapshot, selection, pinned.record.replicas)
    schedule = Schedule(index.sample_count, 0, batch_size, world_size, drop_last)
    cluster_map, rank_nodes = _places(cluster.map, nodes, world_size)
    placement = Placement(snapshot.shard_table, snapshot.shard_count(), cluster_map, pinned.record.replicas)
    homes = Homes(snapshot, index, placement, rank_nodes)
    window = plans.window_of(index)
    order = plans.order_of(index, seed=seed, epoch=epoch, window=window, shuffle=shuffle)
    held = _held(cluster, snapshot)[snapshot.shards_at(index.rows, index.starts)]
    counted = forecast(Plan(index, order, schedule, homes), index, homes, held, steps or schedule.steps)
    document = _document(selection, index, schedule, window if shuffle else None, rank_nodes, counted)
    if as_json:
        output.document(document)
    else:
        output.data(_text(document))


def _places(known: ClusterMap, nodes: str | None, world_size: int) -> tuple[ClusterMap, list[str]]:
    """The map that decides who owns what, and the id of each rank's node."""
    if nodes is not None and nodes.isdecimal() and len(nodes) < 6:
        count = int(nodes)
        if not count:
            raise InvalidRequest("--nodes 0: ranks run somewhere; give 1 or more")
        known = ClusterMap(1, tuple(Node(f"imagined-{n:05}", f"imagined:{n}", 1) for n in range(count)))
        ids = [node.id for node in known.nodes]
    elif nodes is None:
        ids = [node.id for node in known.owners()]
        if not ids:
            raise InvalidRequest("no cache node is up: start one, or imagine some with --nodes 8")
    else:
        ids = [_node(known, text.strip()) for text in nodes.split(",")]
    return known, [ids[rank * len(ids) // world_size] for rank in range(world_size)]


def _node(known: ClusterMap, text: str) -> str:
    found = [node.id for node in known.nodes if text and node.id.startswith(text)]
    if len(found) != 1:
        ids = ", ".join(node.id[:8] for node in known.nodes)
        raise InvalidRequest(f"--nodes {text!r} is {'no node' if not found else 'several nodes'}: there are {ids}")
    return found[0]


def _held(cluster: Cluster, snapshot: Snapshot) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether some node holds each shard of the snapshot whole; a node that does not answer holds nothing."""
    count = snapshot.shard_count()
    held = np.zeros(count, np.bool_)
    for node in cluster.map.nodes:
        if node.state is NodeState.DOWN:
            continue
        try:
            body = cluster.transport.get(node.address, f"/v1/snapshots/{snapshot.digest}/held", is_hasty=True).body
        except ShoalError as error:
            output.remark(f"node {node.id[:8]} does not say what it holds, so it counts as holding nothing: {error}")
            continue
        held |= np.unpackbits(np.frombuffer(body, np.uint8), count=count).astype(np.bool_)
    return held


def _document(
    selection: Selection,
    index: Index,
    schedule: Schedule,
    window: int | None,
    rank_nodes: list[str],
    counted: Forecast,
) -> dict[str, Any]:
    columns = ("samples", "local_samples", "local_bytes", "peer_bytes", "cold_bytes")
    return {
        "snapshot": selection.digest,
        "pattern": selection.pattern,
        "format": str(selection.format),
        "samples": index.sample_count,
        "runs": len(index),
        "bytes": index.run_bytes,
        "world_size": schedule.world_size,
        "batch_size": schedule.batch_size,
        "steps": schedule.steps,
        "steps_counted": counted.steps,
        "shuffle_window": window,
        "local_share": counted.local_share,
        "ranks": [
            {"rank": rank, "node": node} | {name: int(getattr(counted, name)[rank]) for name in columns}
            for rank, node in enumerate(rank_nodes)
        ],
    }


def _text(document: dict[str, Any]) -> str:
    ranks = document["ranks"]
    nodes = list(dict.fromkeys(each["node"] for each in ranks))
    if len(ranks) <= RANKS_SHOWN:
        groups = [(f"rank {each['rank']}", [each]) for each in ranks]
    else:
        groups = [(f"{len(own)} ranks", own) for own in ([r for r in ranks if r["node"] == n] for n in nodes)]
    rows, most = [], max(sum(r["local_bytes"] + r["peer_bytes"] for r in group) for _, group in groups)
    for name, group in groups:
        total = {key: sum(each[key] for each in group) for key in group[0] if key not in ("rank", "node")}
        size_bytes = total["local_bytes"] + total["peer_bytes"]
        rows.append(
            [
                name,
                group[0]["node"][-8:] if group[0]["node"].startswith("imagined") else group[0]["node"][:8],
                f"{total['samples']:,}",
                sizes.format(size_bytes),
                output.percent(total["local_samples"], total["samples"]),
                sizes.format(total["cold_bytes"]),
                _bar(total, most),
            ]
        )
    counted = document["steps_counted"]
    steps = f"{document['steps']:,} steps" + (
        f", of which the first {counted:,} are counted" if counted < document["steps"] else ""
    )
    shuffle = (
        f"shuffled within {document['shuffle_window']:,} samples"
        if document["shuffle_window"]
        else "in the order of the data"
    )
    head = output.fields(
        [
            ("selection", f"{document['pattern']} of snapshot {document['snapshot'][:8]} ({document['format']})"),
            (
                "samples",
                f"{document['samples']:,} in {document['runs']:,} runs, {sizes.format(document['bytes'])}, {shuffle}",
            ),
            ("steps", f"{steps}: {document['world_size']} ranks x {document['batch_size']} samples each"),
            (
                "local",
                f"{document['local_share']:.1%} of the samples, on {len(nodes)} nodes (by chance {1 / len(nodes):.1%})",
            ),
        ]
    )
    table = output.table(
        ("RANK", "NODE", "SAMPLES>", "READS>", "LOCAL>", "COLD>", f"{LOCAL} local {PEER} peer {COLD} cold"), rows
    )
    return f"{head}\n\n{table}"


def _bar(total: dict[str, int], most: int) -> str:
    """What is cold counts as such, whoever owns it."""
    size_bytes = total["local_bytes"] + total["peer_bytes"]
    warm = max(0, size_bytes - total["cold_bytes"])
    local = warm * total["local_bytes"] // max(1, size_bytes)
    parts = ((LOCAL, local), (PEER, warm - local), (COLD, size_bytes - warm))
    return "".join(mark * round(BAR_WIDTH * part / max(1, most)) for mark, part in parts)
