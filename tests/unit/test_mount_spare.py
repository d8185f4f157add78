"""A daemon that waits for its turn says beforehand that it could not take over, or is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shoal_csi import state_head
from shoal_csi.state import State
from tests.support.mounting import Place


@pytest.mark.parametrize(("version", "said"), [(state_head.VERSION, ""), (9, "a newer Shoal"), (0, "an older Shoal")])
def test_the_real_daemon_looks_at_the_state_first(monkeypatch: pytest.MonkeyPatch, version: int, said: str) -> None:
    state_fd = os.memfd_create("state")
    try:
        monkeypatch.setattr(state_head, "VERSION", version)
        State(state_fd)  # a server of that version
        before = os.pread(state_fd, 1 << 16, 0)
        done = subprocess.run(
            [sys.executable, "-m", "shoal_csi.spare", "shoal_csi.daemon", "--state-fd", str(state_fd)],
            env=Place.paths(),
            stdin=subprocess.DEVNULL,  # its turn never comes
            capture_output=True,
            pass_fds=(state_fd,),
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == ((1, "") if said else (0, "loaded\n"))
        assert said in done.stderr and done.stderr.startswith("error: " if said else "")
        assert os.pread(state_fd, 1 << 16, 0) == before
    finally:
        os.close(state_fd)
