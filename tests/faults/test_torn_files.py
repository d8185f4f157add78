"""Flipped bits, torn, cut and foreign files, put into a data directory before and during a run: never served.

Another program writes to the node's files here, on the same file system, so the times of the files tell; what a drive
does behind its file system's back is tests/faults/test_flipped_bits.py and tests/faults/test_scrubber.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal import shards
from shoal_cachenode.node import CacheNode
from shoal_cachenode.shard_file import XATTR
from shoal_cachenode.store import Store
from tests.support.minicluster import MiniCluster

PART, SHARD = 64, 256
OBJECTS = {f"{n}": bytes((i * n * 7 + i // 251) % 251 for i in range(n * 90)) for n in range(1, 9)}

Harm = Callable[[Path, list[Path]], None]


def flip(path: Path, _: list[Path]) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def flip_and_set_the_time_back(path: Path, others: list[Path]) -> None:
    times = path.stat()
    flip(path, others)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path: Path, _: list[Path]) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path, _: list[Path]) -> None:
    os.truncate(path, 0)


def lengthen(path: Path, _: list[Path]) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def zeros(path: Path, _: list[Path]) -> None:
    """As a file whose pages never reached the drive."""
    path.write_bytes(bytes(path.stat().st_size))


def another_shards_file(path: Path, others: list[Path]) -> None:
    other = next(o for o in others if o != path and o.stat().st_size == path.stat().st_size)
    path.unlink()
    shutil.copy2(other, path)
    os.setxattr(path, XATTR, os.getxattr(other, XATTR))


def no_attribute(path: Path, _: list[Path]) -> None:
    os.removexattr(path, XATTR)


def another_attribute(path: Path, _: list[Path]) -> None:
    raw = bytearray(os.getxattr(path, XATTR))
    raw[40] ^= 1  # in the first checksum
    os.setxattr(path, XATTR, bytes(raw))


def cut_attribute(path: Path, _: list[Path]) -> None:
    os.setxattr(path, XATTR, os.getxattr(path, XATTR)[:20])


def a_link(path: Path, others: list[Path]) -> None:
    path.unlink()
    path.symlink_to(next(o for o in others if o != path))


def nothing(path: Path, _: list[Path]) -> None:
    path.unlink()


#: How each is counted: while the node runs, and where it was there before; "" where the scan at the start removes it.
HARMS: dict[Harm, tuple[str, str]] = {
    flip: ("checksum", "checksum"),
    cut: ("torn", "torn"),
    empty: ("torn", "torn"),
    lengthen: ("torn", "torn"),
    zeros: ("checksum", "checksum"),
    another_shards_file: ("torn", "torn"),
    no_attribute: ("torn", "torn"),
    another_attribute: ("torn", "torn"),
    cut_attribute: ("torn", "torn"),
    a_link: ("missing", ""),
    nothing: ("missing", ""),
}


def start(directory: Path) -> MiniCluster:
    return MiniCluster(directory, OBJECTS, part_size=PART, shard_size=SHARD)


def fill(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    for path in OBJECTS:
        fs.cat_file(f"set/{path}")
    cluster.run(cluster.nodes[0].fills.settle())


def sealed_files(node: CacheNode) -> list[Path]:
    return sorted(path for path in (node.config.data_dir / "shards").rglob("*") if path.is_file())


def harm_all(node: CacheNode, harm: Harm) -> int:
    """Harm every second sealed file of those that have a part of their own; return how many."""
    files = sealed_files(node)
    chosen = [path for path in files if path.stat().st_size == SHARD][::2]
    assert len(chosen) >= 3
    for path in chosen:
        path.chmod(0o644)
        harm(path, files)
    return len(chosen)


def read_all(cluster: MiniCluster, *, local: bool) -> None:
    fs = cluster.filesystem(local=local)
    for path, plain in OBJECTS.items():
        assert fs.cat_file(f"set/{path}") == plain
        assert fs.cat_file(f"set/{path}", 3, 50) == plain[3:50], "less than a part, which no reader can compare"
        assert fs.open_buffer(f"set/{path}").to_pybytes() == plain
    paths = [f"set/{path}" for path in OBJECTS]
    assert fs.cat_ranges(paths, [5] * len(paths), [61] * len(paths)) == [plain[5:61] for plain in OBJECTS.values()]
    cluster.run(cluster.nodes[0].fills.settle())


def causes(node: CacheNode) -> dict[str, int]:
    return {cause: count.value for cause, count in node.counters.shards_corrupt.by_cause.items() if count.value}


def assert_drive_agrees(node: CacheNode) -> None:
    """What lies on the drive is what the ledger says, and every sealed file is right."""
    on_drive = {bytes.fromhex(path.name): path.stat().st_size for path in sealed_files(node)}
    assert on_drive == node.store.sealed_sizes()
    filling = {bytes.fromhex(p.name): p.stat().st_size for p in (node.config.data_dir / "filling").iterdir()}
    assert filling == node.store.reserved_sizes()
    assert node.store.used_bytes == sum(on_drive.values()) + sum(filling.values())


@pytest.mark.parametrize("local", [False, True], ids=["remote", "local"])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_harm_during_a_run(tmp_path: Path, harm: Harm, local: bool) -> None:
    with start(tmp_path) as cluster:
        (node,) = cluster.nodes
        fill(cluster)
        before = cluster.origin.bytes_read
        count = harm_all(node, harm)
        read_all(cluster, local=local)
        assert causes(node) == {HARMS[harm][0]: count}
        assert cluster.origin.bytes_read == before + count * SHARD, "fetched again: those, and nothing else"
        assert_drive_agrees(node)


@pytest.mark.parametrize("local", [False, True], ids=["remote", "local"])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_harm_before_a_run(tmp_path: Path, harm: Harm, local: bool) -> None:
    with start(tmp_path) as cluster:
        fill(cluster)
    count = harm_all(cluster.nodes[0], harm)
    with start(tmp_path) as cluster:
        (node,) = cluster.nodes
        read_all(cluster, local=local)
        cause = HARMS[harm][1]
        assert causes(node) == ({cause: count} if cause else {})
        assert cluster.origin.bytes_read == count * SHARD
        assert_drive_agrees(node)


def test_time_set_back_does_not_hide_a_change_during_a_run(tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        fill(cluster)
        count = harm_all(cluster.nodes[0], flip_and_set_the_time_back)
        read_all(cluster, local=True)
        assert causes(cluster.nodes[0]) == {"checksum": count}


def test_file_that_was_touched_and_is_right_is_kept(tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        (node,) = cluster.nodes
        fill(cluster)
        before = cluster.origin.bytes_read
        for path in sealed_files(node):
            path.touch()
        read_all(cluster, local=True)
        assert (causes(node), cluster.origin.bytes_read) == ({}, before)
    with start(tmp_path) as cluster:
        read_all(cluster, local=True)
        assert (causes(cluster.nodes[0]), cluster.origin.bytes_read) == ({}, 0)


def test_strays_are_removed_at_the_start_and_harm_nobody(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"keep me")
    with start(tmp_path / "c") as cluster:
        fill(cluster)
    data = cluster.nodes[0].config.data_dir
    a_file = sealed_files(cluster.nodes[0])[0]
    strays = [
        data / "shards" / "file",
        data / "shards" / "00" / "name",
        data / "shards" / "00" / ("00" + "A" * 30),  # a key in capitals
        data / "shards" / "00" / ("11" + "a" * 30),  # under another's prefix
        data / "filling" / "x.tmp",
        data / "filling" / ("22" * 16),  # no attribute: a crash before it had one
        data / "filling" / a_file.name,  # sealed already
    ]
    (data / "shards" / "00").mkdir(exist_ok=True)
    for path in strays:
        path.write_bytes(b"stray")
    links = [data / "shards" / "00" / ("00" * 16), data / "filling" / ("33" * 16)]
    for link in links:
        link.symlink_to(outside)
    with start(tmp_path / "c") as cluster:
        assert not [path for path in (*strays, *links) if path.is_symlink() or path.exists()]
        assert_drive_agrees(cluster.nodes[0])
        read_all(cluster, local=True)
        assert cluster.origin.bytes_read == 0
    assert outside.read_bytes() == b"keep me"


# Partial files


def leave_partials(directory: Path, part_size: int) -> None:
    """Fills that were broken off after some parts, in files that a later fill takes up."""
    store = Store(directory / "node0", 1 << 20, part_size=part_size)
    with MiniCluster(directory / "plain", OBJECTS, shard_size=SHARD) as cluster:
        for row in range(len(cluster.snapshot)):
            plain = OBJECTS[cluster.snapshot.path(row)]
            for index in range(shards.shard_count(len(plain), SHARD)):
                shard = plain[index * SHARD : (index + 1) * SHARD]
                partial = store.begin(shards.shard_key(cluster.snapshot.key(row), index), len(shard))
                partial.open()
                for part in range(0, len(partial.header.checksums), 2):
                    first, last = partial.header.part_range(part)
                    partial.write_part(part, shard[first:last])
                store.suspend(partial)
    store.close()


def first_part(path: Path, others: list[Path]) -> None:
    with path.open("r+b") as file:
        (byte,) = file.read(1)
        file.seek(0)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("harm", [None, first_part, cut, empty, no_attribute, another_attribute, another_shards_file])
@pytest.mark.parametrize("part_size", [PART, 40, 256])
def test_stale_partial_file_gives_nothing_wrong(tmp_path: Path, harm: Harm | None, part_size: int) -> None:
    leave_partials(tmp_path, part_size)
    files = sorted((tmp_path / "node0" / "filling").iterdir())
    for path in files[::2] if harm else ():
        if harm is not another_shards_file or path.stat().st_size == SHARD:
            harm(path, files)
    with start(tmp_path) as cluster:
        read_all(cluster, local=False)
        total = sum(map(len, OBJECTS.values()))
        assert cluster.origin.bytes_read < total, "parts that are right are used"
        read_all(cluster, local=True)
        assert_drive_agrees(cluster.nodes[0])
        assert causes(cluster.nodes[0]) == {}


def test_damaged_snapshot_is_fetched_anew(tmp_path: Path) -> None:
    """A listing that is wrong would name wrong bytes."""
    with MiniCluster(tmp_path, OBJECTS, nodes=2, part_size=PART, shard_size=SHARD) as cluster:
        expected = cluster.filesystem().find("set")
    name = f"{cluster.snapshot.digest}.arrow"
    path = tmp_path / "node0" / "snapshots" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    with MiniCluster(tmp_path, OBJECTS, nodes=2, part_size=PART, shard_size=SHARD) as cluster:
        path.write_bytes(raw)
        cluster.nodes[0].library._paths.clear()
        cluster.nodes[0].library._snapshots.clear()
        fs = cluster.filesystem()
        assert fs.find("set") == expected
        assert {p: fs.cat_file(f"set/{p}") for p in OBJECTS} == OBJECTS
    assert path.read_bytes() != bytes(raw)
