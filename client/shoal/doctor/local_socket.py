"""Whether this machine's own node is found by its socket: then its bytes come without a copy. Pure.

Without a socket every byte comes over the network, which works. So a socket that is not there is nothing to speak of,
unless somebody named it, or a node runs here.
"""

from __future__ import annotations

from shoal.doctor.facts import Facts, Process, Silence, Trouble
from shoal.doctor.findings import Finding, Kind, Outcome

CHECK = "socket"

LEADS = Kind(CHECK, "ok", Outcome.OK, "{path} leads to node {id}: what it holds comes without a copy")
NO_NODE = Kind(
    CHECK,
    "no-node",
    Outcome.OK,
    "there is none at {path}, and no cache node runs on this machine, as far as can be seen: all bytes come over the "
    "network",
)
MISSING = Kind(
    CHECK,
    "missing",
    Outcome.PROBLEM,
    "SHOAL_SOCKET names {path}, which is not there ({reason}): all bytes come over the network",
    "name the socket that the node was started with (--socket, /run/shoal/node.sock unless told otherwise), or unset "
    "it; "
    "in a container mount the folder, as in docs/kubernetes.md",
)
NOT_FOUND = Kind(
    CHECK,
    "not-found",
    Outcome.WARNING,
    "node {id} runs on this machine and there is no socket at {path}: its bytes come over the network",
    "set SHOAL_SOCKET to what the node was started with (--socket)",
)
NO_SOCKET = Kind(
    CHECK,
    "no-socket",
    Outcome.PROBLEM,
    "{path} is no socket but a file or folder of that name",
    "name the node's socket in SHOAL_SOCKET; in a container mount its folder and not the file, which is made anew at "
    "each "
    "start",
)
DENIED = Kind(
    CHECK,
    "denied",
    Outcome.PROBLEM,
    "user {user} may not connect to {path} ({reason}): all bytes come over the network",
    "give that user the right to write to the socket and to enter the folders above it",
)
STALE = Kind(
    CHECK,
    "stale",
    Outcome.PROBLEM,
    "{path} is a socket on which nobody listens: its node has ended",
    "start the node again, or name the socket of the one that runs",
)
MUTE = Kind(
    CHECK,
    "mute",
    Outcome.PROBLEM,
    "the node behind {path} does not answer ({reason})",
    "its process is stopped, hangs or is overloaded: see its log and restart it",
)
STRANGER = Kind(
    CHECK,
    "stranger",
    Outcome.PROBLEM,
    "what answers at {path} is no cache node ({reason})",
    "name the node's socket in SHOAL_SOCKET",
)
OTHER_CLUSTER = Kind(
    CHECK,
    "other-cluster",
    Outcome.PROBLEM,
    "{path} leads to node {id} of another cluster than the endpoint's: its bytes are not used, and reads may find no "
    "dataset",
    "name the socket of a node of this cluster in SHOAL_SOCKET, or the other cluster in SHOAL_ENDPOINT",
)
OFF_MAP = Kind(
    CHECK,
    "off-map",
    Outcome.WARNING,
    "{path} leads to node {id}, which is not in the map: nobody is sent there",
    "see the node's log for why it does not join: its --controller has to be the controller's gRPC port, open from "
    "there",
)


def judge(facts: Facts) -> list[Finding]:
    path, asked = facts.socket.path, facts.socket.asked
    match asked:
        case Process():
            return [_leading(facts, asked)]
        case Silence(Trouble.NO_FILE, reason):
            return [_missing(facts, reason)]
        case Silence(Trouble.NO_SOCKET):
            return [NO_SOCKET.found(path=path)]
        case Silence(Trouble.DENIED, reason):
            return [DENIED.found(path=path, reason=reason, user=facts.machine.user)]
        case Silence(Trouble.REFUSED):
            return [STALE.found(path=path)]
        case Silence(Trouble.STRANGER | Trouble.GRPC | Trouble.STANDBY, reason):
            return [STRANGER.found(path=path, reason=reason)]
        case Silence(reason=reason):
            return [MUTE.found(path=path, reason=reason)]


def _leading(facts: Facts, local: Process) -> Finding:
    path, endpoint = facts.socket.path, facts.endpoint.asked
    if isinstance(endpoint, Process) and local.cluster_id and endpoint.cluster_id not in ("", local.cluster_id):
        return OTHER_CLUSTER.found(path=path, id=local.node_id)
    if facts.cluster_map is not None and facts.cluster_map.node(local.node_id) is None:
        return OFF_MAP.found(path=path, id=local.node_id)
    return LEADS.found(path=path, id=local.node_id)


def _missing(facts: Facts, reason: str) -> Finding:
    if facts.socket.is_given:
        return MISSING.found(path=facts.socket.path, reason=reason)
    here = next((seen.node.id for seen in facts.nodes if seen.is_here), "")
    return NOT_FOUND.found(path=facts.socket.path, id=here) if here else NO_NODE.found(path=facts.socket.path)
