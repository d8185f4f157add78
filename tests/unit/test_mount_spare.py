"""A daemon that waits for its turn says beforehand that it could not take over, or is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


_DAEMON = """
import sys
tries = iter(sys.argv[1])

def prepare(args):
    said = next(tries)
    print(said, flush=True)
    if said != "1":
        raise OSError("no files left")

def main():
    print("main", flush=True)
"""
_SPARE = "from shoal_csi import spare; spare.PREPARE_AGAIN_S = 0.0; spare.main('fake_daemon', [])"


def spare_of(tmp_path: Path, tries: str, said: bytes = b"") -> subprocess.Popen[bytes]:
    """A spare of a daemon whose attempts to prepare end so; `said` has been said to it before."""
    (tmp_path / "fake_daemon.py").write_text(_DAEMON)
    paths = Place.paths()
    paths["PYTHONPATH"] = f"{paths['PYTHONPATH']}{os.pathsep}{tmp_path}"
    command = [sys.executable, "-c", _SPARE, tries]
    waits_fd, go_fd = os.pipe()
    os.write(go_fd, said)
    spare = subprocess.Popen(command, env=paths, stdin=waits_fd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    os.close(waits_fd)
    spare.stdin = os.fdopen(go_fd, "wb")
    return spare


def test_a_spare_prepares_until_it_can(tmp_path: Path) -> None:
    spare = spare_of(tmp_path, "001")
    assert spare.stdout is not None
    assert [spare.stdout.readline() for _ in range(4)] == [b"0\n", b"0\n", b"1\n", b"loaded\n"]
    assert spare.communicate(b"g", timeout=20)[0] == b"main\n" and spare.returncode == 0


def test_who_is_to_serve_at_once_asks_nobody_before(tmp_path: Path) -> None:
    """The cluster may be away, and an attempt take as long as all that is left of a daemon's time to start."""
    spare = spare_of(tmp_path, "", b"g")
    assert spare.communicate(timeout=20)[0] == b"loaded\nmain\n" and spare.returncode == 0


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
