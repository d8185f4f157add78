"""Starting and ending a FUSE mount that a program serves in the foreground.

The rule: after the block nothing is mounted and the program has ended, whatever happened inside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Missing

START_TIMEOUT_S = 30.0


def require(program: str) -> str:
    """The path of `program`, where this machine has it and FUSE too."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Missing("/dev/fuse is not there or not ours to use")
    if shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        raise Missing("fusermount3 is not installed")
    found = shutil.which(program)
    if found is None:
        raise Missing(f"{program} is not installed")
    return found


@contextlib.contextmanager
def mounted(command: Sequence[str], point: Path, env: Mapping[str, str], log: Path) -> Iterator[int]:
    """Run `command`, which mounts on `point`; yields its process id."""
    point.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not point.is_mount():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace").splitlines()[-3:]
                raise Missing(f"{Path(command[0]).name} did not mount: {' / '.join(tail)}")
            time.sleep(0.02)
        yield process.pid
    finally:
        unmount = shutil.which("fusermount3") or "fusermount"
        for arguments in (["-u"], ["-u", "-z"]):  # lazily where something still holds a file
            if not os.path.ismount(point):
                break
            subprocess.run([unmount, *arguments, str(point)], capture_output=True, check=False)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
