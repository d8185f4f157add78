"""The worked example of docs/streaming.md: 2 processes, a checkpoint, then 4; and a run that was not interrupted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.support.minicluster import MiniCluster

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def objects(directory: Path) -> dict[str, bytes]:
    subprocess.run([sys.executable, EXAMPLES / "make_data.py", directory], check=True)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def train(cluster: MiniCluster, processes: int, *words: str) -> list[str]:
    """The lines that a run prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"SHOAL_ENDPOINT": cluster.nodes[0].address, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, EXAMPLES / "train.py", "shoal://set", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("step ")]


def test_a_run_that_was_interrupted_goes_on_with_twice_the_processes(tmp_path: Path) -> None:
    assert importlib.util.find_spec("torch.distributed.run")
    checkpoint = str(tmp_path / "half.pt")
    with MiniCluster(tmp_path / "c", objects(tmp_path / "data"), nodes=2, part_size=1 << 16) as cluster:
        whole = train(cluster, 1, "--steps", "100")
        first = train(cluster, 2, "--steps", "30", "--checkpoint", checkpoint)  # in the middle of the first epoch
        second = train(cluster, 4, "--steps", "100", "--resume", checkpoint)
    assert [line.split()[1] for line in whole] == [str(step) for step in range(1, 101)]
    assert (first[-1].split()[3], whole[-1].split()[3]) == ("0", "1")
    assert first + second == whole
    losses = [float(line.split()[-1]) for line in whole]
    assert losses[-1] < losses[0] / 4
