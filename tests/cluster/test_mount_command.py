"""``shoal mount`` and ``shoal umount``, as people type them, over a cluster of real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.devcluster import DevCluster
from shoal_csi import kernel
from shoal_csi.server import MOUNT_XATTR
from tests.cluster.conftest import S3Dataset
from tests.support.mounting import STAND_IN, Place, wants_fuse
from tests.support.processes import is_stopped
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.long, wants_fuse]  # its processes take minutes of two cores

OBJECTS = {"train/0.bin": os.urandom(300_000), "train/1.bin": b"one", "test/0.bin": b"zero"}


@pytest.fixture
def dataset(cluster: DevCluster, make_dataset: Callable[..., S3Dataset]) -> S3Dataset:
    made = make_dataset()
    made.put(OBJECTS)
    made.add(cluster)
    return made


@pytest.fixture
def place(cluster: DevCluster) -> Iterator[Place]:
    with Place(cluster.environment()) as place:
        yield place


def said(place: Place, *words: str) -> str:
    """What a command says that succeeds."""
    done = place.run("shoal.cli", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sentence(place: Place, *words: str) -> str:
    """What one says that fails: one line, and nothing is mounted or runs for it."""
    done = place.run("shoal.cli", *words)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert "Traceback" not in done.stderr
    (last,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    return last


def listed_by(place: Place) -> list[dict[str, Any]]:
    """What `shoal mount` lists of this place; the machine may have other mounts."""
    return [each for each in json.loads(said(place, "mount", "--json")) if each["mountpoint"] == place.mountpoint]


def tree(place: Place) -> dict[str, bytes]:
    """What an ordinary program finds below the mount point."""
    found = subprocess.run(
        ["find", ".", "-type", "f"], cwd=place.mountpoint, capture_output=True, text=True, check=True
    )
    return {name[2:]: Path(place.mountpoint, name).read_bytes() for name in found.stdout.splitlines()}


def test_mount_list_and_umount(place: Place, dataset: S3Dataset) -> None:
    done = place.run("shoal.cli", "mount", dataset.name, place.mountpoint)
    assert (done.returncode, done.stdout.split()[1:]) == (0, ["is", "mounted", "at", place.mountpoint]), done
    assert str(place.run_dir) in done.stderr  # where the log is
    assert tree(place) == OBJECTS
    (listed,) = listed_by(place)
    assert (listed["dataset"], listed["state"], listed["restarts"]) == (dataset.name, "serving", 0)
    assert done.stdout.startswith(f"shoal://{dataset.name}@{listed['snapshot']}")
    (row,) = (line.split() for line in said(place, "mount").splitlines() if place.mountpoint in line)
    assert row == [place.mountpoint, dataset.name, listed["snapshot"][:8], "-", "serving", "0"]
    assert said(place, "umount", place.mountpoint) == f"{place.mountpoint}: unmounted\n"
    assert not place.is_mounted() and place.processes() == []
    assert listed_by(place) == []


def test_snapshot_subpath_and_json(place: Place, cluster: DevCluster, dataset: S3Dataset) -> None:
    said(place, "mount", dataset.name, place.mountpoint)
    digest = listed_by(place)[0]["snapshot"]
    said(place, "umount", place.mountpoint)
    dataset.put({"train/2.bin": b"two"})
    dataset.refresh(cluster)
    words = ("mount", f"{dataset.name}@{digest[:6]}", place.mountpoint, "--subpath", "train/", "--json")
    document = json.loads(said(place, *words))
    assert (document["dataset"], document["subpath"]) == (f"{dataset.name}@{digest}", "train")
    assert sorted(tree(place)) == ["0.bin", "1.bin"]
    document = json.loads(said(place, "umount", "--json", place.mountpoint))
    assert (document["mountpoint"], document["how"]) == (place.mountpoint, "unmounted")


def test_relative_names_and_links_lead_to_the_same_mount(place: Place, dataset: S3Dataset) -> None:
    link = place.directory / "link"
    link.symlink_to(place.directory)
    said(place, "mount", dataset.name, os.path.relpath(link / "m"))
    assert place.is_mounted()
    said(place, "umount", str(link / "m" / ".." / "m"))
    assert not place.is_mounted()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_until_it_is_told_to_end(place: Place, dataset: S3Dataset, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "shoal.cli", "mount", dataset.name, place.mountpoint, "--foreground"]
    with subprocess.Popen(command, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"Ctrl-C unmounts" in process.stdout.readline()
        assert tree(place) == OBJECTS
        process.send_signal(number)
        assert process.wait(20) == 0
    assert not place.is_mounted() and place.processes() == []


def test_upgrade_replaces_all_processes_and_no_open_file_notices(place: Place, dataset: S3Dataset) -> None:
    before = json.loads(said(place, "mount", dataset.name, place.mountpoint, "--json"))
    with Path(place.mountpoint, "train/0.bin").open("rb") as file:
        head = file.read(1000)
        after = json.loads(said(place, "mount", "--upgrade", place.mountpoint, "--json"))
        assert head + file.read() == OBJECTS["train/0.bin"]
    pids = ("supervisor_pid", "daemon_pid")
    assert not {before[key] for key in pids} & {after[key] for key in pids}
    assert (after["dataset"], after["mountpoint"]) == (before["dataset"], before["mountpoint"])
    said(place, "umount", place.mountpoint)
    wait_for(lambda: place.processes() == [])


def test_a_mount_without_supervisor_is_taken_over_and_a_dead_one_mounted_anew(place: Place, dataset: S3Dataset) -> None:
    words = ("mount", dataset.name, place.mountpoint)
    said(place, *words)
    os.kill(place.record.supervisor_pid, signal.SIGKILL)
    wait_for(lambda: place.listed()[0]["state"] == "unsupervised")
    done = place.run("shoal.cli", *words)
    assert done.returncode == 0 and "was dead: took the mount over" in done.stderr
    assert tree(place) == OBJECTS
    for pid in (place.record.supervisor_pid, place.daemon_pid):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: place.listed()[0]["state"] == "dead")
    found = json.loads(place.run("shoal.cli", "doctor", "--json").stdout)["findings"]
    assert [each["subject"] for each in found if each["kind"] == "machine-mount-dead"] == [place.mountpoint]
    done = place.run("shoal.cli", *words)
    assert done.returncode == 0 and "detached" in done.stderr and "whose daemon was gone" in done.stderr
    assert tree(place) == OBJECTS


def test_busy_one_is_not_unmounted_unless_lazily(place: Place, dataset: S3Dataset) -> None:
    said(place, "mount", dataset.name, place.mountpoint)
    with Path(place.mountpoint, "train/0.bin").open("rb", buffering=0) as file:
        refusal = sentence(place, "umount", place.mountpoint)
        assert f"process {os.getpid()} (" in refusal and "train/0.bin" in refusal and "--lazy" in refusal
        assert said(place, "umount", "--lazy", place.mountpoint) == f"{place.mountpoint}: detached\n"
        assert file.read(300_000) == OBJECTS["train/0.bin"]
    wait_for(lambda: place.processes() == [])


def tier_of(place: Place) -> dict[str, Any]:
    """What the daemon says of its local tier."""
    found: dict[str, Any] = json.loads(os.getxattr(place.mountpoint, MOUNT_XATTR))["local_tier"]
    return {key: found[key] for key in ("directory", "limit_bytes")}


def test_each_daemon_goes_on_with_the_local_tier(place: Place, dataset: S3Dataset) -> None:
    tier = place.directory / "tier"
    tier.mkdir()
    words = ("--local-tier", os.path.relpath(tier), "--local-tier-size", "1GiB")
    said(place, "mount", dataset.name, place.mountpoint, *words)
    expected = {"directory": str(tier), "limit_bytes": 1 << 30}
    assert tier_of(place) == expected
    place.wait_for_spare()
    place.kill_daemon()
    place.wait_for_state("serving", restarts=1)
    assert tier_of(place) == expected
    os.kill(place.record.supervisor_pid, signal.SIGKILL)
    wait_for(lambda: place.listed()[0]["state"] == "unsupervised")
    said(place, "mount", "--upgrade", place.mountpoint)
    assert tier_of(place) == expected
    other = place.directory / "other"
    other.mkdir()
    said(place, "mount", "--upgrade", place.mountpoint, "--local-tier", str(other), "--local-tier-size", "2GiB")
    wait_for(lambda: tier_of(place) == {"directory": str(other), "limit_bytes": 2 << 30})
    assert tree(place) == OBJECTS


# Mistakes. After each of them nothing is mounted and nothing runs.


def test_no_such_dataset_snapshot_or_directory(place: Place, dataset: S3Dataset) -> None:
    for name, more, words in (
        ("none", (), "shoal dataset add none"),
        (f"{dataset.name}@0000", (), "is not one of its snapshots"),
        ("Bad!", (), "'Bad!' is no dataset name"),
        (f"{dataset.name}/train", (), "--subpath train"),
        (dataset.name, ("--subpath", "valid"), "'valid' is no directory"),
        (dataset.name, ("--subpath", "train/1.bin"), "'train/1.bin' is no directory"),
    ):
        assert words in sentence(place, "mount", name, place.mountpoint, *more)
    assert not place.is_mounted() and place.processes() == []


def test_cluster_away(place: Place) -> None:
    words = ("mount", "any", place.mountpoint, "--endpoint", "http://127.0.0.1:1")
    place.environment["SHOAL_SOCKET"] = "/nonexistent"
    assert "127.0.0.1:1" in sentence(place, *words)
    assert not place.is_mounted()


def test_no_place_for_a_mount(place: Place, dataset: S3Dataset) -> None:
    file = place.directory / "file"
    file.touch()
    for mountpoint, words in (
        (str(place.directory / "none"), f"mkdir -p {place.directory}/none"),
        (str(file), "is not a directory"),
        (str(place.directory), "is not empty"),
        ("/proc", "is already a mount, of type proc"),
        ("/", "is no place for a mount"),
    ):
        assert words in sentence(place, "mount", dataset.name, mountpoint)
    said(place, "mount", dataset.name, place.mountpoint)
    assert "is already a mount" in sentence(place, "mount", dataset.name, place.mountpoint)
    assert tree(place) == OBJECTS


def test_no_place_for_a_local_tier(place: Place, dataset: S3Dataset) -> None:
    none = place.directory / "none"
    words = ("mount", dataset.name, place.mountpoint, "--local-tier", str(none))
    assert f"mkdir -m 700 {none}" in sentence(place, *words, "--local-tier-size", "1GiB")
    none.mkdir()
    assert "--local-tier-size" in sentence(place, *words, "--local-tier-size", "1KiB")
    assert "together" in place.run("shoal.cli", *words).stderr
    assert not place.is_mounted() and place.processes() == []


def test_where_mounting_is_not_allowed(place: Place, dataset: S3Dataset) -> None:
    """Without the device, and without the capability."""
    private = place.directory / "dev"
    private.mkdir()
    os.mknod(private / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    command = (
        f"mount --bind {private} /dev && exec {sys.executable} -m shoal.cli mount {dataset.name} {place.mountpoint}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        env=place.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: /dev/fuse is missing"), done.stderr
    words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-m", "shoal.cli"]
    done = subprocess.run(
        [*words, "mount", dataset.name, place.mountpoint],
        env=place.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "is not permitted: it takes root" in done.stderr, done.stderr
    assert place.processes() == []


def test_umount_of_what_is_not_ours(place: Place) -> None:
    assert "nothing is mounted at" in sentence(place, "umount", place.mountpoint)
    assert "nothing is mounted at" in sentence(place, "umount", str(place.directory / "none"))
    assert "is not a mount of Shoal's but of type proc" in sentence(place, "umount", "/proc")


def test_umount_of_one_that_hangs(place: Place) -> None:
    """Nobody answers, nobody supervises, and somebody waits in it."""
    place.mount(module=STAND_IN).kill()
    (place.steps / "stop-read").touch()
    with subprocess.Popen(["cat", f"{place.mountpoint}/f0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
        wait_for(lambda: is_stopped(place.daemon_pid))  # with the request in its hands
        assert "cut off, because it did not answer" in said(place, "umount", place.mountpoint)
        assert waiting.wait(20) == 1
    assert not place.is_mounted() and place.processes() == []


def test_umount_of_one_that_another_run_directory_has(place: Place) -> None:
    fd = kernel.open_device()
    try:
        kernel.mount(fd, place.mountpoint, "shoal:set@1234")
    finally:
        os.close(fd)
    (listed,) = place.listed()
    assert (listed["state"], listed["dataset"]) == ("unknown", "set")
    said(place, "umount", place.mountpoint)
    assert not place.is_mounted()


def test_help_has_examples_and_wrong_words_are_usage_errors(place: Place) -> None:
    for command in ("mount", "umount"):
        assert f"  shoal {command} " in said(place, command, "--help")
    for words in (("mount", "one"), ("mount", "a", "b", "c"), ("mount", "--upgrade"), ("umount",)):
        assert place.run("shoal.cli", *words).returncode == 2
