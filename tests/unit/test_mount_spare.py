"""A daemon that waits for its turn says beforehand that it could not take over, or is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shoal.datasets import DatasetRecord
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
            [
                *(sys.executable, "-m", "shoal_csi.spare", "shoal_csi.daemon"),
                *("--fd", "0", "--state-fd", str(state_fd), "--dataset", "set"),
            ],
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


def test_what_is_pinned_is_read_without_a_change() -> None:
    state_fd = os.memfd_create("state")
    try:
        assert State.pinned_in(state_fd) is None
        state = State(state_fd)
        assert state.pinned is None and State.pinned_in(state_fd) is None
        record = DatasetRecord("set", "s3://bucket/set", "", 1 << 20, 1, "12", ("12",), 1, 10)
        state.pin(record, "12")
        before = os.pread(state_fd, 1 << 16, 0)
        assert State.pinned_in(state_fd) == state.pinned
        found = state.pinned
        assert found is not None and found[0].name == "set" and found[1] == "12"
        assert os.pread(state_fd, 1 << 16, 0) == before
    finally:
        os.close(state_fd)
