"""The supervisor's state machine: its table line by line, and whatever order things happen in."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal_csi import states
from shoal_csi.states import Phase, State

SERVING = State(Phase.SERVING, has_daemon=True, is_established=True, is_announced=True, probes=2)
KILLED = states.DaemonEnded("killed by SIGKILL")


def test_first_daemon_is_announced_when_a_request_came_back() -> None:
    state, actions = states.handle(State(), states.Mounted())
    assert (state.phase, actions) == (Phase.STARTING, (states.StartDaemon(),))
    state, actions = states.handle(state, states.DaemonReady())
    assert (state.phase, state.timer_s, actions) == (Phase.SERVING, None, (states.Probe(),))
    state, actions = states.handle(state, states.ProbeAnswered())
    assert actions == (states.Announce(),)
    assert states.handle(state, states.ProbeAnswered())[1] == ()


def test_what_the_first_daemon_said_is_why_nothing_is_mounted() -> None:
    state = State(Phase.STARTING, has_daemon=True)
    state, actions = states.handle(state, states.DaemonEnded("exit code 1", "no dataset 'x'"))
    assert actions == (states.Unmount(), states.End(1, "no dataset 'x'"))
    assert state.phase is Phase.ENDED


def test_one_that_was_killed_before_it_served_is_replaced_all_the_same() -> None:
    state, actions = states.handle(State(Phase.STARTING, has_daemon=True), KILLED)
    assert (state.phase, state.timer_s, actions) == (Phase.WAITING, 0.0, ())


def test_delays_grow_while_no_daemon_is_well_and_begin_anew_after_one_was() -> None:
    state, delays = SERVING, []
    for _ in range(12):
        state, _ = states.handle(state, KILLED)
        delays.append(state.timer_s)
        state, actions = states.handle(state, states.TimerPassed())
        assert actions == (states.StartDaemon(),)
        state, _ = states.handle(state, states.DaemonReady())
        state, _ = states.handle(state, states.ProbeAnswered())  # one is not enough: it may end of the next request
    assert delays == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0]
    assert (state.restarts, state.reason) == (12, "killed by SIGKILL")
    state, _ = states.handle(state, states.ProbeAnswered())
    assert states.handle(state, KILLED)[0].timer_s == 0.0


def test_requests_are_refused_only_after_many_daemons_and_only_between_two() -> None:
    waiting = State(Phase.WAITING, is_established=True, timer_s=10.0, failures=states.FAILURES_TO_REFUSE)
    assert waiting.refuses_requests
    assert not replace(waiting, failures=states.FAILURES_TO_REFUSE - 1).refuses_requests
    assert not states.handle(waiting, states.TimerPassed())[0].refuses_requests


def test_a_daemon_that_hangs_is_killed_and_the_next_one_gets_more_patience() -> None:
    state, actions = states.handle(SERVING, states.ProbeOverdue())
    assert actions == (states.KillDaemon(),)
    state, _ = states.handle(state, KILLED)
    assert (state.phase, state.patience_s) == (Phase.WAITING, 2 * states.PATIENCE_S)
    assert state.reason == "it answered no request for 30 s"  # not that it was killed, which is known here
    state, _ = states.handle(state, states.TimerPassed())
    state, _ = states.handle(state, states.DaemonReady())
    for _ in range(2):
        state, _ = states.handle(state, states.ProbeAnswered())
    assert state.patience_s == states.PATIENCE_S


def test_an_upgrade_lets_the_old_one_finish_and_counts_as_no_failure() -> None:
    state, actions = states.handle(SERVING, states.UpgradeAsked())
    assert (state.phase, actions) == (Phase.REPLACING, (states.FinishDaemon(),))
    state, actions = states.handle(state, states.DaemonEnded("exit code 0"))
    assert (state.phase, state.failures, state.restarts, actions) == (Phase.STARTING, 0, 0, (states.StartDaemon(),))


def test_one_that_does_not_finish_is_killed() -> None:
    state, _ = states.handle(SERVING, states.UpgradeAsked())
    assert states.handle(state, states.TimerPassed())[1] == (states.KillDaemon(),)


def test_stopping_leaves_open_files_a_while() -> None:
    state, actions = states.handle(SERVING, states.StopAsked())
    assert (state.phase, state.timer_s, actions) == (Phase.STOPPING, states.DRAIN_S, (states.Unmount(),))
    closing, actions = states.handle(state, states.TimerPassed())
    assert (closing.phase, actions) == (Phase.CLOSING, (states.KillDaemon(),))
    assert states.handle(closing, KILLED)[1] == (states.End(0),)
    assert states.handle(state, states.DaemonEnded("exit code 0"))[1] == (states.End(0),)
    assert states.handle(state, states.StopAsked())[1] == (states.KillDaemon(),)


def test_stopping_without_a_daemon_waits_for_nothing() -> None:
    waiting = State(Phase.WAITING, is_established=True, timer_s=10.0)
    assert states.handle(waiting, states.StopAsked())[1] == (states.Unmount(), states.End(0))


def test_unmounted_from_outside_is_a_good_end_and_cut_is_not() -> None:
    for is_mounted, first, status in ((False, (), 0), (True, (states.Unmount(),), 1)):
        state, actions = states.handle(SERVING, states.ConnectionEnded(is_mounted))
        assert (state.phase, actions) == (Phase.CLOSING, first)
        state, (end,) = states.handle(state, states.DaemonEnded("exit code 0"))
        assert isinstance(end, states.End) and end.status == status


def test_a_successor_keeps_mount_and_daemon() -> None:
    state, actions = states.handle(SERVING, states.SuccessorTookOver())
    assert (state.phase, actions) == (Phase.ENDED, (states.End(0),))


def test_an_adopted_mount_is_probed_and_announced_and_kept_whatever_its_daemon_says() -> None:
    state, actions = states.handle(State(), states.Adopted(has_daemon=True, restarts=3, is_established=True))
    assert (state.phase, state.restarts, actions) == (Phase.STARTING, 3, (states.Probe(),))
    assert states.handle(state, states.ProbeAnswered())[1] == (states.Announce(),)
    assert states.handle(state, states.DaemonEnded("exit code 1", "no cluster"))[0].phase is Phase.WAITING
    state, actions = states.handle(State(), states.Adopted(has_daemon=False, restarts=3, is_established=True))
    assert (state.phase, actions) == (Phase.STARTING, (states.StartDaemon(),))


class Mount(RuleBasedStateMachine):
    """A mount whose daemon, kernel and users do what they like, against what the supervisor may never do."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.is_mounted = self.is_connected = self.has_daemon = False
        self.is_killed = self.was_stopped = self.is_handed_over = self.was_announced = False
        self.end: states.End | None = None

    def happened(self, event: states.Event) -> None:
        self.state, actions = states.handle(self.state, event)
        for action in actions:
            assert self.end is None, "nothing follows the end"
            match action:
                case states.StartDaemon():
                    assert not self.has_daemon, "two daemons"
                    assert self.is_connected and not self.was_stopped
                    self.has_daemon, self.is_killed = True, False
                case states.FinishDaemon():
                    assert self.has_daemon
                case states.KillDaemon():
                    assert self.has_daemon
                    self.is_killed = True
                case states.Unmount():
                    self.is_mounted = False
                case states.Announce():
                    assert self.has_daemon and not self.was_announced
                    self.was_announced = True
                case states.End():
                    assert self.is_handed_over or not (self.has_daemon or self.is_mounted)
                    self.end = action

    @precondition(lambda self: self.state.phase is Phase.NEW)
    @rule(event=st.sampled_from([states.Mounted(), states.Adopted(True, 3, True), states.Adopted(False, 0, False)]))
    def mounts(self, event: states.Mounted | states.Adopted) -> None:
        self.is_mounted = self.is_connected = True
        self.has_daemon = isinstance(event, states.Adopted) and event.has_daemon
        self.happened(event)

    @precondition(lambda self: self.has_daemon)
    @rule(said=st.sampled_from(["", "no cluster"]))
    def daemon_ends(self, said: str) -> None:
        self.has_daemon = False
        self.happened(states.DaemonEnded("ended", said))

    @precondition(lambda self: self.has_daemon and not self.is_killed)
    @rule(event=st.sampled_from([states.DaemonReady(), states.ProbeAnswered(), states.ProbeOverdue()]))
    def daemon_shows_itself(self, event: states.Event) -> None:
        self.happened(event)

    @precondition(lambda self: self.state.timer_s is not None)
    @rule()
    def time_passes(self) -> None:
        self.happened(states.TimerPassed())

    @rule()
    def upgrades(self) -> None:
        self.happened(states.UpgradeAsked())

    @rule()
    def stops(self) -> None:
        self.was_stopped = True
        self.happened(states.StopAsked())

    @precondition(lambda self: self.is_connected)
    @rule(is_cut=st.booleans())
    def connection_ends(self, is_cut: bool) -> None:
        self.is_connected = False
        self.is_mounted = self.is_mounted and is_cut
        self.happened(states.ConnectionEnded(self.is_mounted))

    @precondition(lambda self: self.is_mounted and self.end is None)
    @rule()
    def hands_over(self) -> None:
        self.is_handed_over = True
        self.happened(states.SuccessorTookOver())

    @invariant()
    def knows_whether_there_is_a_daemon(self) -> None:
        assert self.is_handed_over or self.state.has_daemon == self.has_daemon

    @invariant()
    def something_always_follows(self) -> None:
        """A daemon, a timer or the end: a mount for which nothing would ever be done again is one that hangs."""
        if self.end is None and self.state.phase is not Phase.NEW:
            assert self.has_daemon or self.state.timer_s is not None

    def teardown(self) -> None:
        """Stopped for good, it ends: within the timers and the ends of killed daemons alone."""
        if self.state.phase is Phase.NEW or self.is_handed_over:
            return
        self.stops()
        for _ in range(4):
            if self.end is None and self.is_killed and self.has_daemon:
                self.daemon_ends("")
            elif self.end is None and self.state.timer_s is not None:
                self.time_passes()
        assert self.end is not None, self.state


TestMount = Mount.TestCase
