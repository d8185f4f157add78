"""What the supervisor of one mount does next: a pure function of what it is in and what happened.

    phase       what is there                             waits for                      at the latest
    NEW         nothing is mounted                        Mounted, MountRefused, Adopted
    STARTING    the mount, a daemon that loads            DaemonReady                    START_S: the daemon is killed
    SERVING     the mount, a daemon that answers
    WAITING     the mount, no daemon; requests wait       the timer                      a delay: a new daemon
    REPLACING   the mount, a daemon that finishes         DaemonEnded                    FINISH_S: the daemon is killed
    STOPPING    unmounted for new opens; the daemon       ConnectionEnded                DRAIN_S: the connection is cut
                serves the files that are open
    CLOSING     no connection, a daemon that ends         DaemonEnded                    CLOSE_S: the daemon is killed
    ENDED       nothing

    phase                       event              next        actions
    NEW                         Mounted            STARTING    StartDaemon
    NEW                         MountRefused       ENDED       End(1)
    NEW                         Adopted            STARTING    Probe           its daemon may have said long ago that it
                                                                               is ready; where it has none, StartDaemon
    STARTING                    DaemonReady        SERVING     Probe
    STARTING, SERVING           ProbeAnswered      SERVING     Announce, the first time; the second one since the daemon
                                                               began says that it is well: `failures` is 0 again
    STARTING                    Timer              STARTING    KillDaemon
    SERVING                     ProbeOverdue       SERVING     KillDaemon      it hangs; the next one gets more patience
    STARTING, SERVING           DaemonEnded        WAITING     a timer that grows with `failures`
    … of a mount that never
      answered, and it said why DaemonEnded        ENDED       Unmount, End(1) the sentence is for whoever mounts
    WAITING                     Timer, Upgrade     STARTING    StartDaemon
    STARTING, SERVING           UpgradeAsked       REPLACING   FinishDaemon
    REPLACING                   DaemonEnded        STARTING    StartDaemon     no failure
    REPLACING                   Timer              REPLACING   KillDaemon
    any of a mount              StopAsked          STOPPING    Unmount; where there is no daemon, End
    STOPPING                    StopAsked, Timer   CLOSING     KillDaemon      files that are open still end here: the
    STOPPING                    DaemonEnded        ENDED       End             last descriptor ends the connection
    any of a mount, STOPPING    ConnectionEnded    CLOSING     Unmount, where it is still mounted: it was cut
    CLOSING                     DaemonEnded        ENDED       End
    CLOSING                     Timer              CLOSING     KillDaemon
    any                         SuccessorTookOver  ENDED       End(0)          mount and daemon are the successor's

Whoever unmounts from outside makes ConnectionEnded happen, at once or when the last open file is closed. Until then the
daemon is replaced as before: an open file is worth as much as a mount.

The rule: as long as the connection lives there is a daemon, or a timer after which one is started. Never two daemons:
each would have half of what is open.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

#: From a daemon's start until it says that it serves.
START_S = 60.0
#: A daemon that was asked to finish what is under way. It does not wait for reads that take long: its successor does.
FINISH_S = 60.0
#: Open files after an unmount that was asked for.
DRAIN_S = 10.0
#: A daemon whose connection has ended has nothing to do but to notice.
CLOSE_S = 5.0
#: With a request that finds no answer, until the daemon is taken for one that hangs; doubled each time, up to 16 times.
PATIENCE_S = 30.0
_MOST_PATIENCE = 16
#: Before a new daemon: the first one at once, for most ends have nothing to do with how often they come.
FIRST_DELAY_S, MOST_DELAY_S = 0.1, 10.0
#: So many daemons in a row that did not come to serve: requests fail until one does, so that nothing waits for good.
FAILURES_TO_REFUSE = 12


class Phase(enum.StrEnum):
    NEW = "new"
    STARTING = "starting"
    SERVING = "serving"
    WAITING = "waiting"
    REPLACING = "replacing"
    STOPPING = "stopping"
    CLOSING = "closing"
    ENDED = "ended"


# What happened.


@dataclass(frozen=True, slots=True)
class Mounted:
    """The mount is there, and nobody serves it."""


@dataclass(frozen=True, slots=True)
class MountRefused:
    sentence: str


@dataclass(frozen=True, slots=True)
class Adopted:
    """The mount is another supervisor's, who is gone; perhaps with its daemon. `is_established`: it once answered."""

    has_daemon: bool
    restarts: int
    is_established: bool


@dataclass(frozen=True, slots=True)
class DaemonReady:
    pass


@dataclass(frozen=True, slots=True)
class DaemonEnded:
    """The daemon is gone. `sentence` says how; `said` is its own last error, "" where it ended without a word."""

    sentence: str
    said: str = ""


@dataclass(frozen=True, slots=True)
class ProbeAnswered:
    """A request through the mount came back."""


@dataclass(frozen=True, slots=True)
class ProbeOverdue:
    """A request through the mount found no answer within `State.patience_s`."""


@dataclass(frozen=True, slots=True)
class TimerPassed:
    pass


@dataclass(frozen=True, slots=True)
class UpgradeAsked:
    pass


@dataclass(frozen=True, slots=True)
class StopAsked:
    pass


@dataclass(frozen=True, slots=True)
class ConnectionEnded:
    """The kernel has no more use for the connection, or somebody cut it: then `is_mounted`."""

    is_mounted: bool


@dataclass(frozen=True, slots=True)
class SuccessorTookOver:
    pass


Event = (
    Mounted
    | MountRefused
    | Adopted
    | DaemonReady
    | DaemonEnded
    | ProbeAnswered
    | ProbeOverdue
    | TimerPassed
    | UpgradeAsked
    | StopAsked
    | ConnectionEnded
    | SuccessorTookOver
)


# What to do.


@dataclass(frozen=True, slots=True)
class StartDaemon:
    pass


@dataclass(frozen=True, slots=True)
class FinishDaemon:
    """Ask it to finish what is under way, and to end."""


@dataclass(frozen=True, slots=True)
class KillDaemon:
    pass


@dataclass(frozen=True, slots=True)
class Probe:
    """Make a request through the mount now."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell whoever started the supervisor that the mount answers."""


@dataclass(frozen=True, slots=True)
class Unmount:
    """Take the mount away from where it is; files that are open stay."""


@dataclass(frozen=True, slots=True)
class End:
    """Leave, which lets go of the connection. With a sentence where the status is not 0."""

    status: int
    sentence: str = ""


Action = StartDaemon | FinishDaemon | KillDaemon | Probe | Announce | Unmount | End


@dataclass(frozen=True, slots=True)
class State:
    """Of one mount.

    Attributes:
        has_daemon: there is a process that serves, will serve or has served.
        timer_s: after so long `TimerPassed`, counted from the step that came to this state; None: never.
        failures: daemons in a row that ended without having been well.
        restarts: daemons that ended unasked, since the mount is there.
        probes: answered since the daemon began.
        patience_s: with a request before the daemon is taken for one that hangs; `usual_patience_s`: at first.
        refuse_after: so many `failures` until requests fail; 0: they wait for good.
        is_established: the mount once answered, so people may have files open in it.
        is_announced: whoever started the supervisor was told that the mount answers.
        reason: why there is no daemon, or was none last; "" where that never was.
        killed_for: why this daemon was killed from here; "" where it was not.
        ending: the status and sentence to end with.
    """

    phase: Phase = Phase.NEW
    has_daemon: bool = False
    timer_s: float | None = None
    failures: int = 0
    restarts: int = 0
    probes: int = 0
    patience_s: float = PATIENCE_S
    usual_patience_s: float = PATIENCE_S
    refuse_after: int = FAILURES_TO_REFUSE
    is_established: bool = False
    is_announced: bool = False
    reason: str = ""
    killed_for: str = ""
    ending: End = End(0)

    @property
    def is_probed(self) -> bool:
        """Whether requests through the mount should be made now and then, and their answers be waited for."""
        return self.phase is Phase.SERVING

    @property
    def refuses_requests(self) -> bool:
        """Whether requests should fail now: no daemon has come up for so long that waiting looks hopeless."""
        is_hopeless = 0 < self.refuse_after <= self.failures
        return self.phase is Phase.WAITING and self.is_established and is_hopeless


Step = tuple[State, tuple[Action, ...]]

_MOUNTED = (Phase.STARTING, Phase.SERVING, Phase.WAITING, Phase.REPLACING)


def handle(state: State, event: Event) -> Step:
    """The state after `event`, and what to do in that order.

    An event that means nothing in a phase, such as a timer that passed while its reason went away, changes nothing.
    """
    match event:
        case SuccessorTookOver() if state.phase is not Phase.ENDED:
            return replace(state, phase=Phase.ENDED, timer_s=None), (End(0),)
        case StopAsked() if state.phase in _MOUNTED and not state.has_daemon:
            return _closing(state, Unmount())
        case StopAsked() if state.phase in _MOUNTED:
            return replace(state, phase=Phase.STOPPING, timer_s=DRAIN_S), (Unmount(),)
        case StopAsked() if state.phase is Phase.NEW:
            return _ended(replace(state, ending=End(1, "stopped before it was mounted")))
        case ConnectionEnded(is_mounted) if state.phase in (*_MOUNTED, Phase.STOPPING):
            if is_mounted:
                cut = End(1, "the connection was cut while it was mounted: mount again")
                return _closing(replace(state, ending=cut), Unmount())
            return _closing(state)
    match state.phase:
        case Phase.NEW:
            return _new(state, event)
        case Phase.STARTING | Phase.SERVING:
            return _with_daemon(state, event)
        case Phase.WAITING:
            if isinstance(event, TimerPassed | UpgradeAsked):
                return _starting(state)
        case Phase.REPLACING:
            if isinstance(event, DaemonEnded):
                return _starting(replace(state, has_daemon=False))
            if isinstance(event, TimerPassed):
                return _killing(state, f"it did not finish within {FINISH_S:.0f} s")
        case Phase.STOPPING:
            if isinstance(event, StopAsked | TimerPassed):
                return _closing(state, KillDaemon())
            if isinstance(event, DaemonEnded):
                return _ended(replace(state, has_daemon=False))
        case Phase.CLOSING:
            if isinstance(event, DaemonEnded):
                return _ended(replace(state, has_daemon=False))
            if isinstance(event, TimerPassed):
                return replace(state, timer_s=CLOSE_S), (KillDaemon(),)
    return state, ()


def delay_s(failures: int) -> float:
    """How long to wait before the next daemon, after so many in a row that were never well."""
    return 0.0 if failures <= 1 else min(MOST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 2, 30))


def _new(state: State, event: Event) -> Step:
    match event:
        case Mounted():
            return _starting(state)
        case MountRefused(sentence):
            return _ended(replace(state, ending=End(1, sentence)))
        case Adopted(has_daemon, restarts, is_established):
            adopted = replace(state, restarts=restarts, is_established=is_established)
            if not has_daemon:
                return _starting(adopted)
            return replace(adopted, phase=Phase.STARTING, has_daemon=True, timer_s=START_S), (Probe(),)
    return state, ()


def _with_daemon(state: State, event: Event) -> Step:
    match event:
        case DaemonReady() if state.phase is Phase.STARTING:
            return replace(state, phase=Phase.SERVING, timer_s=None), (Probe(),)
        case ProbeAnswered():
            probes = state.probes + 1
            failures = 0 if probes > 1 else state.failures
            patience_s = state.usual_patience_s if probes > 1 else state.patience_s
            after = replace(
                state,
                phase=Phase.SERVING,
                timer_s=None,
                probes=probes,
                failures=failures,
                patience_s=patience_s,
                is_established=True,
                is_announced=True,
            )
            return after, () if state.is_announced else (Announce(),)
        case ProbeOverdue() if state.phase is Phase.SERVING:
            patience_s = min(_MOST_PATIENCE * state.usual_patience_s, 2 * state.patience_s)
            sentence = f"it answered no request for {state.patience_s:g} s"
            return _killing(replace(state, patience_s=patience_s), sentence)
        case TimerPassed() if state.phase is Phase.STARTING:
            return _killing(state, f"it was not ready within {START_S:.0f} s")
        case UpgradeAsked():
            return replace(state, phase=Phase.REPLACING, timer_s=FINISH_S), (FinishDaemon(),)
        case DaemonEnded(sentence, said):
            if said and not state.is_established:
                return _closing(replace(state, has_daemon=False, ending=End(1, said)), Unmount())
            failures = state.failures + 1
            sentence = state.killed_for or sentence
            waiting = replace(
                state,
                phase=Phase.WAITING,
                has_daemon=False,
                timer_s=delay_s(failures),
                failures=failures,
                restarts=state.restarts + 1,
                reason=f"{sentence}: {said}" if said else sentence,
            )
            return waiting, ()
    return state, ()


def _starting(state: State) -> Step:
    return replace(state, phase=Phase.STARTING, has_daemon=True, timer_s=START_S, probes=0, killed_for=""), (
        StartDaemon(),
    )


def _killing(state: State, reason: str) -> Step:
    # No second kill is needed: what was killed and does not end waits for the kernel, and so would the next one.
    return replace(state, timer_s=None, killed_for=reason), (KillDaemon(),)


def _closing(state: State, *actions: Action) -> Step:
    if not state.has_daemon:
        ended, end = _ended(state)
        return ended, (*(action for action in actions if not isinstance(action, KillDaemon)), *end)
    return replace(state, phase=Phase.CLOSING, timer_s=CLOSE_S), actions


def _ended(state: State) -> Step:
    return replace(state, phase=Phase.ENDED, timer_s=None), (state.ending,)
