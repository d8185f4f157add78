"""Snapshots against a plain dict: every look-up, odd names, damaged files, and the memory they are read from."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.utils
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import snapshot as bench
from shoal import listing, shards, snapshot
from shoal.errors import InvalidRequest, NotFound, ShardCorrupt, SnapshotNotFound, StoreUnusable
from shoal.snapshot import Snapshot

SHARD_SIZE = 1000
ORIGIN, IDENTITY = "s3://bucket/prefix", "s3://bucket/prefix https://s3.example"

#: The first example pays for what is loaded lazily, and the disk syncs in its own time.
unhurried = settings(deadline=None, max_examples=50)

Model = dict[str, tuple[int, str]]

# Siblings that sort on either side of "/" (space, "-", "." below it, "0" above), look-alikes, and code points whose
# order in UTF-8 is not that of UTF-16.
NAMES = [
    *"a",
    "a-b",
    "a0",
    "a b",
    "a.",
    "b",
    "%",
    "#",
    "*",
    "[",
    "é",
    "e\u0301",
    "\uffff",
    "\U0001f600",
    "\n",
    "x" * 400,
]


def is_listable(path: str) -> bool:
    return not path.startswith("/") and not path.endswith("/") and "\0" not in path


nasty_paths = st.lists(st.sampled_from([*NAMES, "\n", "x" * 400, ""]), max_size=4).map("/".join).filter(is_listable)
paths = nasty_paths | st.text(st.characters(codec="utf-8"), max_size=8).filter(is_listable)
sizes = st.sampled_from([0, 1, SHARD_SIZE - 1, SHARD_SIZE, SHARD_SIZE + 1, 5 * SHARD_SIZE]) | st.integers(0, 9999)
models = st.dictionaries(paths, st.tuples(sizes, st.sampled_from(["", "v1", "é", '"etag"'])), max_size=25)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


def write(directory: Path, model: Model, **changes: Any) -> Path:
    rows = [(path, size, version) for path, (size, version) in model.items()]
    arguments = {"origin": ORIGIN, "identity": IDENTITY, "shard_size": SHARD_SIZE, "rows": rows} | changes
    return snapshot.write(directory, **arguments)


def in_order(model: Model) -> list[str]:
    return sorted(model, key=str.encode)


def model_list_dir(model: Model, path: str) -> tuple[list[str], list[str]]:
    prefix = f"{path}/" if path else ""
    objects, directories = [], {}
    for name in in_order(model):
        if name.startswith(prefix) and len(name) > len(prefix):
            head, slash, _ = name[len(prefix) :].partition("/")
            if slash:
                directories[prefix + head] = True
            else:
                objects.append(name)
    return objects, list(directories)


def model_shards(model: Model) -> list[tuple[bytes, int, int, int]]:
    table = []
    for row, path in enumerate(in_order(model)):
        size, version = model[path]
        key = shards.object_key(IDENTITY, path, version, size, SHARD_SIZE)
        table += [
            (shards.shard_key(key, index), shards.shard_length(size, SHARD_SIZE, index), row, index)
            for index in range(shards.shard_count(size, SHARD_SIZE))
        ]
    return table


def as_rows(table: snapshot.ShardTable) -> list[tuple[bytes, int, int, int]]:
    assert not any(array.flags.writeable for array in (table.keys, table.sizes, table.rows, table.indexes))
    keys = [key.tobytes() for key in table.keys]
    return list(zip(keys, table.sizes.tolist(), table.rows.tolist(), table.indexes.tolist(), strict=True))


# Look-ups


@unhurried
@given(models)
def test_every_row_reads_back(directory: Path, model: Model) -> None:
    mapped = Snapshot.open(write(directory, model))
    mapped.verify()
    assert (mapped.origin, mapped.identity, mapped.shard_size) == (ORIGIN, IDENTITY, SHARD_SIZE)
    assert len(mapped) == len(model)
    assert mapped.total_bytes == sum(size for size, _ in model.values())
    for row, path in enumerate(in_order(model)):
        size, version = model[path]
        assert mapped.entry(row) == snapshot.Entry(row, path, size, version)
        assert (mapped.path(row), mapped.size(row), mapped.version(row)) == (path, size, version)
        assert mapped.key(row) == shards.object_key(IDENTITY, path, version, size, SHARD_SIZE)


@unhurried
@given(models, st.lists(paths | st.sampled_from(["/", "a/", "/a", "\udc80", "\ud83d\ude00", "a\0"]), max_size=10))
def test_finds_what_is_listed_and_nothing_else(directory: Path, model: Model, others: list[str]) -> None:
    mapped = Snapshot.open(write(directory, model))
    rows = {path: row for row, path in enumerate(in_order(model))}
    for path in [*model, *others, *(path[:-1] for path in model), *(path + "0" for path in model)]:
        assert mapped.find(path) == rows.get(path)


@unhurried
@given(models, st.lists(paths | st.sampled_from(["/", "a/", "\udc80"]), max_size=5))
def test_rows_under_a_prefix(directory: Path, model: Model, others: list[str]) -> None:
    mapped = Snapshot.open(write(directory, model))
    names = in_order(model)
    for prefix in [*others, *(path[:cut] for path in model for cut in range(len(path) + 1)[:12])]:
        found = mapped.rows_under(prefix)
        assert [names[row] for row in found] == [name for name in names if name.startswith(prefix)]


@unhurried
@given(models, st.lists(paths | st.sampled_from(["/", "a/", "\udc80"]), max_size=5))
@example({"": (1, ""), "a": (1, ""), "a-b": (1, ""), "a/b": (1, ""), "a//b": (1, ""), "a0": (1, "")}, ["a", "a/"])
def test_directories(directory: Path, model: Model, others: list[str]) -> None:
    mapped = Snapshot.open(write(directory, model))
    parents = {path.rsplit("/", cut)[0] for path in model for cut in range(4)}
    for path in ["", *others, *parents]:
        entries, directories = mapped.list_dir(path)
        assert ([entry.path for entry in entries], directories) == model_list_dir(model, path)
        assert all(entry == mapped.entry(entry.row) for entry in entries)
        assert mapped.is_dir(path) == (path == "" or any(name.startswith(path + "/") for name in model))


def test_listing_steps_over_subtrees(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = Snapshot.open(write(directory, {f"{d}/{n:04}": (1, "") for d in "abc" for n in range(3000)}))
    read: list[int] = []
    raw = listing.Text.raw
    monkeypatch.setattr(listing.Text, "raw", lambda self, row: read.append(row) or raw(self, row))
    assert mapped.list_dir("") == ([], ["a", "b", "c"])
    assert len(read) <= 3 * (1 + 14)


def test_rows_outside_are_refused(directory: Path) -> None:
    mapped = Snapshot.open(write(directory, {"a": (1, ""), "b": (1, "")}))
    for row in (-1, 2):
        for get in (mapped.path, mapped.size, mapped.version, mapped.key, mapped.entry):
            with pytest.raises(NotFound, match=f"no row {row}: it lists 2 objects"):
                get(row)
    for rows in (range(3), range(-1, 1), range(0, 2, 2)):
        for take in (lambda rows: mapped.glob_rows(".*", rows), mapped.shard_table):
            with pytest.raises(InvalidRequest, match="no run of the 2 rows"):
                take(rows)


# Matching

glob_segments = st.lists(st.sampled_from([*NAMES, "*", "?", "[a-b]", "[!a]", "[]]"]), min_size=1, max_size=3)
globs = st.lists(glob_segments.map("".join) | st.just("**"), min_size=1, max_size=4).map("/".join)
tokens = r"""
    a b / . .* [^/] [^/]* \d \w \S+ \b (?:a|b) (a|) (?s:.*) (?i:A) (?=a) (?P<n>a) (?P=n) {2} {,2} $ ^ \n \Z \\Z \z
    [[:alpha:]] [a\-z] [\d] | * + ? *+ é \é [é-ü] \. \( ( ) [ ] \ \x61
"""
regexes = st.lists(st.sampled_from(tokens.split()), max_size=5).map("".join)


def full_matches(regex: str, model: Model) -> list[int]:
    pattern = re.compile(regex)
    return [row for row, name in enumerate(in_order(model)) if pattern.fullmatch(name)]


@unhurried
@given(models, globs)
def test_globs_match_as_re_does(directory: Path, model: Model, glob: str) -> None:
    mapped = Snapshot.open(write(directory, model))
    try:
        regex = fsspec.utils.glob_translate(glob)
    except ValueError:  # fsspec refuses "**" inside a name
        return
    assert mapped.glob_rows(regex, range(len(mapped))).tolist() == full_matches(regex, model)


@settings(unhurried, max_examples=150)
@given(models, regexes)
@example({"a\n": (0, ""), "a": (0, "")}, "a$\n")
@example({"é": (0, ""), "a": (0, "")}, r"\w")
@example({"aa": (0, ""), "a{,2}": (0, "")}, "a{,2}")
@example({"\\Z": (0, ""), "\\": (0, "")}, "\\\\Z")
def test_regular_expressions_match_as_re_does(directory: Path, model: Model, regex: str) -> None:
    mapped = Snapshot.open(write(directory, model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "[[" may come to mean a nested set
        try:
            expected = full_matches(regex, model)
        except re.error:
            with pytest.raises(InvalidRequest, match="not a regular expression"):
                mapped.glob_rows(regex, range(len(mapped)))
        else:
            assert mapped.glob_rows(regex, range(len(mapped))).tolist() == expected


def test_matching_keeps_to_the_rows_given(directory: Path) -> None:
    mapped = Snapshot.open(write(directory, {f"a/{n}": (1, "") for n in range(10)}))
    for regex in ("(?s:a/.*)\\Z", r"a/\d"):  # RE2's way and Python's
        assert mapped.glob_rows(regex, range(3, 7)).tolist() == [3, 4, 5, 6]
        assert mapped.glob_rows(regex, range(0)).dtype == np.int64


def test_globs_run_in_re2() -> None:
    for glob in ("train/c0042*/0*.jpg", "**/*.tar", "a b/[!x]?.%#"):
        assert listing.re2_pattern(fsspec.utils.glob_translate(glob)) is not None
    for regex in (r"\d", "(?i:a)", "(?=a)", "a$", "a{2}", "[[:alpha:]]"):
        assert listing.re2_pattern(regex) is None


# Shards


@unhurried
@given(models, st.data())
def test_shards(directory: Path, model: Model, data: st.DataObject) -> None:
    mapped = Snapshot.open(write(directory, model))
    expected = model_shards(model)
    assert as_rows(mapped.shard_table()) == expected
    assert mapped.shard_table() is mapped.shard_table()
    assert mapped.shard_count() == len(mapped.shard_table()) == len(expected)
    start = data.draw(st.integers(0, len(model)))
    stop = data.draw(st.integers(start, len(model)))
    assert as_rows(mapped.shard_table(range(start, stop))) == [e for e in expected if start <= e[2] < stop]
    for row in range(len(model) + 1):
        assert mapped.first_shard(row) == sum(e[2] < row for e in expected)


def test_one_shard_an_object_copies_nothing(directory: Path) -> None:
    model = {f"{n}": (1 + n, "") for n in range(100)}
    mapped = Snapshot.open(write(directory, model))
    table = mapped.shard_table()
    assert as_rows(table) == model_shards(model)
    assert table.keys.base is not None
    assert table.sizes.base is not None
    keys, sizes_ = table.keys[7].tobytes(), table.sizes[7]
    del mapped  # the arrays hold the mapping
    assert (table.keys[7].tobytes(), table.sizes[7]) == (keys, sizes_)


# Identity


@unhurried
@given(models, st.randoms(use_true_random=False))
def test_order_of_listing_does_not_matter(directory: Path, model: Model, shuffler: random.Random) -> None:
    items = list(model.items())
    shuffler.shuffle(items)
    assert write(directory, dict(items)) == write(directory, model)


def test_order_does_not_matter_over_many_batches(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.snapshot_file._ROWS_PER_BATCH", 7)
    model = {f"{n:03}/é": (n, f"v{n}") for n in range(100)}
    backwards = write(directory, dict(reversed(model.items())))
    Snapshot.open(backwards).verify()
    assert write(directory, model) == backwards


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"a": (1, "v"), "b": (2, "v")}, {"shard_size": SHARD_SIZE + 1}),
        ({"a": (1, "v"), "b": (2, "v")}, {"identity": "s3://other"}),
        ({"a": (1, "v"), "b": (3, "v")}, {}),
        ({"a": (1, "v"), "b": (2, "w")}, {}),
        ({"a": (1, "v"), "c": (2, "v")}, {}),
        ({"a": (1, "v")}, {}),
        ({}, {}),
        # The same bytes, cut elsewhere.
        ({"a": (1, ""), "b": (2, "vv")}, {}),
        ({"": (1, "v"), "ab": (2, "v")}, {}),
    ],
)
def test_a_digest_names_the_content(directory: Path, model: Model, changes: dict[str, Any]) -> None:
    assert write(directory, model, **changes) != write(directory, {"a": (1, "v"), "b": (2, "v")})


def test_the_digest_is_the_same_in_every_version(directory: Path) -> None:
    # A change here orphans every snapshot in the field: raise the format's version instead.
    path = write(directory, {"train/é b.jpg": (2500, "v1"), "a": (0, "")})
    assert path.name == "4a8791aaa1c7fcb7c0e2d0352b635cde.arrow"


def test_the_origin_is_a_note(directory: Path) -> None:
    first = write(directory, {"note": (1, "v")})
    assert write(directory, {"note": (1, "v")}, origin="s3a://bucket/prefix") == first
    assert Snapshot.open(first).origin == ORIGIN


# Writing


def test_one_of_the_same_digest_is_left(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": (1, "v")})
    before = path.stat()
    assert write(tmp_path, {"a": (1, "v")}) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", 1, "v"), ("b", 1, "v"), ("a", 2, "w")], "lists 'a' twice"),
        ([("a", -1, "v")], "'a' has no size .but -1."),
        ([("a", None, "v")], "'a' has no size .but None."),
        ([("a", 1.5, "v")], "'a' has no size"),
        ([("a", 1, None)], "'a' has no path or no version"),
        ([(None, 1, "v")], "None has no path or no version"),
        ([("/a", 1, "v")], "'/a' begins or ends with '/'"),
        ([("a/", 0, "v")], "'a/' begins or ends with '/'"),
        ([("a\0b", 1, "v")], "has a NUL"),
        ([("a", 1, "v\0")], "'a' has a NUL"),
        ([("caf\udce9", 1, "v")], r"'caf\\udce9' is not Unicode text"),
        ([("a", 1 << 63, "v")], "choose a larger shard size"),
        ([("a", SHARD_SIZE << 32, "v")], "choose a larger shard size"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        write(tmp_path, {}, rows=rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"shard_size": 0}, {"identity": "a\0b"}, {"identity": "\udce9"}])
def test_an_identity_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="positive shard size"):
        write(tmp_path, {}, **changes)


def test_a_failed_listing_or_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listing_that_fails() -> Iterator[tuple[str, int, str]]:
        yield "a", 1, "v"
        raise ConnectionResetError("the origin hung up")

    with pytest.raises(ConnectionResetError):
        write(tmp_path, {}, rows=listing_that_fails())

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(StoreUnusable, match="No space left on device"):
            write(tmp_path, {"a": (1, "v")})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreUnusable, match="check that the directory exists"):
        write(tmp_path / "missing", {"a": (1, "v")})


# Damage


@contextlib.contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("snapshot")
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


DAMAGED: Model = {f"dir/{n} é": (n * 700, f"v{n}") for n in range(9)}


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path, DAMAGED).read_bytes()
    for length in range(len(content)):
        with memory_file(content[:length]) as fd, pytest.raises(ShardCorrupt, match=f"behind descriptor {fd} is no"):
            Snapshot.from_fd(fd)
    torn = tmp_path / "torn.arrow"
    torn.write_bytes(content[:-1])
    with pytest.raises(ShardCorrupt, match=r"torn\.arrow is no snapshot"):
        Snapshot.open(torn)


def test_a_flipped_bit_changes_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path, DAMAGED)
    content = path.read_bytes()
    whole = Snapshot.open(path)
    expected = as_rows(whole.shard_table()), [whole.entry(row) for row in range(len(whole))]
    found = 0
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with memory_file(bytes(flipped)) as fd:
            try:
                damaged = Snapshot.from_fd(fd)
                damaged.verify()
            except ShardCorrupt:
                found += 1
            else:  # padding, the copy of the schema in the head, the note of the origin
                assert (as_rows(damaged.shard_table()), [damaged.entry(row) for row in range(9)]) == expected
    data_bytes = sum(len(path.encode()) + len(version) + 8 + 8 + 8 + 16 for path, (_, version) in DAMAGED.items())
    assert found > data_bytes


def foreign(path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> Path:
    """A copy of the snapshot at `path` that another program changed and wrote, under the same metadata or not."""
    table = change(pa.ipc.open_file(path).read_all())
    other = path.with_name("other.arrow")
    with pa.ipc.new_file(other, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return other


def with_metadata(**changes: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.replace_schema_metadata(
            table.schema.metadata | {f"shoal.{key}".encode(): value for key, value in changes.items()}
        )

    return change


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (lambda t: t.replace_schema_metadata(None), {}, "its format is unknown"),
        (with_metadata(format="2"), {}, "its format is 2, this version of Shoal reads 1"),
        (with_metadata(digest="../../etc/passwd"), {}, "no snapshot digest"),
        (with_metadata(shard_size="0"), {}, "its metadata is incomplete"),
        (with_metadata(shard_size="much"), {}, "invalid literal"),
        (lambda t: t.drop_columns("version"), {}, "it has other columns"),
        (lambda t: pa.concat_tables([t, t]), {}, "not exactly one record batch"),
        (lambda t: t, {"compression": "zstd"}, "it is compressed"),
        (
            lambda t: t.set_column(1, t.schema.field(1), pa.array([None] * len(t), pa.int64())),
            {},
            "it has nulls",
        ),
    ],
)
def test_a_foreign_arrow_file_is_refused(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], options: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path, {f"{n}" * 50: (n, "v" * 50) for n in range(100)})
    with pytest.raises(ShardCorrupt, match=reason):
        Snapshot.open(foreign(path, change, **options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.take(list(reversed(range(len(t))))).combine_chunks(), "its paths are not sorted"),
        (lambda t: t.take([0, 0]).combine_chunks(), "its paths are not sorted"),
        (lambda t: t.slice(0, 5), "another digest"),
        (with_metadata(identity="s3://other"), "another digest"),
        (with_metadata(digest="0" * 32), "another digest"),
        (
            lambda t: t.set_column(1, t.schema.field(1), pa.array([-1] * len(t), pa.int64())),
            "a negative size",
        ),
        (
            lambda t: t.set_column(3, t.schema.field(3), pa.array([bytes(16)] * len(t), pa.binary(16))),
            "another digest",
        ),
        (
            lambda t: t.set_column(2, t.schema.field(2), pa.array([b"\xff"] * 9, "large_binary").view("large_utf8")),
            "UTF8",
        ),
    ],
)
def test_verify_reads_everything(tmp_path: Path, change: Callable[[pa.Table], pa.Table], reason: str) -> None:
    path = write(tmp_path, DAMAGED)
    with pytest.raises(ShardCorrupt, match=reason):
        Snapshot.open(foreign(path, change)).verify()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not Arrow at all, but longer than any magic number")
    (tmp_path / "empty").touch()
    for name in ("text", "empty"):
        with pytest.raises(ShardCorrupt, match=f"{name} is no snapshot"):
            Snapshot.open(tmp_path / name)
    with pytest.raises(SnapshotNotFound, match="missing does not exist"):
        Snapshot.open(tmp_path / "missing")
    with pytest.raises(StoreUnusable, match="cannot be read"):
        Snapshot.open(tmp_path)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end), pytest.raises(StoreUnusable, match="cannot be mapped"):
        Snapshot.from_fd(read_end)


# Sharing


def test_an_empty_snapshot(tmp_path: Path) -> None:
    empty = Snapshot.open(write(tmp_path, {}))
    empty.verify()
    assert (len(empty), empty.total_bytes, empty.shard_count(), len(empty.shard_table())) == (0, 0, 0, 0)
    assert (empty.find("a"), empty.rows_under(""), empty.list_dir("")) == (None, range(0), ([], []))
    assert empty.is_dir("")
    assert not empty.is_dir("a")
    assert empty.glob_rows(".*", range(0)).tolist() == []


def test_a_descriptor_may_be_closed_and_the_file_unlinked(tmp_path: Path) -> None:
    path = write(tmp_path, DAMAGED)
    fd = os.open(path, os.O_RDONLY)
    mapped = Snapshot.from_fd(fd)
    os.close(fd)
    path.unlink()
    mapped.verify()
    assert f"{path.stem} of {ORIGIN}: 9 objects" in repr(mapped)


def look_around(mapped: Snapshot) -> Any:
    return [
        mapped.find("c5/7"),
        [entry.path for entry in mapped.list_dir("c5")[0]],
        mapped.glob_rows(r"(?s:c5/[^/]*)\Z", range(len(mapped))).tolist(),
        mapped.shard_count(),
    ]


def test_processes_share_the_mapped_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, {f"c{d}/{n}": (n, f"v{n}") for d in range(10) for n in range(200)})
    inherited = Snapshot.open(path)
    expected = look_around(inherited)

    def child(results: Any, fd: int) -> None:
        received = Snapshot.from_fd(fd)
        received.verify()
        answers = [look_around(inherited), look_around(received)]
        inherited.verify()
        results.send((answers, bench.mapping(path)))

    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    with path.open("rb") as file:
        process = context.Process(target=child, args=(sending, file.fileno()))
        process.start()
        answers, mapped = receiving.recv()
        process.join()
    assert process.exitcode == 0
    assert answers == [expected, expected]
    # Two mappings in the child, and not a page of its own in them.
    assert mapped.private_dirty == mapped.anonymous == 0
    assert mapped.rss > path.stat().st_size


def test_the_benchmark_runs(tmp_path: Path) -> None:
    bench.main(["--tiny", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["contenders"]) == {"snapshot", "shoal:// file system", "dict", "dict + directories"}
    assert result["answers"] == {"ls": 40, "info": 1, "exists_hit": 1, "exists_miss": 0, "glob": 6}
    sharing = result["sharing"]
    assert sharing["rss_sum_bytes"] == sharing["processes"] * sharing["pss_sum_bytes"]
    # pyarrow brings pandas in on some calls, where it is installed: 27 MiB in each process.
    assert result["contenders"]["snapshot"]["imported"] == sharing["imported"] == []
