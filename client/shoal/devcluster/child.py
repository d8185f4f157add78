"""Runs a server module in a process that dies with its parent.

    python -m shoal.devcluster.child PARENT_PID MODULE ARG…

A cluster on a laptop must not outlive whoever started it, not even where that one is killed with -9. The kernel sees to
it once the child asks; asking here rather than between fork and exec keeps Python code out of a forked copy of a
threaded process.

The rule: the request is made before the server's first line runs.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, module: str, args: list[str]) -> None:
    """Become `module`, run as ``python -m`` does, for as long as `parent_pid` lives. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        return  # the parent died before the request was made
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
