"""What docs/semantics.md says of one reader and no other test asserts; and that each sentence there names its test."""

from __future__ import annotations

import ast
import builtins
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from shoal import errors
from shoal.errors import ClusterUnavailable, DatasetNotFound, OriginChanged, OriginUnavailable, ShoalError
from shoal.filesystem import ShoalFileSystem
from shoal_cachenode.library import Knowledge
from tests.support.minicluster import MiniCluster

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "semantics.md"
PART, SHARD = 64, 256
PLAIN = bytes(i * 37 % 251 for i in range(600))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MiniCluster]:
    with MiniCluster(tmp_path, {"o": PLAIN, "empty": b""}, nodes=2, part_size=PART, shard_size=SHARD) as cluster:
        yield cluster


def settle(cluster: MiniCluster) -> None:
    for node in cluster.nodes:
        cluster.run(node.fills.settle())


# Reads


def test_object_that_was_replaced_is_never_read_in_two_versions(cluster: MiniCluster) -> None:
    """What is cached of it stays readable; a read that needs more fails as a whole."""
    fs = cluster.filesystem()
    assert fs.cat_file("set/o", 0, SHARD) == PLAIN[:SHARD]
    settle(cluster)
    cluster.origin.objects["o"], cluster.origin.versions["o"] = bytes(len(PLAIN)), "2"
    assert fs.cat_file("set/o", 10, SHARD) == PLAIN[10:SHARD]
    for read in (
        lambda: fs.cat_file("set/o"),
        lambda: fs.open("set/o").read(),
        lambda: fs.open_buffer("set/o"),
        lambda: fs.open_buffers("set/o"),
    ):
        with pytest.raises(OriginChanged, match="o has changed: run 'shoal dataset refresh"):
            read()


def test_reads_are_as_long_as_asked_or_the_object_ends(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    for start, length in [(0, 600), (0, 1), (255, 2), (599, 1), (599, 100), (600, 1), (10_000, 5)]:
        wanted = PLAIN[start : start + length]
        into = bytearray(length)
        with fs.open("set/o") as file:
            file.seek(start)
            assert file.read(length) == wanted
            file.seek(start)
            assert file.read_buffer(length).to_pybytes() == wanted
            file.seek(start)
            assert file.readinto(into) == len(wanted)
            assert into[: len(wanted)] == wanted
        assert fs.cat_file("set/o", start, start + length) == wanted


def test_read_that_fails_moves_nothing_and_may_be_tried_again(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    with fs.open("set/o") as file:
        file.seek(300)
        cluster.origin.is_down = True
        for read in (lambda: file.read(100), lambda: file.readinto(bytearray(100)), lambda: file.read_buffer(100)):
            with pytest.raises(OriginUnavailable):
                read()
            assert file.tell() == 300
        cluster.origin.is_down = False
        assert file.read(100) == PLAIN[300:400]
        assert file.tell() == 400


def test_buffers_of_maps_are_read_only(cluster: MiniCluster) -> None:
    cluster.filesystem().cat_file("set/o", 0, SHARD)
    settle(cluster)
    fs = [cluster.filesystem(node=index, local=True) for index in range(2)]
    buffers = [each.open_buffers("set/o")[0] for each in fs]
    mapped = [buffer for buffer in buffers if not buffer.is_mutable]
    assert mapped, "one of the two nodes holds the shard"
    with pytest.raises(TypeError):
        memoryview(mapped[0])[0] = 1


def test_empty_object_asks_nobody(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    fs.ls("set")
    for index in range(2):
        cluster.stop_node(index)
    assert fs.cat_file("set/empty") == b""
    assert fs.open_buffer("set/empty").size == 0


# What is seen


def test_same_options_give_the_same_file_system_and_so_the_same_pins(cluster: MiniCluster) -> None:
    address = cluster.nodes[0].address
    assert ShoalFileSystem(endpoint=address, local=False) is ShoalFileSystem(endpoint=address, local=False)


def test_names_are_answered_without_the_cluster_once_pinned(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    fs.ls("set")
    for index in range(2):
        cluster.stop_node(index)
    assert fs.info("set/o")["size"] == 600
    assert fs.find("set") == ["set/empty", "set/o"]
    assert fs.exists("set/o")
    assert not fs.exists("set/none")


def test_exists_does_not_say_no_where_nobody_answers(cluster: MiniCluster) -> None:
    address = cluster.nodes[0].address
    for index in range(2):
        cluster.stop_node(index)
    with pytest.raises(ClusterUnavailable):
        ShoalFileSystem(endpoint=address, local=False, skip_instance_cache=True).exists("set/o")


def test_removed_dataset_is_not_found_and_what_was_read_of_it_stays(cluster: MiniCluster) -> None:
    cluster.filesystem().cat_file("set/o")
    settle(cluster)
    fs = cluster.filesystem(local=True)
    held = fs.open_buffers("set/o")
    before = cluster.nodes[0].library.knowledge
    for node in cluster.nodes:
        cluster.run(node.apply(Knowledge(before.cluster_map, (), cluster_id=before.cluster_id)))
    assert b"".join(buffer.to_pybytes() for buffer in held) == PLAIN
    fresh = cluster.filesystem()
    with pytest.raises(DatasetNotFound):
        fresh.cat_file("set/o")
    with pytest.raises(FileNotFoundError):
        fresh.ls("set")
    assert fs.info("set/o")["size"] == 600, "its listing is this process's own"


def test_time_of_change_is_when_the_snapshot_was_pinned(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    assert fs.modified("set/o") == fs.modified("set/empty") == fs.locate("set/o")[0].since


def test_threads_may_share_a_file_system(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fs.cat_file("set/o"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [PLAIN] * 8
    assert isinstance(fs.open_buffer("set/o"), pa.Buffer)


# The page

_ITEM = re.compile(r"^- \*\*(?P<id>[A-Z]\d+)\*\* (?P<text>.+)$")
_REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+(?:::\w+)?)`")


def statements() -> dict[str, str]:
    """The sentences of the page by their ids: everything that follows an id in indented lines."""
    found: dict[str, str] = {}
    now = ""
    for line in PAGE.read_text().splitlines():
        item = _ITEM.match(line)
        if item:
            now = item["id"]
            assert now not in found, f"two statements are called {now}"
            found[now] = item["text"]
        elif now and line.startswith("  "):
            found[now] += " " + line.strip()
        else:
            now = ""
    return found


def test_every_statement_names_a_test_that_exists() -> None:
    found = statements()
    assert len(found) > 40
    for name, text in found.items():
        references = _REFERENCE.findall(text)
        assert references, f"{name} names no test: {text}"
        for path, test in references:
            assert test in names_of_tests(ROOT / path), f"{name}: {path} has no {test}"


def test_statements_are_numbered_in_order() -> None:
    by_letter: dict[str, list[int]] = {}
    for name in statements():
        by_letter.setdefault(name[0], []).append(int(name[1:]))
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in by_letter.values()), by_letter


def test_nothing_is_stated_outside_of_the_statements() -> None:
    """After the introduction a line is a heading, a statement, a row of a table or nothing."""
    _, *sections = PAGE.read_text().split("\n## ")
    for section in sections:
        for line in section.splitlines()[1:]:
            assert not line or line.startswith(("- **", "  ", "|")), line


def test_every_promise_of_the_failures_page_has_its_tests() -> None:
    """The files that the table at its top names are there, and every file of fault tests is named on the page."""
    text = (ROOT / "docs" / "failures.md").read_text()
    there = {path.name for path in (ROOT / "tests" / "faults").glob("test_*.py")}
    table = {name for row in re.findall(r"^\|.*\|$", text, re.MULTILINE) for name in re.findall(r"test_\w+\.py", row)}
    assert table <= there, f"no such files: {table - there}"
    assert there <= set(re.findall(r"test_\w+\.py", text)), f"not on the page: {there - table}"


def names_of_tests(path: Path) -> set[str]:
    """Tests of a file, and those of its classes as ``Class::test``; what a state machine is run by counts too."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (each.name for each in node.body if isinstance(each, ast.FunctionDef))
            names |= {f"{node.name}::{method}" for method in methods}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name.rpartition("::")[2].startswith(("test", "Test"))}


def test_table_of_errors_is_the_module() -> None:
    """Each class with the class of Python's own that it also is, as ``except`` sees it."""
    rows = re.findall(r"^\| `(\w+)` \| (?:`(\w+)`)? ?\|", PAGE.read_text(), re.MULTILINE)
    expected = {}
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, ShoalError) and value is not ShoalError:
            bases = [base.__name__ for base in value.__mro__ if base.__module__ == "builtins"]
            own = [base for base in bases if base not in ("Exception", "BaseException", "object")]
            expected[name] = own[0] if own else ""
            assert not own or issubclass(value, getattr(builtins, own[0]))
    assert dict(rows) == expected
