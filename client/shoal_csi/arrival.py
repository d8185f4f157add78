"""How a supervisor comes to its mount: it finds the place free, takes over what is there, or clears what is left.

    what is at the mount point                     what is done
    nothing                                        the directory is checked; `Found.event` is None: mount
    a supervisor that lives                        refused; with ``--take-over`` it hands over
    a mount whose supervisor died, its daemon      taken over with the daemon; where another dataset is wanted it is
    lives                                          detached, and the daemon serves the files that are open
    … in another container, where it cannot be     refused: there would be two daemons
    seen from here
    a mount whose daemon died, too                 taken over from the descriptor store; where that does not have it, or
                                                   another dataset is wanted, detached
    a mount of another run directory that lives,
    or of another type                             refused

The rule: nothing that answers somebody is taken away, but where the same place is asked for and nobody keeps it.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.errors import ShoalError
from shoal_csi import deposits, handover, kernel, places, rundir, states
from shoal_csi.daemons import DaemonProcess
from shoal_csi.handover import Held
from shoal_csi.journal import Journal
from shoal_csi.mount_table import MountTable
from shoal_csi.rundir import Claim, Record


@dataclass(frozen=True, slots=True)
class Options:
    """What to mount where; see `rundir.Record`."""

    mountpoint: str
    dataset: str
    subpath: str
    endpoint: str
    allow_other: bool
    take_over: bool
    background: bool
    announce: str
    spare: bool | None
    watch: float
    refuse_after: int
    daemon_module: str
    timeout: float
    local_tier: str
    local_tier_size: int

    @property
    def keeps_spare(self) -> bool:
        return self.spare is not False

    @property
    def daemon_args(self) -> list[str]:
        """What a daemon is told besides its descriptors."""
        args = ["--dataset", self.dataset]
        args += ["--subpath", self.subpath] if self.subpath else []
        args += ["--endpoint", self.endpoint] if self.endpoint else []
        args += ["--timeout", f"{self.timeout:g}"] if self.timeout else []
        if self.local_tier:
            args += ["--local-tier", self.local_tier, "--local-tier-size", str(self.local_tier_size)]
        return args


@dataclass(frozen=True, slots=True)
class Found:
    """What a supervisor begins with.

    Attributes:
        record: of a mount that is there; None: it has yet to be made.
        event: what has happened to it; None with `record`.
        notes: what was found and repaired, for people.
        spare: a daemon that is loaded, for the place of one that could only be ended by who started it.
    """

    options: Options
    claim: Claim
    held: Held
    record: Record | None
    event: states.Adopted | None
    notes: tuple[str, ...]
    spare: DaemonProcess | None = None


def prepare(options: Options, journal: Journal) -> Found:
    """Claim the mount point and its connection.

    Raises:
        ShoalError: the place cannot have a mount, with the sentence for people.
    """
    claim = rundir.claim(options.mountpoint)
    if claim is None:
        return _from_supervisor(options, journal)
    try:
        return _without_supervisor(options, claim, journal)
    except BaseException:  # interrupted too: a place that is not served is free for the next one
        claim.release(forget=MountTable.now().at(options.mountpoint) is None)
        raise


def _from_supervisor(options: Options, journal: Journal) -> Found:
    directory = rundir.directory_of(options.mountpoint)
    before = rundir.read(directory)
    if not options.take_over:
        what = before.dataset if before is not None else "a dataset that is just being mounted"
        raise ShoalError(
            f"{options.mountpoint} is already a mount, of {what}: unmount it with 'shoal umount {options.mountpoint}'"
        )
    spare = _loaded(options, directory, journal) if before is not None and not before.is_of_here else None
    record, held = handover.ask(directory)
    claim = rundir.claim(options.mountpoint, within_s=handover.ANSWER_S)
    if claim is None:
        raise ShoalError(f"the supervisor of {options.mountpoint} handed over, but another one was faster")
    note = f"took {options.mountpoint} over from the supervisor that was there"
    return replace(_adopted(options, claim, held, record, note), spare=spare)


def _loaded(options: Options, directory: Path, journal: Journal) -> DaemonProcess:
    """A daemon that waits for its turn, which comes when the one that serves has ended.

    Raises:
        ShoalError: none loads, which is better known before anything is ended.
    """
    record, held = handover.ask(directory, is_look=True)
    start = journal.size()
    try:
        spare = DaemonProcess.spawn(
            options.daemon_module, _as_recorded(options, record).daemon_args, held.fuse_fd, held.state_fd, None
        )
    except OSError as error:
        raise ShoalError(f"no daemon can be started: {error.strerror}; the one that serves stays") from error
    finally:
        held.close()  # the daemon has its own
    if not spare.wait_until_loaded(states.START_S):
        spare.signal(signal.SIGKILL)
        spare.bury()
        raise ShoalError(
            f"the installed daemon does not load, and the one that serves stays: {journal.last_words(start)}"
        )
    return spare


def _without_supervisor(options: Options, claim: Claim, journal: Journal) -> Found:
    record = rundir.read(claim.directory)
    there = MountTable.now().at(options.mountpoint)
    notes = []
    if there is not None:
        if there.kind != kernel.FS_TYPE:
            raise ShoalError(f"{options.mountpoint} is already a mount, of type {there.kind}: name another directory")
        if record is not None and record.device != there.device:
            record = None
        held = None if record is None or not _is_wanted(record, options) else _of_orphan(record, journal)
        if record is not None and held is not None:
            is_served = held.ready_fd is not None
            rest = "with its daemon" if is_served else "from the descriptor store, for its daemon was dead, too"
            note = f"the supervisor of {options.mountpoint} was dead: took the mount over {rest}"
            return _adopted(options, claim, held, record, note)
        if not options.take_over:
            notes.append(places.detach_stale(there, record))
    if options.take_over:  # what is there stays, whatever it is
        raise ShoalError(
            f"no mount of Shoal's can be taken over at {options.mountpoint}: 'shoal mount' lists those that live"
        )
    places.check(options.mountpoint)
    held = Held(places.open_device(), os.memfd_create("shoal-mount"), None)
    return Found(options, claim, held, None, None, tuple(notes))


def _is_wanted(record: Record, options: Options) -> bool:
    return options.take_over or (record.dataset, record.subpath) == (options.dataset, options.subpath)


def _of_orphan(record: Record, journal: Journal) -> Held | None:
    """Raises ShoalError: it has a daemon that could neither be ended nor seen to end."""
    daemon = record.living_daemon
    if daemon is not None:
        try:
            return handover.from_daemon(daemon)
        except OSError as error:
            journal.say(f"the descriptors of daemon {daemon.pid} cannot be taken: {error}")
    held = deposits.fetch(record.device)
    if held is not None and held.ready_fd is not None and daemon is None:
        raise ShoalError(
            f"the supervisor of {record.mountpoint} is dead, and its daemon serves on in another container: it can be "
            "taken over when that ends"
        )
    return held


def _as_recorded(options: Options, record: Record) -> Options:
    return replace(
        options,
        dataset=record.dataset,
        subpath=record.subpath,
        endpoint=options.endpoint or record.endpoint,
        local_tier=options.local_tier or record.local_tier,
        local_tier_size=options.local_tier_size if options.local_tier else record.local_tier_size,
        allow_other=record.allow_other,
        timeout=options.timeout or record.timeout_s,
        spare=record.keeps_spare if options.spare is None else options.spare,
    )


def _adopted(options: Options, claim: Claim, held: Held, record: Record, note: str) -> Found:
    event = states.Adopted(held.ready_fd is not None, record.restarts, record.is_established)
    return Found(_as_recorded(options, record), claim, held, record, event, (note,))
