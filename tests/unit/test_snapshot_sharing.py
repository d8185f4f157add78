"""Where clients without a local node share snapshots: this user's processes with each other, and with nobody else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import cluster
from shoal.cluster import Cluster
from shoal.snapshot import Snapshot
from tests.support.minicluster import MiniCluster

OBJECTS = {"the first": b"a" * 100, "the second": b"b" * 100}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path_factory.mktemp("cluster"), OBJECTS) as running:
        yield running


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def fetched(node: MiniCluster) -> Snapshot:
    """The snapshot, as another process gets it."""
    found = Cluster(node.nodes[0].address, use_local=False).snapshot(node.snapshot.digest)
    found.verify()
    assert found.digest == node.snapshot.digest
    assert [found.path(row) for row in range(len(found))] == sorted(OBJECTS)
    return found


def planted(node: MiniCluster, directory: Path) -> Path:
    """A snapshot of that name whose bytes are others, though its head and foot are right."""
    data = bytearray((node.directory / f"{node.snapshot.digest}.arrow").read_bytes())
    at = data.index(b"the first")
    data[at : at + 3] = b"sly"
    path = directory / f"{node.snapshot.digest}.arrow"
    path.write_bytes(data)
    assert Snapshot.open(path).path(0) == "sly first", "whoever trusts it is misled"
    return path


def test_old_snapshots_are_not_kept_for_ever(
    node: MiniCluster, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "MAX_SNAPSHOTS", 2)
    ours = Cluster(node.nodes[0].address, use_local=False)
    monkeypatch.setattr(ours, "_download", lambda digest: Snapshot.open(planted(node, temporary)))
    held = ours.snapshot("first")
    for name in ("second", "third", "fourth"):
        ours.snapshot(name)
    assert sorted(ours._snapshots) == ["first", "fourth", "third"]
    assert ours.snapshot("first") is held, "as long as anybody has it there is one"
    del held
    assert list(ours._recent) == ["fourth", "first"]


def test_one_fetches_and_all_share(node: MiniCluster, temporary: Path) -> None:
    fetched(node)
    shared = temporary / f"shoal-{os.getuid()}" / "snapshots"
    (file,) = shared.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (shared.parent, shared, file)] == [0o700, 0o700, 0o600]
    before = file.stat()
    fetched(node)
    assert file.stat() == before


def everything_in(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("way", ["another user", "others may write", "a link"])
def test_what_others_can_change_is_neither_trusted_nor_touched(
    node: MiniCluster, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, way: str
) -> None:
    shared = temporary / f"shoal-{os.getuid()}" / "snapshots"
    suspect = (shared.parent, shared)[depth]
    shared.mkdir(parents=True, mode=0o700)
    shared.parent.chmod(0o700)
    file = planted(node, shared)
    if way == "another user":
        real = Path.lstat

        def lstat(path: Path) -> os.stat_result:
            found = real(path)
            return os.stat_result((*found[:4], found.st_uid + 1, *found[5:])) if path == suspect else found

        monkeypatch.setattr(Path, "lstat", lstat)
    elif way == "others may write":
        suspect.chmod(0o777)
    else:
        suspect.rename(tmp_path / "elsewhere")
        suspect.symlink_to(tmp_path / "elsewhere")
    before, data = everything_in(tmp_path), file.read_bytes()
    for _ in range(2):
        fetched(node)
    assert everything_in(tmp_path) == before and file.read_bytes() == data


def test_a_file_in_the_way_and_no_place_for_temporary_files(
    node: MiniCluster, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary / f"shoal-{os.getuid()}").write_bytes(b"mine")
    fetched(node)
    assert everything_in(temporary) == [temporary / f"shoal-{os.getuid()}"]
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "none"))
    fetched(node)
    assert cluster._shared_snapshots() is None


def test_a_torn_file_is_replaced(node: MiniCluster, temporary: Path) -> None:
    fetched(node)
    (file,) = (temporary / f"shoal-{os.getuid()}" / "snapshots").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    fetched(node)
    assert file.read_bytes() == whole
