"""``shoal mount`` and ``shoal umount``: a dataset as a directory of this machine.

What mounts, serves and unmounts are programs of their own (`shoal_csi.supervisor`, `shoal_csi.mounts`): a mount lives
longer than the command that made it.

The rule: a command returns when what it says is so: mounted means that the mount answers, unmounted that nobody serves
it any more.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

import shoal
from shoal import datasets
from shoal.cli import connect, files, output
from shoal.errors import InvalidRequest, NotFound, ShoalError

#: From the command's start until the mount answers.
MOUNT_WITHIN_S = 90.0
STOP_WITHIN_S = 15.0

EXAMPLES = """\b
Examples:
  shoal mount flights /mnt/flights
  shoal mount flights@3f9a /mnt/flights --subpath 2013
  shoal mount flights /mnt/flights --foreground
  shoal mount flights /mnt/flights --local-tier /nvme/shoal-tier --local-tier-size 100GiB
  shoal mount                                      # what is mounted
  shoal mount --upgrade /mnt/flights               # newly installed programs, files stay open
"""

Json = dict[str, Any]


@click.command(epilog=EXAMPLES)
@click.argument("words", nargs=-1, metavar="[NAME[@SNAPSHOT] MOUNTPOINT]")
@click.option("--subpath", default="", metavar="PATH", help="Mount this directory of the dataset.")
@click.option("--foreground", is_flag=True, help="Stay, with the log on stderr; Ctrl-C unmounts.")
@click.option("--allow-other/--no-allow-other", default=True, help="Let users other than this one read.")
@click.option("--local-tier", metavar="DIR", help="Keep objects that other nodes have here, for faster reads.")
@click.option("--local-tier-size", type=output.SizeType(), metavar="SIZE", help="What DIR may hold, such as 100GiB.")
@click.option("--upgrade", is_flag=True, help="Put new processes in the place of those that serve MOUNTPOINT.")
@click.option(
    "--spare/--no-spare",
    default=None,
    help="Keep a second process loaded, for a short wait when one ends; default: yes, or what an upgraded mount has.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="What one read may take, second tries included, before its reader gets ETIMEDOUT; 300 unless given.",
)
@click.option("--daemon-module", default="", hidden=True)
@connect.endpoint_option
@output.json_option
def mount(
    words: tuple[str, ...],
    subpath: str,
    foreground: bool,
    allow_other: bool,
    local_tier: str | None,
    local_tier_size: int | None,
    upgrade: bool,
    spare: bool | None,
    timeout: float | None,
    daemon_module: str,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Mount a dataset, read-only, at an empty directory; without arguments list what is mounted.

    Takes root, and /dev/fuse. The mount stays until 'shoal umount'; a process that serves it and ends is replaced.
    """
    if not words and not upgrade:
        return _list(as_json)
    if len(words) != (1 if upgrade else 2):
        raise click.UsageError(
            "give MOUNTPOINT alone" if upgrade else "give NAME[@SNAPSHOT] and MOUNTPOINT, or nothing"
        )
    command = [sys.executable, "-m", "shoal_csi.supervisor", "--mountpoint", words[-1]]
    command += [] if spare is None else ["--spare" if spare else "--no-spare"]
    command += ["--timeout", str(timeout)] if timeout is not None else []
    command += ["--daemon-module", daemon_module] if daemon_module else []
    command += ["--endpoint", endpoint] if endpoint else []
    command += _tier_words(local_tier, local_tier_size)
    if upgrade:
        command += ["--take-over"]
    else:
        root, inside = _resolve(words[0], subpath, endpoint)
        command += ["--dataset", root, "--subpath", inside]
        command += [] if allow_other else ["--no-allow-other"]
    if foreground:
        command += ["--announce", "json" if as_json else "text"]
        os.execve(command[0], command, _environment())
    said = _start([*command, "--background"], is_new=not upgrade)
    for note in said["notes"]:
        output.remark(note)
    if as_json:
        output.document(said)
    else:
        output.data(f"shoal://{said['dataset']} is mounted at {said['mountpoint']}")
        output.remark(f"'shoal umount {said['mountpoint']}' unmounts it; log {said['log']}")
    return None


def _tier_words(directory: str | None, size_bytes: int | None) -> list[str]:
    if directory is None and size_bytes is None:
        return []
    if not directory or size_bytes is None:
        raise click.UsageError("give --local-tier and --local-tier-size together, or neither")
    return ["--local-tier", str(Path(directory).resolve()), "--local-tier-size", str(size_bytes)]


UMOUNT_EXAMPLES = """\b
Examples:
  shoal umount /mnt/flights
  shoal umount --lazy /mnt/flights                 # files that are open in it may be read on
"""


@click.command(epilog=UMOUNT_EXAMPLES)
@click.argument("mountpoint")
@click.option("--lazy", is_flag=True, help="Also where files in it are open: they may be read on.")
@output.json_option
def umount(mountpoint: str, lazy: bool, as_json: bool) -> None:
    """Unmount a dataset. Where it is in use, says by whom; where it does not answer, cuts it off."""
    said = _ask_mounts("unmount", *(["--lazy"] if lazy else []), "--", mountpoint)
    if as_json:
        output.document(said)
    else:
        output.data(f"{said['mountpoint']}: {said['how']}")


def _resolve(name: str, subpath: str, endpoint: str | None) -> tuple[str, str]:
    """``NAME@DIGEST`` and the directory in it: pinned here, so that every daemon of the mount serves the same.

    Raises:
        ShoalError: there is no such dataset, snapshot or directory, or no cluster.
    """
    parsed = datasets.parse_path(files.path_of(name))
    if parsed.path:
        raise InvalidRequest(f"{name} names something in a dataset: write {parsed.root} and --subpath {parsed.path}")
    pinned, _ = files.filesystem(endpoint).locate(parsed.root)
    root, inside = f"{parsed.dataset}@{pinned.snapshot.digest}", subpath.strip("/")
    if not pinned.snapshot.is_dir(inside):
        raise NotFound(f"{inside!r} is no directory of {root}: 'shoal ls shoal://{root}' lists what is there")
    return root, inside


# The programs.


def _start(command: Sequence[str], *, is_new: bool) -> Json:
    """Start a supervisor, and return what it says when the mount answers.

    Args:
        is_new: of a mount that nobody uses yet: it is taken away again where it does not answer, or where this command
            is interrupted. One that was there before stays, and its new supervisor goes on.

    Raises:
        ShoalError: it ended before that, with its own sentence, or took too long.
    """
    process = subprocess.Popen(
        command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with _stopped_unless_done(process) as done:
        assert process.stdout is not None and process.stderr is not None
        if not is_new:
            done.append(True)
        try:
            line = _line_within(process.stdout, MOUNT_WITHIN_S)
        except TimeoutError as error:
            rest = "and was taken away again" if is_new else "and is worked on: 'shoal mount' says how it fares"
            raise ShoalError(f"the mount did not answer within {MOUNT_WITHIN_S:.0f} s, {rest}") from error
        if line.startswith(b"ready "):
            done.append(True)
            return json.loads(line.removeprefix(b"ready "))  # type: ignore[no-any-return]
        if line:
            raise ShoalError(f"the mount's supervisor said {line.decode()!r}: is it of another version?")
        raise ShoalError(_sentence(process.stderr.read()) or "the mount's supervisor ended without a word")


@contextmanager
def _stopped_unless_done(process: subprocess.Popen[bytes]) -> Iterator[list[bool]]:
    done: list[bool] = []
    try:
        yield done
    finally:
        if done:
            process.returncode = 0  # it lives on; Python need not warn of that
        else:
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _line_within(stream: IO[bytes], within_s: float) -> bytes:
    """The first line; b"" where the stream ends without one. Raises TimeoutError: neither came."""
    deadline, heard = time.monotonic() + within_s, b""
    while not heard.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        more = os.read(stream.fileno(), 1 << 16)
        if not more:
            return b""
        heard += more
    return heard


def listed(*, timeout_s: float | None = None) -> list[Json]:
    """This machine's mounts, as ``shoal mount --json`` prints them.

    Raises:
        ShoalError: they cannot be listed, or not in time.
    """
    known: list[Json] = _ask_mounts("list", timeout_s=timeout_s)
    return known


def _ask_mounts(*words: str, timeout_s: float | None = None) -> Any:
    """What ``python -m shoal_csi.mounts`` says. Raises ShoalError with its sentence."""
    command = [sys.executable, "-m", "shoal_csi.mounts", *words]
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise ShoalError(f"{' '.join(command)} did not answer within {timeout_s:g} s") from error
    if done.returncode:
        raise ShoalError(_sentence(done.stderr) or f"{' '.join(command)} failed")
    return json.loads(done.stdout)


def _sentence(stderr: bytes) -> str:
    """The last ``error:`` line, else the last line."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def _environment() -> Mapping[str, str]:
    """This process's, in which the programs are found also where they are not installed."""
    assert shoal.__file__ is not None
    root = str(Path(shoal.__file__).parent.parent)
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([*path, root]))}


# The list.

_COLUMNS = ("MOUNTPOINT", "DATASET", "SNAPSHOT", "SUBPATH", "STATE", "RESTARTS>")


def _list(as_json: bool) -> None:
    known = listed()
    if as_json:
        output.document(known)
    elif known:
        output.data(output.table(_COLUMNS, map(_row, known)))
        for each in known:
            if each["reason"] and each["state"] != "serving":
                output.remark(f"{each['mountpoint']}: {each['reason']}")
    else:
        output.remark("nothing is mounted: 'shoal mount NAME MOUNTPOINT' mounts a dataset")


def _row(each: Json) -> tuple[str, ...]:
    restarts = "-" if each["restarts"] is None else str(each["restarts"])
    snapshot = (each["snapshot"] or "-")[:8]
    return each["mountpoint"], each["dataset"], snapshot, each["subpath"] or "-", each["state"], restarts
