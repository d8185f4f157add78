"""The supervisor of a mount and its daemon, killed at every step: the mount goes on, or is gone.

The daemon is a small one of these tests (`tests.support.fuse_stand_in`); that of `test_mount_daemon_killed.py` is real.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from shoal_csi import journal, kernel, rundir
from shoal_csi.mount_table import MountTable
from tests.support import fuse_stand_in
from tests.support.mounting import STAND_IN, Place, wants_fuse
from tests.support.processes import Child, Say, is_stopped, stopped
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.long, wants_fuse]  # its processes take minutes of two cores

FIRST = fuse_stand_in.content(0)


@pytest.fixture
def place() -> Iterator[Place]:
    with Place() as place:
        yield place


def read(place: Place, number: int = 0) -> bytes:
    """A file's bytes, read by a process that may be killed where it hangs."""

    def run(say: Say) -> bytes:
        return Path(place.mountpoint, f"f{number}").read_bytes()

    with Child(run) as child:
        return bytes(child.heard())


@contextmanager
def opened(place: Place, number: int) -> Iterator[int]:
    """A descriptor of this process, which may outlive the mount: then the kernel says so when it is closed."""
    fd = os.open(Path(place.mountpoint, f"f{number}"), os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def test_what_supervises_is_light() -> None:
    """What it imports it holds for as long as the mount lives."""
    code = (
        "import sys, shoal_csi.supervisor; print(*{'pyarrow', 'grpc', 'numpy', 'click', 'fsspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=Place.paths(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_mounts_serves_and_is_gone_when_it_was_told_to(place: Place) -> None:
    supervisor = place.mount()
    assert sorted(path.name for path in Path(place.mountpoint).iterdir()) == [f"f{i}" for i in range(8)]
    assert read(place, 3) == fuse_stand_in.content(3)
    (listed,) = place.listed()
    assert (listed["dataset"], listed["snapshot"], listed["state"]) == ("set", "1234", "serving")
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    assert not place.is_mounted() and place.processes() == [] and place.listed() == []
    assert [path.suffix for path in place.run_dir.iterdir()] == [".log"]


def test_it_is_spared_when_memory_is_short_and_its_daemon_is_not(place: Place) -> None:
    """Where it may ask for that, which takes CAP_SYS_RESOURCE."""

    def score(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    ask = "import pathlib; pathlib.Path('/proc/self/oom_score_adj').write_text('-900')"
    may_ask = not subprocess.run([sys.executable, "-c", ask], capture_output=True, check=False).returncode
    supervisor = place.mount()
    assert score(supervisor.pid) == (-900 if may_ask else score("self"))
    assert score(place.daemon_pid) == score("self")


# The daemon ends.


@pytest.mark.parametrize("step", ["start", "init", "loaded"])
def test_first_daemon_killed_while_it_starts(place: Place, step: str) -> None:
    """After the mount and before it serves: nothing is told until one answers."""
    (place.steps / f"once-{step}").touch()
    place.mount()
    assert read(place) == FIRST
    assert place.record.restarts == 1 and "SIGKILL" in place.record.reason


@pytest.mark.parametrize("step", ["start", "loaded", "read"])
def test_daemon_killed_and_its_successor_at_a_step(place: Place, step: str) -> None:
    """Who reads meanwhile waits, also the one whose request had been taken."""
    place.mount()
    with opened(place, 1) as fd:
        (place.steps / f"once-{step}").touch()
        place.kill_daemon()
        assert os.pread(fd, 1000, 5) == fuse_stand_in.content(1)[5:1005]
    assert place.wait_for_state("serving", restarts=2).restarts == 2


def test_daemon_killed_again_and_again_while_files_are_read(place: Place) -> None:
    place.mount()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [read(place, i % 8) == fuse_stand_in.content(i % 8) for i in range(40)])
        kills = 0
        while not reading.done():
            wait_for(partial(_is_well, place, kills))
            place.kill_daemon()
            kills += 1
        assert all(reading.result()) and kills > 1


def _is_well(place: Place, restarts: int) -> bool:
    record = place.record
    return (record.state, record.restarts, record.failures) == ("serving", restarts, 0)


def test_what_the_first_daemon_says_is_why_there_is_no_mount(place: Place) -> None:
    (place.steps / "say").write_text("there is no dataset 'set'")
    supervisor = place.supervise()
    out, err = supervisor.communicate(timeout=20)
    assert (supervisor.returncode, out, err) == (1, "", "error: there is no dataset 'set'\n")
    assert not place.is_mounted() and place.processes() == []


def test_daemons_that_fail_for_long_make_requests_fail_until_one_comes_up(place: Place) -> None:
    place.mount("--refuse-after", "3")
    (place.steps / "say").write_text("no cluster")
    place.kill_daemon()
    with pytest.raises(AssertionError, match=os.strerror(errno.EIO)):
        read(place)
    assert place.record.reason.endswith("no cluster")
    (place.steps / "say").unlink()
    place.wait_for_state("serving")
    assert read(place) == FIRST


def test_unmounted_while_requests_fail(place: Place) -> None:
    supervisor = place.mount("--refuse-after", "1", "--no-spare")
    (place.steps / "say").write_text("no cluster")
    place.kill_daemon()
    wait_for(lambda: "requests fail" in place.log())
    assert place.unmount().returncode == 0
    assert supervisor.wait(20) == 0
    assert place.processes() == []


def test_run_directory_removed_under_a_mount(place: Place) -> None:
    place.mount()
    record = place.record
    wait_for(lambda: _is_removed(place.run_dir))
    assert record.daemon is not None
    os.kill(record.daemon.pid, signal.SIGKILL)
    assert read(place) == FIRST


def test_the_log_of_a_daemon_that_serves_on_stays_short(place: Place) -> None:
    """It may lie in memory, and a daemon that has much to say of failing reads may live for months."""
    place.mount("--watch", "0.2")
    (log,) = place.run_dir.glob("*.log")
    with log.open("ab") as file:
        file.write(b"a read failed\n" * (2 * journal.MOST_BYTES // 14))
    wait_for(lambda: log.stat().st_size < journal.MOST_BYTES)
    before = log.with_name(f"{log.name}.1").stat()
    assert (before.st_size, before.st_mode & 0o777) == (journal.MOST_BYTES, 0o600)
    assert place.record.restarts == 0


def test_a_file_that_somebody_gave_for_the_log_is_theirs(tmp_path: Path) -> None:
    given = tmp_path / "log"
    given.write_bytes(b"x" * (journal.MOST_BYTES + 1))
    with given.open("ab") as file:
        code = "from shoal_csi.journal import Journal; Journal().shorten()"
        subprocess.run([sys.executable, "-c", code], env=Place.paths(), stderr=file, check=True)
    assert given.stat().st_size == journal.MOST_BYTES + 1


def test_the_first_mount_of_a_machine_does_not_shut_local_readers_out(tmp_path: Path) -> None:
    """The node's socket is in the run directory, too, for everybody."""
    run_dir = tmp_path / "run" / "shoal"
    environment = Place.paths() | {"SHOAL_RUN_DIR": str(run_dir)}
    code = "from shoal_csi.journal import Journal; Journal().to_file('/mnt')"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, umask=0o022)
    assert run_dir.stat().st_mode & 0o777 == 0o755
    assert [path.stat().st_mode & 0o777 for path in run_dir.iterdir()] == [0o600]


def _is_removed(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)  # where something is just being written, the next time
    return not directory.exists()


def test_daemon_that_answers_no_request_is_replaced(place: Place) -> None:
    place.mount("--watch", "0.3")
    place.kill_daemon(number=signal.SIGSTOP)
    assert read(place) == FIRST
    assert place.record.restarts == 1 and "it answered no request for 0.9 s" in place.record.reason


# An upgrade.


def test_upgrade_in_place(place: Place) -> None:
    supervisor = place.mount()
    before = place.daemon_pid
    with opened(place, 1) as fd:
        supervisor.send_signal(signal.SIGHUP)
        wait_for(lambda: place.record.daemon is not None and place.daemon_pid != before)
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    assert place.wait_for_state("serving").restarts == 0


def test_upgrade_to_a_daemon_that_does_not_load_leaves_the_old_one(place: Place) -> None:
    """A broken installation is found out before anything is ended for it."""
    supervisor = place.mount()
    before = place.daemon_pid
    place.wait_for_spare()
    (place.steps / "broken").touch()
    supervisor.send_signal(signal.SIGHUP)
    wait_for(lambda: "the daemon that serves is not replaced" in place.log())
    assert place.daemon_pid == before and read(place) == FIRST


def test_a_spare_daemon_waits_while_another_one_serves_and_ends_with_the_supervisor(place: Place) -> None:
    supervisor = place.mount()
    waiting = place.wait_for_spare()
    place.kill_daemon()
    assert read(place) == FIRST and place.daemon_pid == waiting
    waiting = place.wait_for_spare()
    os.kill(waiting, signal.SIGKILL)  # which is nothing to the mount
    wait_for(lambda: place.record.spare_pid != waiting)
    assert place.wait_for_state("serving").restarts == 1
    assert read(place) == FIRST
    supervisor.kill()
    wait_for(lambda: place.processes() == [place.daemon_pid])


def test_without_a_spare(place: Place) -> None:
    supervisor = place.mount("--no-spare")
    before = place.daemon_pid
    wait_for(lambda: place.record.failures == 0)
    wait_for(lambda: {*place.processes()} == {supervisor.pid, before})
    place.kill_daemon()
    assert read(place) == FIRST and place.daemon_pid != before
    supervisor.kill()
    supervisor.wait()
    successor = place.mount("--take-over")
    assert read(place) == FIRST and place.record.supervisor_pid == successor.pid
    assert not place.record.keeps_spare, "who takes it over keeps none either"


def test_daemon_killed_while_it_is_being_replaced(place: Place) -> None:
    supervisor = place.mount()
    before = place.daemon_pid
    with stopped(before):
        supervisor.send_signal(signal.SIGHUP)
        place.wait_for_state("replacing")
        os.kill(before, signal.SIGKILL)
        assert read(place) == FIRST
    assert place.daemon_pid != before


def test_newly_installed_supervisor_takes_over_from_the_one_that_is_there(place: Place) -> None:
    old = place.mount()
    before = place.daemon_pid
    with opened(place, 1) as fd:
        said = place.ready(place.supervise("--take-over"))
        assert old.wait(20) == 0
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    assert said["supervisor_pid"] != old.pid and said["daemon_pid"] != before
    assert place.unmount().returncode == 0
    wait_for(lambda: place.processes() == [])


def test_an_upgrade_whose_command_is_interrupted_leaves_the_mount(place: Place) -> None:
    """A new daemon that does not come up, as while the cluster is upgraded too, costs time and nothing else."""
    place.mount()
    before = place.record.supervisor_pid
    (place.steps / "say").write_text("no cluster")
    words = ["mount", "--upgrade", place.mountpoint, "--daemon-module", STAND_IN]
    with subprocess.Popen([sys.executable, "-m", "shoal.cli", *words], env=place.environment) as command:
        wait_for(lambda: place.record.supervisor_pid != before and place.record.failures > 0)
        command.send_signal(signal.SIGINT)
        assert command.wait(20) != 0
    (place.steps / "say").unlink()
    assert read(place) == FIRST
    place.wait_for_state("serving")


#: A process that may not take descriptors from others.
UNABLE = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace")


def test_an_upgrade_that_cannot_have_the_descriptors_leaves_the_mount(place: Place) -> None:
    place.mount().kill()
    words = ("--mountpoint", place.mountpoint, "--take-over", "--background")
    command = [*UNABLE, sys.executable, "-m", "shoal_csi.supervisor", *words]
    done = subprocess.run(command, env=place.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "can be taken over" in done.stderr, done
    assert read(place) == FIRST


def test_what_is_mounted_anew_is_as_private_as_before(place: Place) -> None:
    place.mount("--no-allow-other").kill()
    command = [*UNABLE, sys.executable, "-m", "shoal_csi.mounts", "recover"]
    subprocess.run(command, env=place.environment, check=True)
    wait_for(lambda: len(place.listed()) == 1 and place.listed()[0]["state"] == "serving")
    (line,) = (line for line in Path("/proc/mounts").read_text().splitlines() if place.mountpoint in line)
    assert "default_permissions" in line and "allow_other" not in line


# It is unmounted.


def test_a_terminal_that_is_gone_ends_a_mount_in_its_foreground(place: Place) -> None:
    master, terminal = os.openpty()
    words = ["--mountpoint", place.mountpoint, "--dataset", "set@1234", "--daemon-module", STAND_IN]
    command = [sys.executable, "-m", "shoal_csi.supervisor", *words]
    with subprocess.Popen(
        command, env=place.environment, stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as process:
        place.ready(process)
        process.send_signal(signal.SIGHUP)
        assert process.wait(20) == 0
    os.close(master)
    os.close(terminal)
    assert not place.is_mounted() and place.processes() == []


def test_daemon_killed_while_files_are_open_after_the_unmount(place: Place) -> None:
    supervisor = place.mount()
    with opened(place, 1) as fd:
        supervisor.terminate()
        place.wait_for_state("stopping")
        assert not place.is_mounted()
        assert os.pread(fd, 10, 0) == fuse_stand_in.content(1)[:10]
        place.kill_daemon()
        assert supervisor.wait(20) == 0
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.pread(fd, 10, 0)


def test_told_twice_it_does_not_wait_for_open_files(place: Place) -> None:
    supervisor = place.mount()
    with opened(place, 1):
        supervisor.terminate()
        place.wait_for_state("stopping")
        supervisor.terminate()
        assert supervisor.wait(9) == 0  # which is less than it waits by itself


def test_unmounted_by_somebody_else(place: Place) -> None:
    supervisor = place.mount()
    wait_for(lambda: _is_unmounted(place))
    assert supervisor.wait(20) == 0
    assert place.processes() == []


def _is_unmounted(place: Place) -> bool:
    kernel.unmount(place.mountpoint, lazy=False)  # a request of the supervisor's own makes it busy for a moment
    return True


def test_detached_by_somebody_else_and_mounted_anew_while_a_file_is_open(place: Place) -> None:
    first = place.mount()
    with opened(place, 1) as fd:
        kernel.unmount(place.mountpoint, lazy=True)
        wait_for(lambda: any("-" in path.name for path in place.run_dir.iterdir()))
        second = place.mount()
        assert sorted(each["state"] for each in place.listed()) == ["detached", "serving"]
        os.kill(_daemon_of(place, first.pid), signal.SIGKILL)
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    assert first.wait(20) == 0
    assert second.poll() is None and read(place) == FIRST


def test_detached_at_the_moment_at_which_the_daemon_ends(place: Place) -> None:
    """The kernel tells once of what is mounted or unmounted."""
    supervisor = place.mount()
    with opened(place, 1) as fd:
        with stopped(supervisor.pid):
            place.kill_daemon()
            kernel.unmount(place.mountpoint, lazy=True)
        wait_for(lambda: any("-" in path.name for path in place.run_dir.iterdir()))
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    assert supervisor.wait(20) == 0


def test_what_is_mounted_over_it_is_left_alone(place: Place) -> None:
    supervisor = place.mount()
    subprocess.run(["mount", "-t", "tmpfs", "over", place.mountpoint], check=True)
    supervisor.terminate()
    place.wait_for_state("stopping")
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    there = MountTable.now().at(place.mountpoint)
    assert there is not None and there.kind == "tmpfs"


def _daemon_of(place: Place, supervisor_pid: int) -> int:
    (pid,) = (each["daemon_pid"] for each in place.listed() if each["supervisor_pid"] == supervisor_pid)
    return int(pid)


def test_connection_cut_by_somebody(place: Place) -> None:
    """Where that leaves a dead mount, it is taken away."""
    supervisor = place.mount()
    with opened(place, 1), pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        kernel.unmount(place.mountpoint, lazy=False, force=True)
    assert supervisor.wait(20) == 1
    assert not place.is_mounted() and place.processes() == []


def test_connection_cut_while_the_daemon_is_stopped(place: Place) -> None:
    """It does not notice, so the supervisor's next request through the mount tells."""
    supervisor = place.mount("--watch", "0.3")
    with opened(place, 1):
        place.kill_daemon(number=signal.SIGSTOP)
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
            kernel.unmount(place.mountpoint, lazy=False, force=True)
        assert supervisor.wait(20) == 1
    assert not place.is_mounted() and place.processes() == []


def test_unmount_says_who_is_in_the_way_and_lazily_lets_them_be(place: Place) -> None:
    supervisor = place.mount()
    with opened(place, 1) as fd:
        refused = place.unmount()
        assert refused.returncode == 1 and refused.stderr.startswith("error: ")
        assert f"{os.getpid()} (" in refused.stderr and "/m/f1" in refused.stderr and "--lazy" in refused.stderr
        assert place.is_mounted()
        assert place.unmount("--lazy").returncode == 0
        assert not place.is_mounted()
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    assert supervisor.wait(20) == 0
    assert "nothing is mounted" in place.unmount().stderr


def test_unmounted_where_it_is_seen_elsewhere_it_is_served_on(place: Place) -> None:
    supervisor = place.mount()
    daemon = place.daemon_pid
    elsewhere = place.directory / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", place.mountpoint, elsewhere], check=True)
    try:
        assert place.unmount().returncode == 0
        assert not place.is_mounted()
        assert supervisor.poll() is None and daemon in place.processes()
        assert (elsewhere / "f0").read_bytes() == FIRST
    finally:
        kernel.unmount(str(elsewhere), lazy=True)
    assert supervisor.wait(20) == 0
    assert place.processes() == []


# The supervisor ends.


def test_supervisor_killed_while_it_serves(place: Place) -> None:
    """Readers notice nothing; the next one takes the mount over with the daemon, and replaces that as before."""
    place.mount().kill()
    daemon = place.daemon_pid
    assert read(place) == FIRST
    (listed,) = place.listed()
    assert (listed["state"], listed["supervisor_pid"], listed["daemon_pid"]) == ("unsupervised", None, daemon)
    with opened(place, 1) as fd:
        said = place.ready(place.supervise())
        assert said["daemon_pid"] == daemon and "was dead: took the mount over" in said["notes"][0]
        place.kill_daemon()
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    assert place.wait_for_state("serving").restarts == 1


def test_supervisor_killed_while_its_daemon_is_stopped(place: Place) -> None:
    """The kernel hangs up those of a session that are stopped when nobody is left there to let them go on: so a daemon
    has a session of its own."""
    supervisor = place.mount()
    with stopped(place.daemon_pid):
        supervisor.kill()
        supervisor.wait(20)
        assert is_stopped(place.daemon_pid)
    assert read(place) == FIRST


@pytest.mark.parametrize("step", ["start", "init", "loaded"])
def test_supervisor_killed_while_its_daemon_starts(place: Place, step: str) -> None:
    (place.steps / f"stop-{step}").touch()
    supervisor = place.supervise()
    place.wait_for_record()
    wait_for(lambda: is_stopped(place.daemon_pid))
    supervisor.kill()
    place.kill_daemon(number=signal.SIGCONT)
    place.mount()
    assert read(place) == FIRST


def test_supervisor_killed_and_then_its_daemon(place: Place) -> None:
    """The last descriptor is gone: the kernel says so to readers, and the next mount clears it away."""
    place.mount().kill()
    place.kill_daemon()
    with pytest.raises(AssertionError, match=os.strerror(errno.ENOTCONN)):
        read(place)
    assert place.listed()[0]["state"] == "dead"
    said = place.ready(place.supervise())
    assert "whose daemon was gone" in said["notes"][0]
    assert read(place) == FIRST and len(place.listed()) == 1


@pytest.mark.parametrize("how", ["lives", "killed", "stopped", "stopped-while-it-reads"])
def test_unmount_without_a_supervisor(place: Place, how: str) -> None:
    place.mount().kill()
    with ThreadPoolExecutor(1) as pool:
        if how == "killed":
            place.kill_daemon()
        elif how == "stopped":
            place.kill_daemon(number=signal.SIGSTOP)
        elif how == "stopped-while-it-reads":
            (place.steps / "stop-read").touch()
            waiting = pool.submit(read, place)
            wait_for(lambda: is_stopped(place.daemon_pid))
        assert place.unmount().returncode == 0
        if how == "stopped-while-it-reads":
            with pytest.raises(AssertionError, match=os.strerror(errno.ECONNABORTED)):
                waiting.result()
    assert not place.is_mounted() and place.processes() == [] and place.listed() == []


def test_supervisor_killed_while_files_are_open_after_the_unmount(place: Place) -> None:
    """The daemon serves them, and ends with the last one; what is left of the record is nobody's mount."""
    supervisor = place.mount()
    with opened(place, 1) as fd:
        supervisor.terminate()
        place.wait_for_state("stopping")
        supervisor.kill()
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    wait_for(lambda: place.processes() == [])
    assert place.listed() == []
    assert place.run("shoal_csi.mounts", "recover").stdout == "[]\n"
    assert [path.suffix for path in place.run_dir.iterdir()] == [".log"]


def test_recovery_gives_every_mount_a_supervisor_or_takes_it_away(place: Place) -> None:
    place.mount().kill()
    daemon = place.daemon_pid
    assert "has a new supervisor" in place.run("shoal_csi.mounts", "recover").stdout
    wait_for(lambda: place.listed()[0]["state"] == "serving")
    assert place.daemon_pid == daemon and read(place) == FIRST
    os.kill(place.record.supervisor_pid, signal.SIGKILL)
    place.kill_daemon()
    wait_for(lambda: place.processes() == [])
    assert "whose daemon was gone" in place.run("shoal_csi.mounts", "recover").stdout
    assert not place.is_mounted() and place.listed() == []


def test_what_a_supervisor_left_that_died_before_it_mounted_is_in_nobodys_way(place: Place) -> None:
    (place.steps / "stop-start").touch()
    supervisor = place.supervise()
    place.wait_for_record()
    wait_for(lambda: is_stopped(place.daemon_pid))
    supervisor.kill()
    place.kill_daemon()
    kernel.unmount(place.mountpoint, lazy=True)
    assert rundir.read(next(path for path in place.run_dir.iterdir() if path.is_dir())) is not None
    place.mount()
    assert read(place) == FIRST


def test_another_dataset_at_the_place_of_a_mount_without_supervisor(place: Place) -> None:
    """It is detached; files that are open in it are read on from the daemon that still lives."""
    place.mount().kill()
    orphan = place.daemon_pid
    with opened(place, 1) as fd:
        said = place.ready(place.supervise("--dataset", "other@5678"))
        assert "that no supervisor kept" in said["notes"][0] and said["dataset"] == "other@5678"
        assert os.pread(fd, fuse_stand_in.SIZE, 0) == fuse_stand_in.content(1)
    wait_for(lambda: orphan not in place.processes())
