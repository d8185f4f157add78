"""Placement v1 against golden vectors, a second implementation in plain Python, and the properties it promises.

``python -m tests.unit.test_placement`` wrote the golden file. It refuses to write it again: the vectors never change.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import placement as bench
from shoal import placement, rendezvous, shards
from shoal.cluster_map import ClusterMap, Node, NodeState
from shoal.errors import ClusterUnavailable

GOLDEN = Path(__file__).parent.parent / "golden" / "placement_v1.json"
MASK = 2**64 - 1


# ---- a second implementation, one shard and one node at a time


def mix64(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def ln(u: float) -> float:
    m, e = math.frexp(u)
    if m < 0.7071067811865476:
        m, e = m * 2, e - 1
    s = (m - 1) / (m + 1)
    z = s * s
    return 2 * (s * (1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11))))))) + e * 0.6931471805599453


def score(key: bytes, node: Node) -> float:
    h = mix64(int.from_bytes(key[:8], "little") ^ xxhash.xxh3_64_intdigest(node.id.encode()))
    return ln(((h >> 12) + 0.5) / 2**52) / -float(node.weight)


def by_preference(key: bytes, nodes: tuple[Node, ...]) -> list[int]:
    return sorted(range(len(nodes)), key=lambda n: (score(key, nodes[n]), n))


def bounded(keys: list[bytes], sizes: list[int], nodes: tuple[Node, ...]) -> list[int]:
    def words(shard: int) -> tuple[int, ...]:
        return tuple(int.from_bytes(keys[shard][at : at + 8], "little") for at in (0, 8))

    def margin(shard: int) -> float:
        best, second = sorted(score(keys[shard], n) for n in nodes)[:2]
        return second / best

    owners = [by_preference(key, nodes)[0] for key in keys]
    weight = sum(n.weight for n in nodes)
    limits = [106 * sum(sizes) * n.weight // (100 * weight) for n in nodes]
    held, homeless = [0] * len(nodes), []
    for node, limit in enumerate(limits):
        mine = [shard for shard, owner in enumerate(owners) if owner == node]
        if sum(sizes[shard] for shard in mine) > limit:
            mine.sort(key=lambda shard: (-margin(shard), words(shard)))
        while mine and held[node] + sizes[mine[0]] <= limit:
            held[node] += sizes[mine.pop(0)]
        homeless += mine
    for shard in sorted(homeless, key=words):
        ranked = by_preference(keys[shard], nodes)
        fits = [n for n in ranked if held[n] + sizes[shard] <= limits[n]]
        owners[shard] = (fits or [n for n in ranked if held[n] <= limits[n]])[0]
        held[owners[shard]] += sizes[shard]
    return owners


def spread(key: bytes, nodes: tuple[Node, ...], replicas: int, primary: int) -> list[int]:
    others = sorted({label for n in nodes for label in n.topology} - {"zone", "rack", "host"})

    def places(node: Node) -> list[tuple[str, ...]]:
        zone, rack, host, *rest = (node.topology.get(label, "") for label in ("zone", "rack", "host", *others))
        return [(zone,), (zone, rack), (zone, rack, host), *((label,) for label in rest)]

    ranked = by_preference(key, nodes)
    chosen = [primary]
    while len(chosen) < min(replicas, len(nodes)):
        used = [Counter(level) for level in zip(*(places(nodes[n]) for n in chosen), strict=True)]

        def crowding(n: int, used: list[Counter[tuple[str, ...]]] = used) -> list[int]:
            return [counter[place] for counter, place in zip(used, places(nodes[n]), strict=True)]

        chosen.append(min((n for n in ranked if n not in chosen), key=lambda n: (crowding(n), ranked.index(n))))
    return chosen + [n for n in ranked if n not in chosen]


# ---- cases


def make_nodes(*weights: int, prefix: str = "node") -> tuple[Node, ...]:
    return tuple(Node(f"{prefix}-{i:03}", f"10.0.0.{i}:7450", weight) for i, weight in enumerate(weights))


def racked(*places: str, labels: tuple[str, ...] = ("zone", "rack", "host")) -> tuple[Node, ...]:
    """One node a place, ``a/1/x`` or shorter; an empty field is a missing label."""
    return tuple(
        Node(f"node-{i:03}", f"10.0.0.{i}:7450", 1, {k: v for k, v in zip(labels, p.split("/"), strict=False) if v})
        for i, p in enumerate(places)
    )


def make_keys(count: int, seed: int = 0) -> npt.NDArray[np.uint64]:
    counters = np.arange(2 * count, dtype=np.uint64) + np.uint64((seed + 1) << 32)
    return shards.mix64(counters).reshape(count, 2)


def as_bytes(keys: npt.NDArray[np.uint64]) -> list[bytes]:
    return [row.astype("<u8").tobytes() for row in keys]


@dataclass(frozen=True)
class Table:
    keys: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, count: int, sizes: str = "equal", seed: int = 0) -> Table:
        drawn = (shards.mix64(np.arange(1, count + 1, dtype=np.uint64)) % np.uint64(256 << 20)).astype(np.int64) + 1
        return cls(make_keys(count, seed), drawn if sizes == "drawn" else np.full(count, 256 << 20, np.int64))


def place(table: Table, nodes: tuple[Node, ...], replicas: int = 1) -> placement.Placement:
    return placement.Placement(lambda: table, len(table.keys), ClusterMap(7, nodes), replicas)


# ---- golden vectors


def digest(array: npt.NDArray[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(array.tobytes())


def table_digests(table: Table, nodes: tuple[Node, ...], replicas: int) -> dict[str, str]:
    placed = place(table, nodes, replicas)
    owned = np.stack([placed.owned_by(n.id) for n in nodes[:8]])
    return {"primaries": digest(placed.primaries().astype("<u2")), "owned": digest(np.packbits(owned, axis=1))}


def write_golden() -> None:
    with GOLDEN.open("x") as file:  # never over an existing one
        file.write(golden_text())


def golden_text() -> str:
    tib = 1 << 40
    clusters = {
        "one": make_nodes(tib),
        "three equal": make_nodes(tib, tib, tib),
        "eight drives": make_nodes(*(tib * w for w in (1, 1, 1, 1, 2, 2, 4, 4))),
        "odd weights and names": tuple(
            sorted(
                (Node(name, "h:1", w) for name, w in (("é", 1), ("节点", 3), ("", 7), ("a b%", 2**53 + 1))), key=id_of
            )
        ),
        "zones, racks, hosts": racked(
            *(f"{zone}/{rack}/{zone}{rack}{host}" for zone in "abc" for rack in "12" for host in "xy")
        ),
        "some labels missing": racked("a/1/x", "a/1/y", "a//z", "b", "", "b/1/x", "//x"),
        "other labels": racked("1/p", "1/q", "2/p", "2/q", "3/p", labels=("chassis", "power")),
        "hundred": make_nodes(*(tib * (1 + i % 4) for i in range(100))),
    }
    keys = as_bytes(make_keys(25))
    orders = [
        {
            "cluster": name,
            "key": key.hex(),
            "replicas": 1 + i % 4,
            "ids": [n.id for n in placement.order(key, nodes, 1 + i % 4)],
        }
        for name, nodes in clusters.items()
        for i, key in enumerate(keys)
    ]
    tables = [
        {"cluster": name, "shards": count, "sizes": sizes, "replicas": replicas}
        | table_digests(Table.of(count, sizes), clusters[name], replicas)
        for name, count, sizes, replicas in (
            ("eight drives", 4000, "equal", 1),
            ("eight drives", 4000, "drawn", 2),
            ("eight drives", 11, "equal", 2),
            ("zones, racks, hosts", 2000, "drawn", 4),
            ("some labels missing", 500, "equal", 3),
            ("hundred", 20_000, "equal", 2),
            ("hundred", 60, "drawn", 3),
            ("eight drives", 300_000, "equal", 1),
        )
    ]
    described = {
        name: [{"id": n.id, "weight": n.weight, "topology": n.topology} for n in nodes]
        for name, nodes in clusters.items()
    }
    return "".join(
        [
            '{"scheme": "v1",\n"clusters": {\n',
            ",\n".join(f"{json.dumps(name)}: {json.dumps(nodes)}" for name, nodes in described.items()),
            '\n},\n"orders": [\n',
            ",\n".join(map(json.dumps, orders)),
            '\n],\n"tables": [\n',
            ",\n".join(map(json.dumps, tables)),
            "\n]}\n",
        ]
    )


def id_of(node: Node) -> str:
    return node.id


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(GOLDEN.read_text())
    raw["clusters"] = {
        name: tuple(Node(n["id"], "h:1", n["weight"], n["topology"]) for n in nodes)
        for name, nodes in raw["clusters"].items()
    }
    return raw


def test_orders_are_the_golden_ones(golden: dict[str, Any]) -> None:
    assert len(golden["orders"]) == 200
    for case in golden["orders"]:
        nodes = golden["clusters"][case["cluster"]]
        assert [n.id for n in placement.order(bytes.fromhex(case["key"]), nodes, case["replicas"])] == case["ids"], case


def test_whole_tables_are_the_golden_ones(golden: dict[str, Any]) -> None:
    for case in golden["tables"]:
        table = Table.of(case["shards"], case["sizes"])
        found = table_digests(table, golden["clusters"][case["cluster"]], case["replicas"])
        assert found == {name: case[name] for name in found}, case


def test_golden_file_is_never_written_again() -> None:
    with pytest.raises(FileExistsError):
        write_golden()


def test_other_processes_agree_whatever_their_hash_seed() -> None:
    code = (
        "from tests.unit.test_placement import *\n"
        "print(table_digests(Table.of(3000, 'drawn'), racked(*(f'z{i % 3}/r{i % 2}/{i}' for i in range(9))), 3))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    here = table_digests(Table.of(3000, "drawn"), racked(*(f"z{i % 3}/r{i % 2}/{i}" for i in range(9))), 3)
    assert printed == {str(here)}


# ---- scores


@given(st.integers(0, 2**52 - 1))
def test_logarithm_is_accurate_and_the_same_one_by_one(bits: int) -> None:
    u = (bits + 0.5) / 2**52
    found = float(rendezvous.ln(np.array([u]))[0])
    assert found == ln(u)
    assert found == pytest.approx(math.log(u), rel=1e-9, abs=0)


@pytest.mark.parametrize("u", [0.5 / 2**52, 0.25, 0.5, math.nextafter(math.sqrt(0.5), 0), math.sqrt(0.5), 1 - 2**-53])
def test_logarithm_at_its_seams(u: float) -> None:
    assert float(rendezvous.ln(np.array([u]))[0]) == pytest.approx(math.log(u), rel=1e-9, abs=0)


def test_hashes_become_numbers_inside_the_open_interval() -> None:
    ends = rendezvous._unit(np.array([0, MASK], np.uint64))
    assert ends.tolist() == [2**-53, 1 - 2**-53]


keys_st = st.binary(min_size=16, max_size=16)
weights_st = st.lists(st.integers(1, 2**60), min_size=1, max_size=12)


@given(keys_st, weights_st)
def test_preference_is_that_of_the_second_implementation(key: bytes, weights: list[int]) -> None:
    nodes = make_nodes(*weights)
    assert list(placement.preference(key, nodes)) == by_preference(key, nodes)


@given(weights_st, st.integers(0, 1000))
def test_winners_are_the_most_preferred_in_doubt_or_not(weights: list[int], seed: int) -> None:
    nodes, keys = make_nodes(*weights), make_keys(40, seed)
    contest = rendezvous.Contest(nodes)
    assert contest.winners(keys[:, 0]).tolist() == [by_preference(key, nodes)[0] for key in as_bytes(keys)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "_DOUBT", math.inf)
        assert contest.winners(keys[:, 0]).tolist() == contest.scores(keys[:, 0]).argmin(axis=1).tolist()


def test_equal_scores_go_to_the_first_node() -> None:
    twins = (Node("same", "a:1", 5), Node("same", "b:1", 5))
    assert placement.preference(bytes(16), twins) == (0, 1)
    assert not rendezvous.Contest(twins).winners(make_keys(100)[:, 0]).any()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    table, nodes = Table.of(3000, "drawn"), racked(*(f"z{i % 3}/r{i % 2}/{i}" for i in range(9)))
    whole = table_digests(table, nodes, 3)
    monkeypatch.setattr(rendezvous, "_ROWS", 7)
    monkeypatch.setattr(rendezvous, "_ELEMENTS", 100)
    assert table_digests(table, nodes, 3) == whole


def test_shares_follow_the_weights() -> None:
    nodes = make_nodes(1, 1, 2, 4)
    counts = np.bincount(rendezvous.Contest(nodes).winners(make_keys(100_000)[:, 0]))
    assert counts / 100_000 == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 2], rel=0.02)


# ---- movement


@given(st.lists(st.integers(1, 100), min_size=2, max_size=9), st.data())
def test_a_lost_node_moves_only_its_own_shards(weights: list[int], data: st.DataObject) -> None:
    nodes = make_nodes(*weights)
    lost = data.draw(st.sampled_from(nodes))
    key = data.draw(keys_st)
    left = tuple(n for n in nodes if n is not lost)
    before = [nodes[n] for n in placement.preference(key, nodes)]
    assert [left[n] for n in placement.preference(key, left)] == [n for n in before if n is not lost]


@given(st.lists(st.integers(1, 100), min_size=2, max_size=9), st.integers(101, 1000), st.data())
def test_a_larger_drive_only_gains_and_only_for_itself(weights: list[int], grown: int, data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(weights) - 1))
    words = make_keys(200, data.draw(st.integers(0, 100)))[:, 0]
    before = rendezvous.Contest(make_nodes(*weights)).winners(words)
    weights[which] = grown
    after = rendezvous.Contest(make_nodes(*weights)).winners(words)
    assert (after[before != after] == which).all()


# ---- the bound


tables_st = st.lists(st.integers(0, 1000), min_size=0, max_size=60)


@given(tables_st, st.lists(st.integers(1, 8), min_size=1, max_size=10), st.integers(0, 1000))
@settings(max_examples=200)
def test_primaries_are_those_of_the_second_implementation(sizes: list[int], weights: list[int], seed: int) -> None:
    keys, nodes = make_keys(len(sizes), seed), make_nodes(*weights)
    found = placement.primaries(keys, np.array(sizes, np.int64), nodes)
    assert found.dtype == np.uint16
    assert found.tolist() == bounded(as_bytes(keys), sizes, nodes)


@given(tables_st, st.lists(st.integers(1, 8), min_size=1, max_size=10), st.integers(0, 1000))
@settings(max_examples=200)
def test_no_node_is_more_than_a_shard_over_its_limit(sizes: list[int], weights: list[int], seed: int) -> None:
    keys, nodes = make_keys(len(sizes), seed), make_nodes(*weights)
    owners = placement.primaries(keys, np.array(sizes, np.int64), nodes)
    first = rendezvous.Contest(nodes).winners(keys[:, 0])
    limits = [106 * sum(sizes) * w // (100 * sum(weights)) for w in weights]
    for node, limit in enumerate(limits):
        assert np.array(sizes, np.int64)[owners == node].sum() <= limit + max(sizes, default=0)
        if np.array(sizes, np.int64)[first == node].sum() <= limit:
            assert (owners[first == node] == node).all()


@pytest.mark.parametrize("sizes", ["equal", "drawn"])
def test_load_is_within_the_bound_where_shards_are_many(sizes: str) -> None:
    table, weights = Table.of(4000, sizes), (1, 1, 1, 1, 2, 2, 4, 4)
    total = int(table.sizes.sum())
    nodes = make_nodes(*weights, prefix="set0")
    pure = np.bincount(rendezvous.Contest(nodes).winners(table.keys[:, 0]), weights=table.sizes)
    loads = np.bincount(placement.primaries(table.keys, table.sizes, nodes), weights=table.sizes)
    fair = np.array(weights) / 16 * total
    assert (pure / fair).max() > placement.LOAD_BOUND  # or this would show nothing
    assert (loads / fair).max() <= placement.LOAD_BOUND


@pytest.mark.parametrize("seed", range(20))
def test_a_handful_of_shards_spreads(seed: int) -> None:
    table = Table.of(3, seed=seed)
    assert len(set(placement.primaries(table.keys, table.sizes, make_nodes(*[1] * 8)).tolist())) == 3
    table = Table.of(16, seed=seed)
    counts = np.bincount(placement.primaries(table.keys, table.sizes, make_nodes(*[1] * 8)))
    assert counts.tolist() == [2] * 8


def test_a_shard_larger_than_every_limit_stays_with_its_first_choice() -> None:
    keys, sizes, nodes = make_keys(101), np.array([10**12, *[1] * 100], np.int64), make_nodes(1, 1, 1, 1)
    owners = placement.primaries(keys, sizes, nodes)
    assert owners[0] == placement.preference(as_bytes(keys)[0], nodes)[0]
    assert (np.bincount(owners[1:], minlength=4) > 0).sum() >= 3  # the crumbs have the other nodes


def test_row_order_does_not_matter() -> None:
    table, nodes = Table.of(500, "drawn"), make_nodes(1, 1, 2, 3)
    back = placement.primaries(table.keys[::-1], table.sizes[::-1], nodes)[::-1]
    assert back.tolist() == placement.primaries(table.keys, table.sizes, nodes).tolist()


def test_large_snapshots_are_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    table, nodes = Table.of(200), make_nodes(1, 1, 2, 4)
    pure = rendezvous.Contest(nodes).winners(table.keys[:, 0]).tolist()
    assert placement.primaries(table.keys, table.sizes, nodes).tolist() != pure
    monkeypatch.setattr(placement, "BOUND_MAX_SHARDS", 199)
    assert placement.primaries(table.keys, table.sizes, nodes).tolist() == pure


def test_shards_without_nodes_are_refused() -> None:
    table = Table.of(1)
    with pytest.raises(ClusterUnavailable, match="no cache node"):
        placement.primaries(table.keys, table.sizes, ())
    assert placement.primaries(table.keys[:0], table.sizes[:0], ()).tolist() == []
    assert placement.primaries(table.keys[:0], table.sizes[:0], make_nodes(1)).tolist() == []


# ---- replicas


labels_st = st.dictionaries(
    st.sampled_from(["zone", "rack", "host", "chassis", "power"]), st.sampled_from(["a", "b", "c"]), max_size=5
)


@given(keys_st, st.lists(st.tuples(st.integers(1, 5), labels_st), min_size=1, max_size=9), st.data())
@settings(max_examples=200)
def test_order_is_that_of_the_second_implementation(
    key: bytes, described: list[tuple[int, dict[str, str]]], data: st.DataObject
) -> None:
    nodes = tuple(Node(f"n{i}", "h:1", weight, topology) for i, (weight, topology) in enumerate(described))
    replicas = data.draw(st.integers(1, len(nodes) + 2))
    primary = data.draw(st.none() | st.integers(0, len(nodes) - 1))
    expected = spread(key, nodes, replicas, by_preference(key, nodes)[0] if primary is None else primary)
    assert placement.order(key, nodes, replicas, primary=primary) == tuple(nodes[n] for n in expected)


def owner_places(nodes: tuple[Node, ...], replicas: int, *labels: str) -> set[tuple[tuple[str, ...], ...]]:
    """Over many keys, the places (sorted) that the owners have."""
    orders = [placement.order(key, nodes, replicas) for key in as_bytes(make_keys(100))]
    return {tuple(sorted(tuple(n.topology[k] for k in labels) for n in order[:replicas])) for order in orders}


def test_replicas_take_another_zone_first() -> None:
    nodes = racked("a/1/x", "a/2/y", "a/3/z", "b/1/x")
    assert owner_places(nodes, 2, "zone") == {(("a",), ("b",))}


def test_replicas_take_another_rack_where_zones_run_out() -> None:
    nodes = racked("a/1/p", "a/1/q", "a/1/r", "a/2/s")
    assert owner_places(nodes, 2, "rack") == {(("1",), ("2",))}


def test_replicas_take_another_host_where_racks_run_out() -> None:
    nodes = racked("a/1/p", "a/1/p", "a/1/p", "a/1/q")
    assert owner_places(nodes, 2, "host") == {(("p",), ("q",))}


def test_replicas_divide_evenly_over_zones() -> None:
    nodes = racked("a/1/1", "a/2/2", "a/3/3", "a/4/4", "b/1/5", "b/2/6")
    assert owner_places(nodes, 4, "zone") == {(("a",), ("a",), ("b",), ("b",))}


def test_racks_of_one_name_in_two_zones_are_two_racks() -> None:
    same, distinct = racked("a/1", "b/1", "b/1"), racked("a/1", "b/2", "b/3")
    for key in as_bytes(make_keys(50)):
        assert [n.id for n in placement.order(key, same, 2)] == [n.id for n in placement.order(key, distinct, 2)]


def test_without_topology_replicas_follow_preference() -> None:
    nodes = make_nodes(1, 2, 3, 4, 5)
    for key in as_bytes(make_keys(50)):
        assert placement.order(key, nodes, 3) == tuple(nodes[n] for n in placement.preference(key, nodes))


def test_replicas_are_capped_at_the_nodes() -> None:
    assert len(placement.order(bytes(16), make_nodes(1, 1), 5)) == 2
    assert place(Table.of(3), make_nodes(1, 1), 5).replicas == 2
    assert placement.order(bytes(16), (), 2) == ()


def test_more_labels_than_digits_are_cut_not_overflowed() -> None:
    nodes = tuple(
        Node(f"n{i}", "h:1", 1, {f"label{j:02}": str((i >> (j % 3)) & 1) for j in range(80)} | {"zone": str(i % 2)})
        for i in range(8)
    )
    assert owner_places(nodes, 2, "zone") == {(("0",), ("1",))}
    assert owner_places(nodes, 4, "zone") == {(("0",), ("0",), ("1",), ("1",))}


# ---- a placement of one snapshot


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_placement_agrees_with_itself_in_every_form(replicas: int) -> None:
    table, nodes = Table.of(300, "drawn"), racked(*(f"z{i % 3}/r{i % 2}/{i}" for i in range(7)))
    placed = place(table, nodes, replicas)
    primaries = placement.primaries(table.keys, table.sizes, nodes)
    orders = [placed.order(i) for i in range(300)]
    keys = as_bytes(table.keys)
    assert orders == [placement.order(keys[i], nodes, replicas, primary=int(primaries[i])) for i in range(300)]
    assert orders == [placed.order(i, keys[i]) for i in range(300)]
    some = np.array([5, 299, 0, 5])
    for node in nodes:
        owned = [node in order[:replicas] for order in orders]
        assert placed.owned_by(node.id).tolist() == owned
        assert placed.owned_by(node.id, some).tolist() == [owned[i] for i in some]
        assert placed.primary_of(node.id).tolist() == [order[0] == node for order in orders]


def test_only_nodes_that_may_own_take_part() -> None:
    up = Node("b", "b:1", 1)
    nodes = (
        Node("a", "a:1", 9, state=NodeState.DOWN),
        up,
        Node("c", "c:1", 9, state=NodeState.DRAINING),
        Node("d", "d:1", 0),
    )
    placed = place(Table.of(20), nodes, 2)
    assert [placed.order(i) for i in range(20)] == [(up,)] * 20
    assert placed.owned_by("b").all()
    for absent in ("a", "c", "d", "unheard of"):
        assert placed.owned_by(absent).tolist() == placed.primary_of(absent).tolist() == [False] * 20
        assert placed.owned_by(absent, np.array([1, 2])).tolist() == [False] * 2


def test_the_order_of_nodes_in_the_map_does_not_matter() -> None:
    table, nodes = Table.of(50), make_nodes(1, 1, 2)
    one, other = place(table, nodes, 2), place(table, nodes[::-1], 2)
    assert [one.order(i) for i in range(50)] == [other.order(i) for i in range(50)]


def test_a_cluster_without_nodes_says_so() -> None:
    placed = place(Table.of(5), ())
    with pytest.raises(ClusterUnavailable, match=r"no cache node is up \(cluster map epoch 7\): start one"):
        placed.order(0)
    with pytest.raises(ClusterUnavailable):
        placed.primaries()
    assert placed.owned_by("a").tolist() == [False] * 5


def test_an_empty_snapshot_has_no_owners() -> None:
    placed = place(Table.of(0), make_nodes(1, 1), 2)
    assert placed.primaries().shape == placed.owned_by("node-000").shape == placed.primary_of("node-000").shape == (0,)


def test_an_ordinal_past_the_end_is_an_error() -> None:
    with pytest.raises(IndexError):
        place(Table.of(5), make_nodes(1, 1)).order(5)


def test_a_large_snapshot_is_read_without_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Table:
        raise AssertionError("asked for the table")

    monkeypatch.setattr(placement, "BOUND_MAX_SHARDS", 9)
    nodes, key = make_nodes(1, 2, 3), bytes(range(16))
    placed = placement.Placement(refuse, 10, ClusterMap(1, nodes), 2)
    assert placed.order(3, key) == placement.order(key, nodes, 2)
    table = Table.of(10)
    assert place(table, nodes, 2).order(3) == placement.order(as_bytes(table.keys)[3], nodes, 2)


def test_threads_share_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    table, calls, start = Table.of(2000), [], threading.Barrier(8)
    compute = placement.primaries

    def counted(*args: Any) -> npt.NDArray[np.uint16]:
        calls.append("primaries")
        return compute(*args)

    def make() -> Table:
        calls.append("table")
        return table

    monkeypatch.setattr(placement, "primaries", counted)
    placed = placement.Placement(make, 2000, ClusterMap(1, make_nodes(1, 1, 2)), 2)

    def read(_: int) -> list[tuple[Node, ...]]:
        start.wait()
        return [placed.order(i) for i in range(200)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(read, range(8)))
    assert calls == ["table", "primaries"]
    assert all(answer == answers[0] for answer in answers)


def test_a_child_forked_in_the_middle_of_a_computation_computes_its_own() -> None:
    placed = place(Table.of(100), make_nodes(1, 1, 2))
    with placement._computing:
        child = os.fork()
        if not child:
            signal.alarm(20)  # the parent's lock, held for ever in the child, would hang it
            os._exit(0 if placed.order(0) else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- the benchmark


def test_benchmark_runs_tiny(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench.main, ["--tiny", "--json", str(tmp_path / "result.json")], catch_exceptions=False)
    assert result.exit_code == 0
    saved = json.loads((tmp_path / "result.json").read_text())
    rows = saved["balance"]["many"]
    assert rows["weighted rendezvous"]["loss"]["aggregate"] == 1
    assert rows["mod N"]["loss"]["aggregate"] > 5
    assert all(name in result.output for name in rows)


if __name__ == "__main__":
    write_golden()
