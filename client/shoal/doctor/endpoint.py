"""Whether the endpoint leads to a cluster. Pure."""

from __future__ import annotations

from shoal.doctor.facts import Endpoint, Facts, Process, Silence, Trouble
from shoal.doctor.findings import Finding, Kind, Outcome
from shoal.origin import redact_url

CHECK = "endpoint"

ANSWERS = Kind(CHECK, "ok", Outcome.OK, "{address} answers: {role}, version {version}, epoch {epoch}")
BY_SOCKET = Kind(
    CHECK, "by-socket", Outcome.OK, "SHOAL_ENDPOINT is not set; the local node at {path} leads to the cluster"
)
NOT_SET = Kind(
    CHECK,
    "not-set",
    Outcome.PROBLEM,
    "SHOAL_ENDPOINT is not set, and no cache node answers at {path}",
    "set SHOAL_ENDPOINT=http://HOST:7441 to the controller, or http://HOST:7450 to a cache node; 'shoal dev' starts a "
    "cluster on this machine",
)
MALFORMED = Kind(
    CHECK,
    "malformed",
    Outcome.PROBLEM,
    "{text!r} is no endpoint",
    "write http://HOST:PORT of the controller (port 7441) or of a cache node (7450), and nothing behind it",
)
UNRESOLVED = Kind(
    CHECK,
    "unresolved",
    Outcome.PROBLEM,
    "the name in {address} has no address here ({reason})",
    "correct the host in SHOAL_ENDPOINT; on Kubernetes name the Service with its namespace, as in "
    "http://shoal-controller.shoal.svc:7441",
)
REFUSED = Kind(
    CHECK,
    "refused",
    Outcome.PROBLEM,
    "nobody listens at {address}",
    "start the controller or cache node there, or correct the port: the controller's is 7441 and a node's 7450 unless "
    "they were told otherwise",
)
UNREACHABLE = Kind(
    CHECK,
    "unreachable",
    Outcome.PROBLEM,
    "there is no way to {address} ({reason})",
    "see that the host is up and that no firewall or network policy lies between; on Kubernetes networkPolicy.clients "
    "says which pods may connect",
)
MUTE = Kind(
    CHECK,
    "mute",
    Outcome.PROBLEM,
    "{address} accepts connections and does not answer ({reason})",
    "the process is stopped, hangs or is overloaded: see its log and restart it, or name another node meanwhile",
)
GRPC = Kind(
    CHECK,
    "grpc",
    Outcome.PROBLEM,
    "{address} is the controller's gRPC port, which nodes and commands use, and no endpoint",
    "name its HTTP port, 7441 unless it was told otherwise: SHOAL_ENDPOINT=http://{host}:7441",
)
STANDBY = Kind(
    CHECK,
    "standby",
    Outcome.PROBLEM,
    "the controller at {address} stands by and knows nothing: another one leads",
    "name the Service, which is always the leader's: http://shoal-controller.NAMESPACE.svc:7441",
)
STRANGER = Kind(
    CHECK,
    "stranger",
    Outcome.PROBLEM,
    "what answers at {address} is no Shoal server ({reason})",
    "correct host and port of SHOAL_ENDPOINT; a proxy or an ingress in between has to pass HTTP on as it is",
)

_SILENCES = {
    Trouble.UNRESOLVED: UNRESOLVED,
    Trouble.REFUSED: REFUSED,
    Trouble.UNREACHABLE: UNREACHABLE,
    Trouble.MUTE: MUTE,
    Trouble.GRPC: GRPC,
    Trouble.STANDBY: STANDBY,
    Trouble.STRANGER: STRANGER,
}


def judge(facts: Facts) -> list[Finding]:
    endpoint = facts.endpoint
    if endpoint.malformed:
        return [MALFORMED.found(text=redact_url(endpoint.text))]
    match endpoint.asked:
        case None if isinstance(facts.socket.asked, Process):
            return [BY_SOCKET.found(path=facts.socket.path)]
        case None:
            return [NOT_SET.found(path=facts.socket.path)]
        case Silence() as silence:
            return [_silent(endpoint, silence)]
        case Process() as process:
            role = "the controller" if process.is_controller else f"cache node {process.node_id}"
            epoch = process.cluster_map.epoch
            return [ANSWERS.found(address=endpoint.address, role=role, version=process.version, epoch=epoch)]


def _silent(endpoint: Endpoint, silence: Silence) -> Finding:
    host = endpoint.address.rpartition(":")[0]
    kind = _SILENCES.get(silence.trouble, UNREACHABLE)
    return kind.found(address=endpoint.address, host=host, reason=silence.reason)
