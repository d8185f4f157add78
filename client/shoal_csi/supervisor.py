"""The process that a mount lives in: it holds the connection, and sees to it that some daemon serves it.

    python -m shoal_csi.supervisor --mountpoint DIR --dataset NAME@SNAPSHOT [--subpath P] [--endpoint URL]

Says ``ready {json}`` on stdout when the mount answers; before that, ends with ``error: …`` where it cannot. Signals:
HUP puts a new daemon in the old one's place, unless it comes from a terminal that is gone; TERM and INT unmount (a
second one does not wait for open files). What happens when is `shoal_csi.states`; here it is done. Descriptors of the
connection, of the memory in which daemons leave what their successors need, and of the pipe on which they say ready are
in the daemon, too, so that the death of this process costs nothing: the daemon serves on, and the next supervisor takes
them from there (`shoal_csi.handover`). Against the death of both the descriptor store has them, where there is one.

It is small on purpose, and asks the kernel to look for memory elsewhere: what it holds is all that cannot be replaced.

The rule: this process never touches a path inside the mount. A request that nobody answers holds whoever made it, even
against a SIGKILL, and with it every descriptor that it has; so requests are made by a child that has none of them.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from shoal.errors import ShoalError
from shoal_csi import arrival, daemons, handover, kernel, places, refusing, rundir, states
from shoal_csi.arrival import Found, Options
from shoal_csi.daemons import DaemonProcess
from shoal_csi.deposits import Deposit
from shoal_csi.handover import Held
from shoal_csi.journal import Journal
from shoal_csi.mount_table import MountTable
from shoal_csi.probing import Probe
from shoal_csi.rundir import Record
from shoal_csi.states import Phase, State

DAEMON = "shoal_csi.daemon"
#: The kernel's out-of-memory killer takes us after nearly everything else; the daemon is as good a choice as any.
OOM_SCORE_ADJ = -900
#: Between two requests through the mount; the second one comes early, because it says that the daemon is well.
WATCH_S, SECOND_PROBE_S = 10.0, 0.5
#: Of these without an answer, the daemon hangs.
PATIENCE = 3


class Supervisor:
    """One mount's. `run` returns the status to end with.

    Args:
        found: its descriptors and lock are from now on this object's.
    """

    def __init__(self, found: Found, journal: Journal) -> None:
        self._options, self._claim, self._notes = found.options, found.claim, list(found.notes)
        self._fuse_fd, self._state_fd = found.held.fuse_fd, found.held.state_fd
        self._journal = journal
        self._deposit = Deposit(journal.say)
        patience_s = PATIENCE * found.options.watch
        self._state = State(patience_s=patience_s, usual_patience_s=patience_s, refuse_after=found.options.refuse_after)
        self._since = time.time()
        self._device = "" if found.record is None else found.record.device
        self._daemon: DaemonProcess | None = None
        self._spare: DaemonProcess | None = None
        self._wants_upgrade = False  # as soon as the spare, which is new, is loaded
        self._log_start = journal.size()
        self._deadline: float | None = None
        self._probe: Probe | None = None
        self._probe_at: float | None = None
        self._end: states.End | None = None
        self._successor: object = None
        self._poll = select.poll()
        self._wakeup = _signals()
        self._listener = handover.listen(self._claim.directory)
        self._poll.register(self._wakeup, select.POLLIN)
        self._poll.register(self._listener, select.POLLIN)
        self._mounts_fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll.register(self._mounts_fd, select.POLLPRI)  # proc(5): something was mounted or unmounted
        self._is_aside = self._comes_again = self._has_ended = False
        self._awaited: int | None = None  # what poll(2) waits for at the connection
        if found.record is not None and found.record.daemon is not None and found.held.ready_fd is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                self._daemon = self._watched(DaemonProcess.adopted(found.record.daemon, found.held.ready_fd))
                self._deposit.put(self._device, found.held)
        if found.spare is not None:
            self._spare = self._watched(found.spare)

    @property
    def has_daemon(self) -> bool:
        return self._daemon is not None

    # The loop.

    def run(self, *first: states.Event) -> int:
        """Do what follows from `first`, and from whatever happens then."""
        for event in first:
            self._happened(event)
        if self._end is None:
            self._look_at_the_mounts()  # nobody tells what was done before `_mounts_fd` was opened
        while self._end is None:
            ready = dict(self._poll.poll(self._patience_ms()))
            if ready:
                self._look(ready)
            else:  # only now: a process that was stopped itself for a while must hear first what happened meanwhile
                self._look_at_the_clock()
        if self._end.sentence:
            self._journal.fail(self._end.sentence)
        if self._successor is None:
            self._deposit.withdraw()  # what is still open in the mount ends with the last descriptor
        self._claim.release(forget=self._successor is None)
        return self._end.status

    def _look(self, ready: dict[int, int]) -> None:
        """Deal with one thing that happened. What else did is found again by the next poll(2), unless this undid it."""
        if self._mounts_fd in ready:  # but this, which poll(2) tells once
            self._look_at_the_mounts()
        if self._wakeup in ready:
            for number in os.read(self._wakeup, 64):
                self._journal.say(f"{signal.Signals(number).name} in phase {self._state.phase}")
                if number == signal.SIGHUP and not os.isatty(2):  # where it is one, that is gone
                    self._upgrade()
                else:
                    self._happened(states.StopAsked())
        elif self._daemon is not None and self._daemon.pidfd in ready:
            self._bury_daemon()
        elif self._spare is not None and self._spare.pidfd in ready:
            self._bury_spare()
            self._note()
        elif self._daemon is not None and self._daemon.ready_fd in ready:
            self._hear(self._daemon)
            if self._daemon.is_ready:
                self._happened(states.DaemonReady())
        elif self._spare is not None and self._spare.ready_fd in ready:
            self._hear(self._spare)
            if self._spare.is_loaded and self._wants_upgrade:
                self._wants_upgrade = False
                self._happened(states.UpgradeAsked())
            else:
                self._note()
        elif self._probe is not None and self._probe.pidfd in ready:
            self._end_probe()
        elif self._listener.fileno() in ready:
            self._hand_over()
        elif ready.get(self._fuse_fd, 0) & select.POLLERR:
            self._look_at_connection()
        elif self._state.refuses_requests and self._fuse_fd in ready:
            refusing.refuse(self._fuse_fd, comes_again=self._comes_again)
            self._look_at_the_clock()  # there may always be another one

    def _look_at_the_mounts(self) -> None:
        if not self._is_aside and not self._is_mounted():
            self._is_aside = True
            with contextlib.suppress(OSError):
                self._claim.move_aside()  # another mount may take the place, while files of this one are open
            self._await_connection()

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            self._happened(states.TimerPassed())
        if self._state.is_probed and self._probe is None and self._probe_at is not None and now >= self._probe_at:
            self._start_probe()
        if self._probe is not None and self._state.is_probed and now >= self._probe.since + self._state.patience_s:
            self._drop_probe()
            self._happened(states.ProbeOverdue())

    def _patience_ms(self) -> float | None:
        times = [self._deadline]
        if self._state.is_probed:
            times.append(self._probe_at if self._probe is None else self._probe.since + self._state.patience_s)
        known = [when for when in times if when is not None]
        return max(0.0, min(known) - time.monotonic()) * 1000 + 1 if known else None

    def _happened(self, event: states.Event) -> None:
        before = self._state
        self._state, actions = states.handle(before, event)
        if self._state == before and not isinstance(event, states.TimerPassed):
            return
        is_other = (self._state.phase, self._state.timer_s) != (before.phase, before.timer_s)
        if is_other or isinstance(event, states.TimerPassed):
            timer_s = self._state.timer_s
            self._deadline = None if timer_s is None else time.monotonic() + timer_s
        if self._state.phase is not before.phase:
            self._since = time.time()
            why = f": {self._state.reason}" if self._state.phase is Phase.WAITING else ""
            self._journal.say(f"{before.phase} -> {self._state.phase}{why}")
        if self._state.refuses_requests != before.refuses_requests:
            self._refuse(self._state.refuses_requests)
        self._await_connection()
        for action in actions:
            self._do(action)
        if self._end is None:
            self._note()

    def _await_connection(self) -> None:
        """Have poll(2) tell of the connection's end, and of requests that are to be refused.

        Not while a daemon serves the mount: its own end tells, or that it answers nothing, and each of its requests
        would wake this process, too.
        """
        is_served = self._state.has_daemon and self._state.phase in (Phase.STARTING, Phase.SERVING, Phase.REPLACING)
        is_told = self._has_ended or (is_served and not self._is_aside)
        awaited = None if is_told else select.POLLIN if self._state.refuses_requests else 0  # 0: POLLERR alone
        if awaited != self._awaited:
            if self._awaited is not None:
                self._poll.unregister(self._fuse_fd)
            if awaited is not None:
                self._poll.register(self._fuse_fd, awaited)
            self._awaited = awaited

    def _look_at_connection(self) -> None:
        poll = select.poll()
        poll.register(self._fuse_fd, 0)
        if poll.poll(0) and not self._has_ended:
            self._has_ended = True
            self._await_connection()
            self._happened(states.ConnectionEnded(is_mounted=self._is_mounted()))

    def _do(self, action: states.Action) -> None:
        match action:
            case states.StartDaemon():
                self._start_daemon()
            case states.FinishDaemon():
                if self._daemon is not None:
                    self._daemon.signal(signal.SIGTERM)
            case states.KillDaemon():
                if self._daemon is not None:
                    self._daemon.signal(signal.SIGKILL)
            case states.Probe():
                self._start_probe()
            case states.Announce():
                self._announce()
            case states.Unmount():
                self._unmount()
            case states.End():
                self._drop_probe()
                self._drop_spare()
                self._end = action

    # The daemon, and the one that is loaded in case.

    def _start_daemon(self) -> None:
        self._journal.shorten()
        self._log_start = self._journal.size()
        daemon, self._spare, self._wants_upgrade = self._spare, None, False
        if daemon is not None and not daemon.go():
            self._let_go_of(daemon)
            daemon = None
        try:
            daemon = daemon or self._watched(self._spawn())
        except OSError as error:  # no memory, no processes: as if it had ended at once
            self._happened(states.DaemonEnded(f"it could not be started: {error}"))
            return
        self._deposit.put(self._device, Held(self._fuse_fd, self._state_fd, daemon.ready_fd))
        daemon.go()
        self._daemon = daemon
        self._journal.say(f"daemon {daemon.known.pid} starts")

    def _spawn(self) -> DaemonProcess:
        module, args = self._options.daemon_module, self._options.daemon_args
        return DaemonProcess.spawn(module, args, self._fuse_fd, self._state_fd, oom_score_adj=_OOM_SCORE_ADJ_BEFORE)

    def _watched(self, daemon: DaemonProcess) -> DaemonProcess:
        self._poll.register(daemon.pidfd, select.POLLIN)
        self._poll.register(daemon.ready_fd, select.POLLIN)
        return daemon

    def _hear(self, daemon: DaemonProcess) -> None:
        if not daemon.hear():  # it closed its stdout, which it may
            self._poll.unregister(daemon.ready_fd)

    def _let_go_of(self, daemon: DaemonProcess) -> int | None:
        for fd in (daemon.pidfd, daemon.ready_fd):
            with contextlib.suppress(KeyError):
                self._poll.unregister(fd)
        return daemon.bury()

    def _bury_daemon(self) -> None:
        """The daemon is gone: let go of what was its own, and say how it ended."""
        assert self._daemon is not None
        daemon, self._daemon = self._daemon, None
        status = self._let_go_of(daemon)
        self._drop_probe()
        sentence = daemons.how(status)
        self._journal.say(f"daemon {daemon.known.pid} ended: {sentence}")
        is_said = status is not None and status > 0
        said = (self._journal.last_words(self._log_start) or f"it ended with {sentence}") if is_said else ""
        self._look_at_connection()
        self._happened(states.DaemonEnded(sentence, said))

    def _upgrade(self) -> None:
        """Load a new daemon, and put it in the old one's place once it is: one that does not load harms nobody."""
        self._drop_spare()
        if self._state.phase in (Phase.STARTING, Phase.SERVING):
            self._wants_upgrade = self._load_spare()
        else:
            self._happened(states.UpgradeAsked())

    def _load_spare(self) -> bool:
        """Whether one loads now."""
        try:
            self._spare = self._watched(self._spawn())
        except OSError as error:
            self._journal.say(f"no daemon can be loaded: {error}")
            return False
        return True

    def load_spare(self) -> bool:
        """Wait until a spare is loaded; whether it is."""
        start = self._journal.size()
        if not self._load_spare():
            return False
        assert self._spare is not None
        if not self._spare.wait_until_loaded(states.START_S):
            self._bury_spare()
            said = self._journal.last_words(start)
            self._notes.append(f"the installed daemon does not load, and the one that serves stays: {said}")
        return self._spare is not None

    def _bury_spare(self) -> None:
        """It ended before its turn."""
        assert self._spare is not None
        pid = self._spare.known.pid
        self._drop_spare()
        why = ", so the daemon that serves is not replaced" if self._wants_upgrade else ""
        self._wants_upgrade = False
        self._journal.say(f"spare daemon {pid} ended{why}")

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.signal(signal.SIGKILL)
            self._let_go_of(self._spare)
            self._spare = None

    # Requests through the mount.

    def _start_probe(self) -> None:
        if self._probe is not None or self._end is not None:
            return
        self._journal.shorten()  # a daemon may serve for months, and log a line for each read that fails
        try:
            self._probe = Probe(self._options.mountpoint)
        except OSError as error:  # no memory, no processes
            self._probe_at = time.monotonic() + SECOND_PROBE_S
            self._journal.say(f"the mount cannot be asked: {error}")
            return
        self._poll.register(self._probe.pidfd, select.POLLIN)

    def _end_probe(self) -> None:
        assert self._probe is not None
        is_answered = self._probe.finding().is_answer_of(self._device)
        self._drop_probe()
        is_early = self._state.probes == 0 or not is_answered
        self._probe_at = time.monotonic() + (
            min(SECOND_PROBE_S, self._options.watch) if is_early else self._options.watch
        )
        if is_answered:
            self._happened(states.ProbeAnswered())
            self._deposit.renew()
            is_well = self._state.phase is Phase.SERVING and self._state.failures == 0 and self._state.probes > 1
            if is_well and self._options.keeps_spare and self._spare is None:
                self._load_spare()
        else:
            self._look_at_connection()

    def _drop_probe(self) -> None:
        if self._probe is not None:
            self._poll.unregister(self._probe.pidfd)
            self._probe.close()
            self._probe = None

    def _refuse(self, is_on: bool) -> None:
        self._journal.say("requests fail until a daemon comes up" if is_on else "requests wait for the daemon")
        if is_on:
            self._comes_again = refusing.take_back(self._fuse_fd)

    # The mount.

    def _is_mounted(self) -> bool:
        return any(
            mount.device == self._device and mount.mountpoint == self._options.mountpoint
            for mount in MountTable.now().of_kind(kernel.FS_TYPE)
        )

    def _unmount(self) -> None:
        there = MountTable.now().at(self._options.mountpoint)
        if there is None or there.device != self._device:
            return  # somebody else did, or what is seen there is another's, mounted over ours
        try:
            kernel.unmount(self._options.mountpoint, lazy=False)
        except OSError as error:
            if error.errno != errno.EBUSY:
                self._journal.say(f"{self._options.mountpoint} is not unmounted: {error.strerror}")
                return
            with contextlib.suppress(OSError):  # somebody else did
                kernel.unmount(self._options.mountpoint, lazy=True)
            self._journal.say("files are open: the mount is detached, and they may be read on for a while")

    def mount(self) -> states.Event:
        """Mount, and say what came of it."""
        options = self._options
        try:
            kernel.mount(self._fuse_fd, options.mountpoint, f"shoal:{options.dataset}", allow_other=options.allow_other)
        except OSError as error:
            return states.MountRefused(places.refusal(options.mountpoint, error))
        made = MountTable.now().at(options.mountpoint)
        self._device = made.device if made is not None else ""
        return states.Mounted()

    # Others.

    def _announce(self) -> None:
        record = self._record()
        known = {
            "mountpoint": record.mountpoint,
            "dataset": record.dataset,
            "subpath": record.subpath,
            "supervisor_pid": record.supervisor_pid,
            "daemon_pid": None if record.daemon is None else record.daemon.pid,
            "log": record.log or None,
            "notes": self._notes,
        }
        text = {
            "ready": f"ready {json.dumps(known)}",
            "json": json.dumps(known, indent=2),
            "text": "\n".join([*self._notes, f"{record.dataset} is mounted at {record.mountpoint}; Ctrl-C unmounts"]),
        }
        with contextlib.suppress(OSError):  # nobody listens
            os.write(1, text[self._options.announce].encode() + b"\n")
        if self._options.background:
            os.dup2(0, 1)
            self._journal.let_go()

    def _note(self) -> None:
        try:
            self._claim.write(self._record())
        except OSError as error:  # a full disk, or somebody removed it: the mount needs no record
            self._journal.say(f"the record cannot be written: {error}")

    def _record(self) -> Record:
        options, state = self._options, self._state
        return Record(
            mountpoint=options.mountpoint,
            dataset=options.dataset,
            subpath=options.subpath,
            endpoint=options.endpoint,
            allow_other=options.allow_other,
            device=self._device,
            supervisor_pid=os.getpid(),
            daemon=None if self._daemon is None else self._daemon.known,
            spare_pid=self._spare.known.pid if self._spare is not None and self._spare.is_loaded else None,
            state=str(state.phase),
            restarts=state.restarts,
            failures=state.failures,
            reason=state.reason,
            is_established=state.is_established,
            since=self._since,
            log=self._journal.path,
            daemon_module=options.daemon_module,
            timeout_s=options.timeout,
            local_tier=options.local_tier,
            local_tier_size=options.local_tier_size,
            keeps_spare=options.keeps_spare,
            pid_namespace=rundir.namespace("pid"),
            mount_namespace=rundir.namespace("mnt"),
        )

    def _hand_over(self) -> None:
        can = self._state.phase in (Phase.STARTING, Phase.SERVING, Phase.WAITING)
        refusal = "" if can else f"it is {self._state.phase}"
        held = Held(self._fuse_fd, self._state_fd, None if self._daemon is None else self._daemon.ready_fd)
        self._successor = handover.give(self._listener, self._record(), held, self._finish_daemon, refusal=refusal)
        if self._successor is not None:
            self._journal.say("a successor took over")
            self._happened(states.SuccessorTookOver())

    def _finish_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.finish(states.FINISH_S)


def _signals() -> int:
    """A descriptor that gives the number of each signal that arrives."""
    reads, writes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reads


def _let_go() -> None:
    """Keep no file system busy, least of all the one that is mounted: by no directory and by no inherited file."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for name in ("PYTHONPATH", "SHOAL_RUN_DIR"):  # what is found by them here is found from elsewhere, too
        parts = [str(Path(part).absolute()) for part in os.environ.get(name, "").split(os.pathsep) if part]
        if parts:
            os.environ[name] = os.pathsep.join(parts)
    os.chdir("/")


def _spare_me() -> str:
    """Ask not to be killed for memory. Returns what a child should have instead."""
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    with contextlib.suppress(OSError):  # only root may ask for less
        own.write_text(str(OOM_SCORE_ADJ))
    return before


_OOM_SCORE_ADJ_BEFORE = "0"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Mount, supervise, and end with the process's status."""
    global _OOM_SCORE_ADJ_BEFORE
    parser = argparse.ArgumentParser(prog="python -m shoal_csi.supervisor", description=__doc__.partition("\n")[0])
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--dataset", default="", help="NAME@SNAPSHOT; of a mount that is taken over, its own")
    parser.add_argument("--subpath", default="")
    parser.add_argument("--endpoint", default="")
    parser.add_argument("--allow-other", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--take-over", action="store_true", help="of the supervisor that is there, then upgrade")
    parser.add_argument(
        "--background", action="store_true", help="log to a file; stdout and stderr only until it answers"
    )
    parser.add_argument("--announce", choices=["ready", "json", "text"], default="ready")
    spare_help = (
        "keep a loaded daemon for when the other one ends; by itself, unless a mount that is taken over has none"
    )
    parser.add_argument("--spare", action=argparse.BooleanOptionalAction, default=None, help=spare_help)
    parser.add_argument("--watch", type=float, default=WATCH_S, help="seconds between two requests through the mount")
    refuse_help = "daemons that may fail in a row until requests fail, too; 0: they wait for good"
    parser.add_argument("--refuse-after", type=int, default=states.FAILURES_TO_REFUSE, help=refuse_help)
    parser.add_argument("--local-tier", default="", help="an absolute path; of a mount that is taken over, its own")
    parser.add_argument("--local-tier-size", type=int, default=0, help="bytes")
    parser.add_argument("--daemon-module", default=DAEMON)
    timeout_help = "seconds that one read may take; 0: what the daemon takes by itself"
    parser.add_argument("--timeout", type=float, default=0.0, help=timeout_help)
    raw = parser.parse_args(argv)
    journal = Journal(mount=raw.mountpoint)
    try:
        options = Options(**vars(raw) | {"mountpoint": rundir.canonical(raw.mountpoint)})
        if not options.dataset and not options.take_over:
            parser.error("--dataset is missing")
        _let_go()
        if options.background:
            journal.to_file(options.mountpoint)
        found = arrival.prepare(options, journal)
    except ShoalError as error:
        journal.fail(str(error))
        raise SystemExit(1) from None
    _OOM_SCORE_ADJ_BEFORE = _spare_me()
    supervisor = Supervisor(found, journal)
    if found.event is None:
        raise SystemExit(supervisor.run(supervisor.mount()))
    event = replace(found.event, has_daemon=supervisor.has_daemon)
    is_upgrade = options.take_over and event.has_daemon and supervisor.load_spare()
    raise SystemExit(supervisor.run(event, *([states.UpgradeAsked()] if is_upgrade else [])))


if __name__ == "__main__":
    main()
