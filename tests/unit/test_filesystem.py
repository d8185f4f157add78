"""The file system over a snapshot: names, pins, refusals, and globs against fsspec's own over the same tree."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import (
    ClusterUnavailable,
    DatasetNotFound,
    InvalidRequest,
    NotFound,
    ReadOnly,
    SnapshotNotFound,
)
from shoal.filesystem import ShoalFileSystem
from tests.support.minicluster import MiniCluster

TREE = {
    "a.arrow": b"1",
    "b.txt": b"22",
    "train/0/x.jpg": b"333",
    "train/0/y.jpg": b"4444",
    "train/10/x.jpg": b"5",
    "train/x y#%20.jpg": b"6",
    "train-extra/x.jpg": b"7",
    "val/deep/er/z.bin": b"8" * 200,
    "both": b"9",
    "both/inside": b"10",
    "empty": b"",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path_factory.mktemp("c"), TREE, nodes=2) as cluster:
        yield cluster


@pytest.fixture
def fs(cluster: MiniCluster) -> ShoalFileSystem:
    return cluster.filesystem()


def test_ls_gives_directories_and_objects(fs: ShoalFileSystem) -> None:
    assert fs.ls("", detail=False) == ["set"]
    assert fs.ls("shoal://set", detail=False) == sorted(
        f"set/{n}" for n in ("a.arrow", "b.txt", "both", "both", "empty", "train", "train-extra", "val")
    )
    assert fs.ls("set/train/0/", detail=False) == ["set/train/0/x.jpg", "set/train/0/y.jpg"]
    (entry,) = fs.ls("set/b.txt")
    assert entry == {"name": "set/b.txt", "size": 2, "type": "file", "version": "1"}


def test_info_exists_and_kinds(fs: ShoalFileSystem) -> None:
    assert fs.info("set")["type"] == fs.info("")["type"] == fs.info("set/train")["type"] == "directory"
    assert fs.isfile("set/both") and fs.isdir("set/train") and not fs.exists("set/nope") and not fs.exists("none/x")
    assert fs.size("set/val/deep/er/z.bin") == 200
    assert fs.find("set/train") == [
        "set/train/0/x.jpg",
        "set/train/0/y.jpg",
        "set/train/10/x.jpg",
        "set/train/x y#%20.jpg",
    ]
    assert fs.find("set/nope") == []
    assert fs.du("set") == sum(map(len, TREE.values()))
    assert fs.ukey("set/a.arrow") != fs.ukey("set/b.txt")


PATTERNS = ("*", "*.txt", "t*", "train*/*", "*/*/*.jpg", "train/[01]*/x*", "train/?/?.jpg", "a.arrow", "nope*",
            "*/nope", "**", "**/*.jpg", "train/**", "val/*/er", "val/", "x*/y*")  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_glob_is_fsspecs_own(fs: ShoalFileSystem, pattern: str) -> None:
    assert fs.glob(f"set/{pattern}") == AbstractFileSystem.glob(fs, f"set/{pattern}")
    ours, theirs = fs.glob(f"set/{pattern}", detail=True), AbstractFileSystem.glob(fs, f"set/{pattern}", detail=True)
    theirs.update({name: fs.info(name) for name in theirs if name == "set/both"})  # both: theirs takes either kind
    assert ours == theirs


@given(pattern=st.text(st.sampled_from("atrin/*?x.[0]-"), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_glob_is_fsspecs_own(cluster: MiniCluster, pattern: str) -> None:
    fs = cluster.filesystem()
    try:
        expected = AbstractFileSystem.glob(fs, f"set/{pattern}")
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            fs.glob(f"set/{pattern}")
    else:
        assert fs.glob(f"set/{pattern}") == expected


def test_names_that_are_not_there_say_so(fs: ShoalFileSystem) -> None:
    with pytest.raises(DatasetNotFound, match="no dataset is named 'none': the cluster has set"):
        fs.ls("none")
    for read in (fs.info, fs.ls, fs.cat_file, fs.open):
        with pytest.raises(NotFound, match=r"set/nope is not in snapshot \w{8} of dataset set"):
            read("set/nope")
        with pytest.raises(FileNotFoundError):
            read("set/nope")
    with pytest.raises(IsADirectoryError, match="set/train is a directory"):
        fs.cat_file("set/train")
    with pytest.raises(InvalidRequest, match="is no dataset name"):
        fs.ls("Bad Name")


def test_snapshot_may_be_named(fs: ShoalFileSystem, cluster: MiniCluster) -> None:
    digest = cluster.snapshot.digest
    for name in (digest, digest[:8]):
        assert fs.cat_file(f"set@{name}/a.arrow") == b"1"
        assert fs.ls(f"set@{name}/val", detail=False) == [f"set@{name}/val/deep"]
    wrong = "0000" if not digest.startswith("0000") else "1111"
    with pytest.raises(SnapshotNotFound, match="is not one of its snapshots"):
        fs.ls(f"set@{wrong}")
    with pytest.raises(InvalidRequest, match="is no snapshot"):
        fs.ls("set@latest")


@pytest.mark.parametrize("mode", ["wb", "ab", "w", "r+b", "xb"])
def test_writing_is_refused(fs: ShoalFileSystem, mode: str) -> None:
    with pytest.raises(ReadOnly, match="Shoal is read-only; write to the origin itself"):
        fs.open("set/new", mode)


def test_changing_anything_is_refused(fs: ShoalFileSystem, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"x")
    for change in (
        lambda: fs.rm("set/a.arrow"),
        lambda: fs.rm("set", recursive=True),
        lambda: fs.rm_file("set/a.arrow"),
        lambda: fs.touch("set/new"),
        lambda: fs.pipe("set/new", b"x"),
        lambda: fs.put(str(tmp_path / "local"), "set/new"),
        lambda: fs.put_file(str(tmp_path / "local"), "set/new"),
        lambda: fs.cp("set/a.arrow", "set/new"),
        lambda: fs.mv("set/a.arrow", "set/new"),
        lambda: fs.mkdir("set/new"),
        lambda: fs.makedirs("set/new"),
        lambda: fs.rmdir("set/train"),
    ):
        with pytest.raises(PermissionError) as caught:
            change()
        assert isinstance(caught.value, ReadOnly)
    assert fs.cat_file("set/a.arrow") == b"1"


def test_file_object(fs: ShoalFileSystem) -> None:
    with fs.open("set/val/deep/er/z.bin") as file:
        assert file.seekable() and file.readable() and not file.writable()
        assert file.read(3) == b"888" and file.tell() == 3
        assert file.seek(-5, 2) == 195 and file.read(100) == b"88888" and file.read() == b""
        file.seek(0)
        buffer = bytearray(1000)
        assert file.readinto(buffer) == 200 and buffer[:200] == b"8" * 200
        file.seek(10)
        held = file.read_buffer(20)
        assert isinstance(held, pa.Buffer)
    assert held.to_pybytes() == b"8" * 20
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with fs.open("set/b.txt", "r") as text:
        assert text.read() == "22"


def test_cat_ranges(fs: ShoalFileSystem) -> None:
    path = "set/val/deep/er/z.bin"
    assert fs.cat_ranges([path, "set/b.txt", path], [0, 0, 190], [5, 1, 300]) == [b"88888", b"2", b"8" * 10]
    assert fs.cat_ranges([path] * 40, list(range(40)), [60] * 40) == [b"8" * (60 - i) for i in range(40)]
    assert fs.cat_ranges([], [], []) == []
    good, bad = fs.cat_ranges(["set/b.txt", "set/nope"], 0, 2)
    assert good == b"22" and isinstance(bad, FileNotFoundError)
    with pytest.raises(NotFound):
        fs.cat_ranges(["set/nope"], [0], [1], on_error="raise")


def test_cat_file_takes_pythons_positions(fs: ShoalFileSystem) -> None:
    path = "set/train/0/y.jpg"
    assert [fs.cat_file(path, s, e) for s, e in ((None, None), (-2, None), (1, -1), (3, 1), (0, 99))] == [
        b"4444", b"44", b"44", b"", b"4444"]  # fmt: skip


def test_get(fs: ShoalFileSystem, tmp_path: Path) -> None:
    fs.get("set/train/", str(tmp_path / "out"), recursive=True)
    got = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert got == {name[6:]: data for name, data in TREE.items() if name.startswith("train/")}


def test_chained_url_finds_the_dataset(cluster: MiniCluster) -> None:
    options = {"shoal": {"endpoint": cluster.nodes[0].address, "local": False}}
    with fsspec.open("shoal::memory://set/train/0/x.jpg", **options) as file:
        assert file.read() == b"333"
    files = fsspec.open_files("shoal::memory://set/train/*/x.jpg", **options)
    assert [open_file.open().read() for open_file in files] == [b"333", b"5"]
    fs, path = fsspec.url_to_fs("shoal::memory://set/train", **options)
    assert [p.removeprefix(path) for p in fs.find(path)] == ["/0/x.jpg", "/0/y.jpg", "/10/x.jpg", "/x y#%20.jpg"]


def test_chained_url_over_nothing_says_what_to_type(cluster: MiniCluster) -> None:
    options = {"shoal": {"endpoint": cluster.nodes[0].address, "local": False}}
    with pytest.raises(DatasetNotFound, match="shoal dataset add NAME memory://other"):
        fsspec.open("shoal::memory://other/x", **options).open()


def test_no_endpoint_and_dead_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHOAL_ENDPOINT", raising=False)
    monkeypatch.setenv("SHOAL_SOCKET", str(tmp_path / "none.sock"))
    with pytest.raises(ClusterUnavailable, match="set SHOAL_ENDPOINT"):
        fsspec.filesystem("shoal", skip_instance_cache=True).ls("")
    with pytest.raises(ClusterUnavailable, match=r"no Shoal cluster answers at 127\.0\.0\.1:1: .*check SHOAL_ENDPOINT"):
        fsspec.filesystem("shoal", endpoint="http://127.0.0.1:1", skip_instance_cache=True).ls("")
    with pytest.raises(InvalidRequest, match="'nonsense' is no endpoint"):
        fsspec.filesystem("shoal", endpoint="nonsense", skip_instance_cache=True).ls("")


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"no storage option 'verfy'.*spelling"):
        fsspec.filesystem("shoal", endpoint="http://127.0.0.1:1", verfy=False)
    fsspec.filesystem("shoal", endpoint="http://127.0.0.1:1", use_listings_cache=False, skip_instance_cache=True)


def test_pickles(fs: ShoalFileSystem) -> None:
    assert pickle.loads(pickle.dumps(fs)).cat_file("set/a.arrow") == b"1"


def test_controller_is_not_needed(cluster: MiniCluster) -> None:
    """No test here has a controller at all; this one says that it is on purpose."""
    assert cluster.nodes[0].library.knowledge.controller_http == ""
    assert cluster.filesystem(local=True).cat("set/a.arrow") == b"1"
