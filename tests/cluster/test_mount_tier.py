"""The local tier of a real mount: what other nodes have is read by the kernel itself once it was read before."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal_csi.tier_room import IDLE_S
from tests.cluster.conftest import filesystem
from tests.support.mounted import Mounted
from tests.support.processes import stopped
from tests.support.waiting import wait_for

MIB = 1 << 20
SHARD = 2 * MIB
NS = 1_000_000_000
_names = itertools.count()


class Dataset:
    """Objects of a directory, as a dataset of shards of 2 MiB."""

    def __init__(self, cluster: DevCluster, origin: Path, objects: Mapping[str, bytes]) -> None:
        self.cluster, self.origin, self.name, self.objects = cluster, origin, origin.name, dict(objects)
        origin.mkdir()
        for path, data in objects.items():
            (origin / path).write_bytes(data)
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(
                self.name, f"file://{origin}", shard_size=SHARD, replicas=1, storage_options=json.dumps({})
            )

    def owners(self, path: str) -> list[int]:
        """Which node owns each shard of an object."""
        fs = filesystem(self.cluster.endpoint)
        found, _ = fs.locate(self.name)
        row = found.snapshot.find(path)
        assert row is not None
        reader = fs.object_reader(found.record, found.snapshot, row)
        numbers = {str(node.ready["id"]): number for number, node in enumerate(self.cluster.nodes)}
        shards = range(-(-len(self.objects[path]) // SHARD))
        return [numbers[reader.owners(shard)[0].id] for shard in shards]

    def mounted(self, tier: Path, size: str = "64MiB") -> Mounted:
        args = ["--local-tier", str(tier), "--local-tier-size", size]
        return Mounted(self.name, self.cluster.environment(), args)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="shoal-tier-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def tier(directory: Path) -> Path:
    made = directory / "tier"
    made.mkdir()
    return made


@pytest.fixture
def make(cluster: DevCluster, directory: Path) -> Callable[..., Dataset]:
    def make(count: int, size_bytes: int) -> Dataset:
        objects = {f"{n:02}.bin": random.Random(n).randbytes(size_bytes) for n in range(count)}
        return Dataset(cluster, directory / f"tiered-{next(_names)}", objects)

    return make


def measured(tier: Path) -> int:
    """What the tier has allocated, at one moment."""
    with (tier / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.lstat().st_blocks * 512 for path in tier.rglob("*"))


def files_of(tier: Path) -> list[Path]:
    return [path for path in tier.glob("objects/*/*") if path.name != "used"]


def is_settled(mount: Mounted) -> bool:
    report = mount.report()
    return bool(report["open_inodes"] == report["local_tier"]["waiting"] == 0)


def read(mount: Mounted, dataset: Dataset, *names: str) -> None:
    for name in names:
        with (mount.path / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is asked for anew
            assert file.read() == dataset.objects[name], name


def bring(mount: Mounted, dataset: Dataset, *names: str) -> None:
    read(mount, dataset, *names)
    wait_for(lambda: is_settled(mount))


def passed_through(mount: Mounted, dataset: Dataset, name: str) -> bool:
    """Whether an open of an object is answered from the tier; its bytes are right either way."""
    before = mount.report()["local_tier"]["hits"]
    wait_for(lambda: mount.report()["open_inodes"] == 0)
    read(mount, dataset, name)
    return bool(mount.report()["local_tier"]["hits"] > before)


def let_age(tier: Path, seconds: int) -> None:
    """As if nobody had used anything for so long."""
    for path in tier.glob("objects/*/*"):
        found = path.stat()
        then = found.st_atime_ns - seconds * NS
        os.utime(path, ns=(then, then if path.name == "used" else found.st_mtime_ns))


def test_what_was_read_is_read_by_the_kernel_from_then_on(make: Callable[..., Dataset], tier: Path) -> None:
    dataset = make(8, 3 * MIB // 2)
    several = make(2, 3 * SHARD + 12_345)
    remote = [name for name in dataset.objects if dataset.owners(name) != [0]]
    local = [name for name in dataset.objects if name not in remote]
    assert remote, "a dataset of enough objects has some on each node"
    with dataset.mounted(tier) as mount, several.mounted(tier) as other:
        bring(mount, dataset, *dataset.objects)
        report = mount.report()
        assert report["local_tier"]["brought"] == len(remote) == len(files_of(tier)), "and nothing that is local"
        assert passed_through(mount, dataset, remote[0])
        bring(other, several, *several.objects)
        assert passed_through(other, several, "01.bin"), "its shards are joined"
        report = mount.report()["local_tier"]
        assert (report["files"], report["bytes"]) == (len(remote) + 2, measured(tier))

        # With its server dead, an open file is read to its end from the drive.
        with (mount.path / remote[0]).open("rb") as file:
            mount.kill()
            assert file.read() == dataset.objects[remote[0]]
            assert mount.start()["local_tier"]["files"] == len(remote) + 2, "the next server goes on with it"
        assert passed_through(mount, dataset, remote[-1])
        assert not any(passed_through(mount, dataset, name) for name in local[:1])

        # Nobody else gets at the files but through the mount.
        as_nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "cat"]
        for path in (mount.path.parent, tier.parent, tier):
            path.chmod(0o755)
        through = subprocess.run([*as_nobody, mount.path / remote[0]], capture_output=True, check=True)
        assert through.stdout == dataset.objects[remote[0]]
        assert subprocess.run([*as_nobody, files_of(tier)[0]], capture_output=True, check=False).returncode == 1

    # A later snapshot, in which the object is the same.
    (dataset.origin / "more.bin").write_bytes(b"more")
    with Control(dataset.cluster.controller_grpc) as control:
        control.refresh_dataset(dataset.name)
    with dataset.mounted(tier) as mount:
        assert passed_through(mount, dataset, remote[0])
        assert mount.report()["local_tier"]["brought"] == 0


def test_the_bound_holds(make: Callable[..., Dataset], tier: Path) -> None:
    """Three times the data: the first come stay while they are used, and make room when they are not."""
    limit = 16 * MIB
    first, second = make(18, SHARD + 700_000), make(4, SHARD + 700_000)
    with first.mounted(tier, "16MiB") as mount, second.mounted(tier, "16MiB") as other:
        for name in first.objects:
            bring(mount, first, name)
            assert measured(tier) <= limit
        kept = {path: path.read_bytes() for path in files_of(tier)}
        assert 3 <= len(kept) < 8
        assert set(kept.values()) <= set(first.objects.values())
        held = next(name for name, data in first.objects.items() if data in kept.values())
        assert passed_through(mount, first, held)
        with (mount.path / held).open("rb") as file:
            let_age(tier, IDLE_S + 600)
            for name in second.objects:
                bring(other, second, name)
                assert measured(tier) <= limit
            now = [path.read_bytes() for path in files_of(tier)]
            assert set(second.objects.values()) <= set(now), "an idle dataset makes room"
            assert first.objects[held] in now, "but not what somebody has open"
            assert file.read() == first.objects[held]
        wait_for(lambda: other.numbers()["tier_brought"] == len(second.objects))
        assert 0 < other.numbers()["tier_dropped"] <= len(kept)
        assert other.numbers()["tier_dropped_bytes"] >= (SHARD + 700_000) * other.numbers()["tier_dropped"]
        wait_for(lambda: mount.numbers()["opens_tier"] > 0)


def test_a_server_that_is_killed_in_the_middle_of_an_object(make: Callable[..., Dataset], tier: Path) -> None:
    dataset = make(1, 3 * SHARD + 5)
    name = "00.bin"
    with dataset.mounted(tier) as mount, contextlib.ExitStack() as frozen:
        with (mount.path / name).open("rb") as file:
            assert file.read() == dataset.objects[name]
            for node in dataset.cluster.nodes:
                frozen.enter_context(stopped(node.pid))
        wait_for(lambda: any((tier / "filling").iterdir()))
        (coming,) = (tier / "filling").iterdir()
        mount.kill()
        assert coming.stat().st_size == len(dataset.objects[name]), "it looks like a whole one"
        assert files_of(tier) == []
        frozen.close()
        mount.start()
        assert not coming.exists(), "the next server tidies it away"
        bring(mount, dataset, name)
        (path,) = files_of(tier)
        assert path.read_bytes() == dataset.objects[name]
        assert passed_through(mount, dataset, name)


def test_damage_is_not_given_out_and_repaired(make: Callable[..., Dataset], tier: Path) -> None:
    dataset = make(1, 2 * SHARD + 1)
    name = "00.bin"
    with dataset.mounted(tier) as mount:
        bring(mount, dataset, name)
        for damage in (_flip, _cut):
            (path,) = files_of(tier)
            assert passed_through(mount, dataset, name)
            wait_for(lambda: mount.report()["open_inodes"] == 0)
            damage(path)
            assert not passed_through(mount, dataset, name)
            wait_for(lambda: passed_through(mount, dataset, name))
        assert mount.report()["local_tier"]["damaged"] == 2
        assert mount.log().count("is damaged: it is dropped") == 2


def _flip(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(SHARD)
        byte = file.read(1)[0]
        file.seek(SHARD)
        file.write(bytes([byte ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, SHARD)


@pytest.mark.long  # its servers' starts take seconds
def test_where_there_can_be_none(make: Callable[..., Dataset], tier: Path) -> None:
    """Refused when mounting; a mount that is there goes on without."""
    dataset = make(2, 2 * SHARD + 1)
    mount = dataset.mounted(tier / "none")
    with pytest.raises(AssertionError, match=r"error: .*/none does not exist: make the local tier's directory"), mount:
        pass
    with dataset.mounted(tier) as mount:
        bring(mount, dataset, "00.bin")
        shutil.rmtree(tier)
        assert not passed_through(mount, dataset, "00.bin")
        bring(mount, dataset, "01.bin")
        assert mount.log().count("was removed or emptied") == 1
        mount.kill()
        assert mount.start()["local_tier"] is None
        read(mount, dataset, "00.bin")
        assert mount.log().count("nothing is kept in the local tier") == 1


@pytest.mark.long  # its servers' starts take seconds
def test_a_mount_of_small_files_has_no_use_for_it(make: Callable[..., Dataset], tier: Path) -> None:
    dataset = make(4, 5000)
    with dataset.mounted(tier) as mount:
        read(mount, dataset, *dataset.objects)
        assert "nothing is passed through" in mount.report()["local_tier"]["fault"]
        assert files_of(tier) == []


@pytest.mark.long  # three nodes and some mounts of its own
def test_the_benchmark_runs_tiny(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.tier", "--tiny", "--workdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "tier.json")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tier.json").read_text())
    assert [line["what"] for line in result["lines"]] == ["sequential 1 MiB", "random 128 KiB", "map, scanned"]
    assert result["report"]["local_tier"]["files"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tier.json"}
