"""How a supervisor comes to its mount: it finds the place free, takes over what is there, or clears what is left.

    what is at the mount point                     what is done
    nothing                                        the directory is checked; `Found.event` is None: mount
    a supervisor that lives                        refused; with ``--take-over`` it hands over
    a mount whose supervisor died, its daemon      taken over with the daemon; where another dataset is wanted it is
    lives                                          detached, and the daemon serves the files that are open
    a mount whose daemon died, too                 detached
    a mount of another run directory that lives,
    or of another type                             refused

The rule: nothing that answers somebody is taken away, but where the same place is asked for and nobody keeps it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from shoal.errors import ShoalError
from shoal_csi import handover, kernel, places, rundir, states
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
    spare: bool
    watch: float
    refuse_after: int
    daemon_module: str
    timeout: float
    local_tier: str
    local_tier_size: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a supervisor begins with.

    Attributes:
        record: of a mount that is there; None: it has yet to be made.
        event: what has happened to it; None with `record`.
        notes: what was found and repaired, for people.
    """

    options: Options
    claim: Claim
    held: Held
    record: Record | None
    event: states.Adopted | None
    notes: tuple[str, ...]


def prepare(options: Options, journal: Journal) -> Found:
    """Claim the mount point and its connection.

    Raises:
        ShoalError: the place cannot have a mount, with the sentence for people.
    """
    claim = rundir.claim(options.mountpoint)
    if claim is None:
        return _from_supervisor(options)
    try:
        return _without_supervisor(options, claim, journal)
    except BaseException:
        claim.release(forget=MountTable.now().at(options.mountpoint) is None)
        raise


def _from_supervisor(options: Options) -> Found:
    directory = rundir.directory_of(options.mountpoint)
    before = rundir.read(directory)
    if not options.take_over:
        what = before.dataset if before is not None else "a dataset that is just being mounted"
        raise ShoalError(
            f"{options.mountpoint} is already a mount, of {what}: unmount it with 'shoal umount {options.mountpoint}'"
        )
    record, held = handover.ask(directory)
    claim = rundir.claim(options.mountpoint, within_s=handover.ANSWER_S)
    if claim is None:
        raise ShoalError(f"the supervisor of {options.mountpoint} handed over, but another one was faster")
    return _adopted(options, claim, held, record, f"took {options.mountpoint} over from the supervisor that was there")


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
            note = f"the supervisor of {options.mountpoint} was dead: took the mount over with its daemon"
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
    if record.daemon is None or not record.daemon.is_running:
        return None
    try:
        return handover.from_daemon(record.daemon)
    except OSError as error:
        journal.say(f"the descriptors of daemon {record.daemon.pid} cannot be taken: {error}")
        return None


def _adopted(options: Options, claim: Claim, held: Held, record: Record, note: str) -> Found:
    options = replace(
        options,
        dataset=record.dataset,
        subpath=record.subpath,
        endpoint=options.endpoint or record.endpoint,
        local_tier=options.local_tier or record.local_tier,
        local_tier_size=options.local_tier_size if options.local_tier else record.local_tier_size,
        allow_other=record.allow_other,
        timeout=options.timeout or record.timeout_s,
    )
    event = states.Adopted(held.ready_fd is not None, record.restarts, record.is_established)
    return Found(options, claim, held, record, event, (note,))
