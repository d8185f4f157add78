"""This machine's mounts, for whoever did not mount them: what there is, who uses one, and how one goes away.

    python -m shoal_csi.mounts list                          JSON, one document
    python -m shoal_csi.mounts unmount MOUNTPOINT [--lazy]   JSON: what was done
    python -m shoal_csi.mounts recover [--under DIR]         JSON: what was done for mounts whose supervisor died
    python -m shoal_csi.mounts take-over [--under DIR]       JSON: what was done for mounts of other containers

Unmounting asks the kernel, not the supervisor: it works where nobody is left, and whoever is notices.

The rule: a mount that answers is never taken from under its users unless they say so; one that does not, always is.
"""

from __future__ import annotations

import argparse
import errno
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shoal.errors import ShoalError
from shoal_csi import deposits, fdstore, kernel, numbers, places, probing, rundir, sockets
from shoal_csi.mount_table import Mount, MountTable
from shoal_csi.rundir import Record
from shoal_csi.states import Phase

#: Of a mount: phases of one that has a supervisor, and what others are in.
STATES = (*map(str, Phase), "detached", "unsupervised", "kept", "dead", "unknown")
#: A probe of the supervisor's, or a look of somebody's, makes a mount busy for a moment.
_BUSY_WITHIN_S, _AGAIN_S = 1.0, 0.05
#: For supervisor and daemon to end once there is nothing to serve.
GONE_WITHIN_S, ORPHAN_WITHIN_S = 15.0, 5.0
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has something of a mount open."""

    pid: int
    name: str
    what: str


def listed() -> list[dict[str, Any]]:
    """Every mount of Shoal's on this machine, as JSON: those known here, and those that only the kernel knows."""
    mounted = MountTable.now().of_kind(kernel.FS_TYPE)
    attached = {mount.device: mount for mount in mounted if mount.root == "/"}
    known, deposited = [], deposits.states()
    for directory, record in rundir.records():
        is_mounted = any(m.device == record.device and m.mountpoint == record.mountpoint for m in mounted)
        has_supervisor = rundir.has_supervisor(directory)
        if not is_mounted and not has_supervisor:
            continue  # the leftovers of a supervisor that was killed after its mount was gone
        attached.pop(record.device, None)
        kept = deposited.get(record.device, "")
        known.append(_json(record, is_mounted=is_mounted, has_supervisor=has_supervisor, kept=kept))
    strangers = [_stranger(mount) for mount in attached.values()]
    return sorted(known + strangers, key=lambda mount: str(mount["mountpoint"]))


def unmount(mountpoint: str, *, lazy: bool) -> dict[str, Any]:
    """Unmount, and wait until nobody serves it any more; with `lazy` only until it is no longer there.

    A mount that is also seen elsewhere, by a bind mount or in another mount namespace, is served on for that.

    Raises:
        ShoalError: it is no mount of Shoal's; it is in use, with by whom; it may not be unmounted.
    """
    path = rundir.canonical(mountpoint)
    there = MountTable.now().at(path)
    if there is None:
        raise ShoalError(f"nothing is mounted at {path}: 'shoal mount' lists what is")
    if there.kind != kernel.FS_TYPE:
        raise ShoalError(f"{path} is not a mount of Shoal's but of type {there.kind}: use umount(8)")
    directory = rundir.directory_of(path)
    record = rundir.read(directory)
    if record is not None and record.device != there.device:
        record = None
    # Asked before: one whose mount is seen elsewhere, too, lives on, and is no longer found by this name.
    is_supervised = rundir.has_supervisor(directory)
    how, is_cut_off = "unmounted", False
    try:
        _unmount_soon(path, lazy=lazy)
        how = "detached" if lazy else how
    except OSError as error:
        if error.errno != errno.EBUSY:
            places.force_away(path, is_alive=True)  # raises for the same reason, in words
        else:
            if probing.ask(path, places.DEAD_AFTER_S).is_answer_of(there.device):
                raise ShoalError(_busy(path, there.device)) from None
            places.force_away(path, is_alive=False)
            how, is_cut_off = "cut off, because it did not answer", True
    if not lazy and is_supervised:
        _wait_while(lambda: rundir.has_supervisor(directory), GONE_WITHIN_S)
    elif not lazy and record is not None:
        _end_orphan(directory, record, is_cut_off=is_cut_off)
    if not is_supervised and (record is None or record.living_daemon is None):
        deposits.withdraw(there.device)  # what is open in it would wait for nobody
    return {"mountpoint": path, "source": there.source, "how": how}


def recover(*, under: str = "") -> list[dict[str, Any]]:
    """Give each mount whose supervisor died a new one, or take it away where nobody is left who could go on with it.

    For whatever runs first on a machine, or again. A supervisor started here outlives this process.

    Args:
        under: only what is mounted in this directory; "" for all.
    """
    done = []
    deposited = deposits.states()
    for directory, record in _records(under):
        if rundir.has_supervisor(directory):
            continue
        there = MountTable.now().at(record.mountpoint)
        kept = deposited.get(record.device)
        if there is None or there.device != record.device:
            deposits.withdraw(record.device)
            rundir.forget(directory)
        elif record.living_daemon is not None or kept == fdstore.WAITING:
            done.append(_supervise(record))
        elif kept is None:
            done.append({"mountpoint": record.mountpoint, "how": places.detach_stale(there, record)})
    return done


def revive(*, under: str = "") -> list[dict[str, Any]]:
    """As `recover`, for mounts that only the descriptor store keeps; nothing is taken away."""
    waiting = {device for device, state in deposits.states().items() if state == fdstore.WAITING}
    return [
        _supervise(record)
        for directory, record in (_records(under) if waiting else ())
        if record.device in waiting and record.living_daemon is None and not rundir.has_supervisor(directory)
    ]


def take_over(*, under: str = "") -> list[dict[str, Any]]:
    """Start supervisors here for mounts whose supervisors are in other containers, which hand over and end.

    For a container that is to replace those. No reader notices more than a short wait.
    """
    own = rundir.namespace("mnt")
    return [
        _supervise(record, "--take-over")
        for directory, record in _records(under)
        if record.mount_namespace not in (0, own) and rundir.has_supervisor(directory)
    ]


def _records(under: str) -> Iterator[tuple[Path, Record]]:
    for directory, record in rundir.records():
        if not under or record.mountpoint.startswith(under.rstrip("/") + "/"):
            yield directory, record


def holders(mountpoint: str, device: str) -> Iterator[Holder]:
    """Processes that have a file, a directory or a mapping of a mount open, as far as this process may look.

    Nothing in the mount is touched: the kernel tells names and devices.
    """
    for process in sorted((p for p in Path("/proc").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)):
        try:
            what = _what_is_held(process, mountpoint, device)
            if what:
                yield Holder(int(process.name), (process / "comm").read_text().strip(), what)
        except OSError:
            continue  # it ended, or is not ours to look at


def _what_is_held(process: Path, mountpoint: str, device: str) -> str:
    def is_inside(path: str) -> bool:
        return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")

    for name, what in (("cwd", "its working directory"), ("root", "its root"), ("exe", "its program")):
        if is_inside(str((process / name).readlink())):
            return what
    for fd in (process / "fd").iterdir():
        link = str(fd.readlink())
        if is_inside(link):
            return link
    major, _, minor = device.partition(":")
    number = f" {int(major):02x}:{int(minor):02x} "
    mapped = [line for line in (process / "maps").read_text("utf-8", "replace").splitlines() if number in line]
    return f"a mapping of {mapped[0][73:]}" if mapped else ""


def _busy(path: str, device: str) -> str:
    found = list(holders(path, device))
    named = ", ".join(f"{holder.pid} ({holder.name}: {holder.what})" for holder in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    who = f"by process {named}{more}" if found else "by processes that cannot be seen from here"
    return f"{path} is in use {who}: end them, or detach it with 'shoal umount --lazy {path}', which lets them read on"


def _unmount_soon(path: str, *, lazy: bool) -> None:
    deadline = time.monotonic() + _BUSY_WITHIN_S
    while True:
        try:
            return kernel.unmount(path, lazy=lazy)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(_AGAIN_S)


def _end_orphan(directory: Path, record: Record, *, is_cut_off: bool) -> None:
    """Wait for the daemon of a mount that nobody supervised; kill it where it hangs.

    One that does not end and does not hang serves the same mount elsewhere.
    """
    daemon = record.living_daemon
    if daemon is not None:
        _wait_while(lambda: daemon.is_running, ORPHAN_WITHIN_S)
        if is_cut_off or rundir.is_stopped(daemon.pid):
            places.kill_orphan(record)
            _wait_while(lambda: daemon.is_running, ORPHAN_WITHIN_S)
    rundir.forget(directory)


def _wait_while(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while condition() and time.monotonic() < deadline:
        time.sleep(_AGAIN_S)


def _json(record: Record, *, is_mounted: bool, has_supervisor: bool, kept: str) -> dict[str, Any]:
    daemon = record.living_daemon
    supervised = record.state if is_mounted else "detached"
    unsupervised = "unsupervised" if daemon is not None or kept == fdstore.SERVED else "kept" if kept else "dead"
    name, _, snapshot = record.dataset.partition("@")
    return {
        "mountpoint": record.mountpoint,
        "dataset": name,
        "snapshot": snapshot or None,
        "subpath": record.subpath,
        "state": supervised if has_supervisor else unsupervised,
        "since": record.since,
        "restarts": record.restarts,
        "failures": record.failures,
        "reason": record.reason or None,
        "supervisor_pid": record.supervisor_pid if has_supervisor else None,
        "daemon_pid": None if daemon is None else daemon.pid,
        "spare_pid": record.spare_pid if has_supervisor else None,
        "log": record.log or None,
        "numbers": numbers.read(record),
    }


def _stranger(mount: Mount) -> dict[str, Any]:
    name, _, snapshot = mount.source.removeprefix("shoal:").partition("@")
    return {
        "mountpoint": mount.mountpoint,
        "dataset": name,
        "snapshot": snapshot or None,
        "subpath": None,
        "state": "unknown",
        "since": None,
        "restarts": None,
        "failures": None,
        "reason": f"it is not in {sockets.root()}: mounted under another run directory, or as another user",
        "supervisor_pid": None,
        "daemon_pid": None,
        "spare_pid": None,
        "log": None,
        "numbers": None,
    }


def _supervise(record: Record, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal_csi.supervisor", "--mountpoint", record.mountpoint]
    command += [] if record.allow_other else ["--no-allow-other"]  # where it has to be mounted anew
    command += ["--dataset", record.dataset, "--subpath", record.subpath, "--endpoint", record.endpoint]
    command += ["--daemon-module", record.daemon_module, "--background", *words]
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    how = "is taken over from another container" if words else "has a new supervisor"
    return {"mountpoint": record.mountpoint, "how": how}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Do one thing, and print what came of it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m shoal_csi.mounts", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    for name in ("recover", "take-over"):
        commands.add_parser(name).add_argument("--under", default="", metavar="DIR")
    away = commands.add_parser("unmount")
    away.add_argument("mountpoint")
    away.add_argument("--lazy", action="store_true")
    raw = parser.parse_args(argv)
    try:
        if raw.command == "unmount":
            document: object = unmount(raw.mountpoint, lazy=raw.lazy)
        elif raw.command == "recover":
            document = recover(under=raw.under)
        else:
            document = take_over(under=raw.under) if raw.command == "take-over" else listed()
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(json.dumps(document))
    raise SystemExit(0)


if __name__ == "__main__":
    main()
