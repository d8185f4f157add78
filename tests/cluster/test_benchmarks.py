"""The benchmarks, tiny: every comparison runs or says why it does not. No figure of theirs is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks_main
from benchmarks import cold, contest, mounted, mounts, other_node, path_reads, prefetch, same_node
from benchmarks.harness import Outcome, Series, Spread, Turn, cpu_seconds, percentile
from benchmarks.report import Findings
from benchmarks.stage import TINY, scale

ROOT = Path(__file__).parents[2]


def expected_rows() -> set[tuple[int, str]]:
    """(claim, what) of every row, whether it ran or not."""
    sizes = [c.name for c in TINY.cold]
    modes = [(kind, mode) for kind in (other_node.FRESH, other_node.REUSED) for mode in (other_node.ON, other_node.OFF)]
    rows = {(1, same_node.SCAN)}
    rows |= {(1, what.format(TINY.processes)) for what in (same_node.SCAN_ARROW, same_node.SCAN_PRIVATE)}
    rows |= {(2, same_node.OPEN_FIRST), (2, same_node.OPEN_AGAIN), (3, same_node.WHOLE)}
    rows |= {(4, other_node.STREAM.format(kind, mode)) for kind, mode in modes}
    rows |= {(4, other_node.STREAM_CPU.format(mode)) for mode in (other_node.ON, other_node.OFF)}
    rows |= {(5, other_node.RANDOM_P50), (5, other_node.SEEKING_P50), (5, other_node.RANDOM_P99)}
    rows |= {(5, other_node.RANDOM_RATE), (5, other_node.RANGES.format(TINY.ranges))}
    rows |= {(6, other_node.WARM), (6, other_node.WARM_PER_CPU), (6, mounts.SEQUENTIAL), (6, mounts.RANDOM)}
    rows |= {(7, what.format(size)) for what in (cold.WHOLE, cold.FIRST) for size in sizes}
    return rows | {(8, prefetch.what(nodes)) for nodes in prefetch.NODES}


def test_every_comparison_runs_or_says_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--workdir", str(tmp_path)]
    command += ["--json", str(tmp_path / "reads.json"), "--svg", str(tmp_path / "reads.svg")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr or "matplotlib is not installed" in done.stderr, "progress is for terminals"
    result = json.loads((tmp_path / "reads.json").read_text())
    rows = result["rows"]
    assert {(row["claim"], row["what"]) for row in rows} == expected_rows()
    peers = {row["peer"].split()[0] for row in rows}
    assert peers >= {"mmap", "plain", "fsspec", "Flight", "grpcio", "s3fs", "obstore", "JuiceFS", "rclone", "iperf3"}
    for row in rows:
        if row["skipped"]:
            assert row["ratio"] is None and row["skipped"] in done.stdout
        else:
            assert row["ratio"] > 0 and row["ours"]["median"] >= 0 and row["theirs"]["median"] > 0
        assert row["is_met"] is None, "a tiny run judges nothing"
        assert row["what"] in done.stdout
    assert result["machine"]["cores"] and result["notes"] and not result["broke"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"reads.json", "reads.svg"}
    if "reads.svg" in left:
        assert xml.etree.ElementTree.parse(tmp_path / "reads.svg").getroot().tag.endswith("svg")


def test_help_has_examples() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Examples:" in done.stdout and all(name in done.stdout for name in benchmarks_main.SECTIONS)


def series(name: str, *turns: tuple[float, int, float]) -> Series:
    return Series(name, tuple(Turn(Outcome(seconds, size, {"p50_ms": seconds}), cpu) for seconds, size, cpu in turns))


def test_ratios_above_one_are_better_for_shoal() -> None:
    ours = series("shoal", (1, 4 * 10**9, 1), (2, 4 * 10**9, 1), (4, 4 * 10**9, 3))
    theirs = series("other", (4, 4 * 10**9, 2), (4, 4 * 10**9, 2), (4, 4 * 10**9, 2))
    findings = Findings()
    findings.rate(1, "rate", ours, theirs, 2.0)
    findings.per_cpu(1, "per CPU", ours, theirs, 2.1)
    findings.value(1, "time", ours, theirs, "p50_ms", "ms")
    findings.limit(1, "limit", Spread.of([50.0]), 100, "us")
    rate, per_cpu, time, limit = findings.rows
    assert (rate.ours, rate.ratio, rate.is_met) == (Spread(2, 1, 4), 2.0, True)
    assert (rate.our_cpu_s_per_gb, rate.their_cpu_s_per_gb) == (0.25, 0.5)
    assert (per_cpu.ratio, per_cpu.is_met) == (2.0, False)
    assert (time.ratio, time.is_met) == (2.0, None)
    assert (limit.ratio, limit.is_met) == (2.0, True)


def test_what_a_process_cost_includes_its_children() -> None:
    burn = "sum(range(3_000_000))"
    before = cpu_seconds([os.getpid()])
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert cpu_seconds([os.getpid()]) > before
    assert cpu_seconds([2**22 + 1]) == 0


def test_a_set_is_as_large_as_asked() -> None:
    full = scale(4 << 30, 5)
    assert full.objects == 17 and full.object_bytes == 256 << 20
    assert scale(768 << 20, 1).objects >= 3


@pytest.mark.parametrize(("percent", "wanted"), [(0, 1), (50, 3), (99, 4), (100, 4)])
def test_percentile(percent: float, wanted: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == wanted


def test_retention_runs_tiny(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.retention", "--tiny", "--workdir", str(tmp_path)]
    command += ["--json", str(tmp_path / "retention.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "retention.json").read_text())
    epochs = [each for part in result["parts"] for each in part["epochs"]]
    assert len(epochs) == 8 and result["wrong_objects"] == 0
    for each in epochs:  # exact: what is kept is kept
        assert each["hit_ratio"] == (0.0 if each["epoch"] == 1 else 0.5)
    assert "met: at least 0.500" in done.stdout


@pytest.mark.long
def test_membership_runs_tiny(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.membership", "--tiny", "--workdir", str(tmp_path)]
    command += ["--json", str(tmp_path / "membership.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "membership.json").read_text())
    assert (result["errors"], result["wrong"]) == (0, 0), result["first_error"]
    assert len(result["changes"]) == 2
    for each in result["changes"]:  # bytes are exact; times mean nothing here
        assert each["origin_bytes"] == 0
        assert each["map_gives_bytes"] <= each["moved_bytes"] <= 1.05 * each["map_gives_bytes"]
        assert each["calm"]["reads"] and each["what"] in done.stdout


@pytest.mark.long
def test_epochs_runs_tiny(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.epochs", "--tiny", "--workdir", str(tmp_path)]
    command += ["--json", str(tmp_path / "epochs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "epochs.json").read_text())
    size = result["dataset_bytes"]
    for each in result["cases"]:  # that each sample came once is the run's own check; times mean nothing here
        assert each["name"] in done.stdout
        assert each["open_bytes"] + each["missed_bytes"] >= (1 - each["held"]) * size
        assert 0 < sum(each["stalls_s"].values()) <= each["epoch_s"]
    assert result["four_jobs"]["origin_bytes"] >= size


def test_loaders_runs_tiny(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.loaders", "--tiny", "--workdir", str(tmp_path)]
    command += ["--json", str(tmp_path / "loaders.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "loaders.json").read_text())
    assert set(result) == {"tokens", "images"}
    for each in result.values():  # that each sample came once is the run's own check; times mean nothing here
        assert set(each["contenders"]) == {"files", "gathered", "stream", "samples"}
        assert set(each["skipped"]) == {"mosaic", "webdataset", "datasets"}
        assert all(one["cpu_s_per_gb"] > 0 for one in each["contenders"].values())


MOUNTS = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="mounting takes root and /dev/fuse"
)


def run_mounted(tmp_path: Path, *args: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "benchmarks.mounted", "--tiny", "--workdir", str(tmp_path), *args]
    command += ["--json", str(tmp_path / "mounted.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "mounted.json").read_text())
    for line in (line for lines in result["sections"].values() for line in lines):
        assert line["rate"]["least"] > 0 and line["what"] in done.stdout and line["who"] in done.stdout
    assert "MISSED" not in done.stdout, "a tiny run judges nothing"
    assert {path.name for path in tmp_path.iterdir()} == {"mounted.json"}
    return result, done.stdout


@MOUNTS
def test_mounted_runs_tiny(tmp_path: Path) -> None:
    result, _ = run_mounted(tmp_path)
    large, small = (mounted.SEQUENTIAL, mounted.RANDOM, mounted.MAP), (mounted.OPENS, mounted.FIND)
    plainly = [(what, who) for what in large for who in (mounted.MOUNT, mounted.PLAIN, mounted.SEALED)]
    plainly += [(what, who) for what in small for who in (mounted.MOUNT, mounted.PLAIN)]
    firsts = [(mounted.FIRST, who) for who in (mounted.MOUNT, mounted.STEPS, mounted.WHOLE)]
    found = {name: [(line["what"], line["who"]) for line in lines] for name, lines in result["sections"].items()}
    assert found == {"beside plain files": plainly, "first read": firsts}
    judged = {(line["what"], line["who"]): line["target"] for lines in result["sections"].values() for line in lines}
    assert {key: target for key, target in judged.items() if target} == {
        **{(what, mounted.PLAIN): target for what, target in mounted.TARGETS.items()},
        **{(mounted.FIRST, who): target for who, target in mounted.FIRST_TARGETS.items()},
    }
    assert result["reports"]["large"]["opens_passthrough"] > 0
    assert result["reports"]["small"]["opens_silently"]
    assert result["reports"]["first"]["opens_passthrough"] == 0, "the bytes came from another node"
    assert not result["left_out"]


@pytest.mark.long
@MOUNTS
def test_mounted_runs_tiny_beside_peers(tmp_path: Path) -> None:
    result, told = run_mounted(tmp_path, "--peers")
    running = {line["who"] for line in result["sections"].get("beside peers", [])} & set(mounted.PEER_TARGETS)
    assert running | set(result["left_out"]) == set(mounted.PEER_TARGETS)
    assert all(reason in told for reason in result["left_out"].values())
    if running:
        assert {line["who"] for line in result["sections"]["first read"]} >= running | {mounted.COLD}


def test_a_line_says_what_its_rate_cost() -> None:
    def operations(name: str, *turns: tuple[float, float]) -> Series:
        outcomes = [Outcome(seconds, 0, {path_reads.OPERATIONS: 100}) for seconds, _ in turns]
        return Series(name, tuple(Turn(o, cpu, cpu / 2) for o, (_, cpu) in zip(outcomes, turns, strict=True)))

    ours, theirs = operations("ours", (1, 2), (2, 2), (4, 2)), operations("theirs", (4, 8), (4, 8), (4, 8))
    first, other = contest.judge("opens", [ours, theirs], {"theirs": 2.1})
    assert (first.rate, first.ratio, first.is_met) == (Spread(50, 25, 100), None, None)
    assert (other.rate.median, other.ratio, other.is_met) == (25, 2.0, False)
    assert (other.cpu_s, other.servers_cpu_s, other.is_operations) == (80, 40, True)
    by_bytes = series("ours", (2, 4 * 10**9, 1))
    (line,) = contest.judge("bytes", [by_bytes], {})
    assert (line.rate.median, line.cpu_s, line.is_operations) == (2e9, 0.25, False)
