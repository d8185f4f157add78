"""Whether the controller is there, for reads and for commands. Pure."""

from __future__ import annotations

from shoal.doctor.facts import Facts, Process, Silence, Told, Untold
from shoal.doctor.findings import Finding, Kind, Outcome

CHECK = "controller"

ANSWERS = Kind(CHECK, "ok", Outcome.OK, "{http} and {grpc} answer")
AWAY = Kind(
    CHECK,
    "away",
    Outcome.PROBLEM,
    "the controller does not answer at {address} ({reason}): reads go on, changes of any kind wait",
    "start it again, and see the end of its log for why it ended; where it runs, its --advertise has to be a name that "
    "leads to it from here",
)
NO_HTTP = Kind(
    CHECK,
    "no-http",
    Outcome.PROBLEM,
    "the controller takes calls at {grpc} and does not answer over HTTP at {address} ({reason}): snapshots cannot be "
    "had "
    "from it",
    "open that port (7441) from here and from the nodes; its --advertise has to be a name that leads to it from "
    "everywhere",
)
NOT_HEARD_OF = Kind(
    CHECK,
    "not-heard-of",
    Outcome.PROBLEM,
    "the node at {address} has never heard from a controller",
    "start the controller, and see the node's --controller: it is the gRPC port, 7440 unless it was told otherwise",
)
NO_CALLS = Kind(
    CHECK,
    "no-calls",
    Outcome.WARNING,
    "the controller takes no calls from here at {address} ({reason}): reads work, commands such as 'shoal dataset' do "
    "not",
    "open its gRPC port (7440) to whoever runs commands; on Kubernetes give the pod the label shoal.io/control=true",
)
NO_GRPC = Kind(
    CHECK,
    "no-grpc",
    Outcome.SKIPPED,
    "gRPC is not installed, so the controller was not asked what only it knows: drains, room, prefetch jobs",
    "pip install 'shoal[cli]', unless this machine is only to read",
)
NOBODY = Kind(CHECK, "unknown", Outcome.SKIPPED, "nobody answers who could name it")


def judge(facts: Facts) -> list[Finding]:
    if facts.cluster_map is None:
        return [NOBODY.found()]
    match facts.controller:
        case None:
            source = facts.endpoint.asked if isinstance(facts.endpoint.asked, Process) else facts.socket.asked
            assert isinstance(source, Process), "somebody gave the map"
            return [NOT_HEARD_OF.found(address=source.address)]
        case Silence(reason=reason) if isinstance(facts.told, Told):
            return [NO_HTTP.found(grpc=facts.grpc_address, address=facts.controller_address, reason=reason)]
        case Silence(reason=reason):
            return [AWAY.found(address=facts.controller_address, reason=reason)]
    match facts.told:
        case Told():
            return [ANSWERS.found(http=facts.controller_address, grpc=facts.grpc_address)]
        case Untold(is_installed=False):
            return [NO_GRPC.found()]
        case Untold(reason=reason):
            return [NO_CALLS.found(address=facts.grpc_address, reason=reason)]
        case None:
            return [NO_CALLS.found(address="any address", reason="it names none")]
