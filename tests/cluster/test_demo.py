"""The demo, tiny: the whole way of a user, with the figures it prints checked against each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.demo", "--tiny", "--json", str(tmp_path / "demo.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte for byte as at the origin" in done.stdout
    first, second, direct = json.loads((tmp_path / "demo.json").read_text())["passes"]
    assert first["bytes_read"] == second["bytes_read"] == direct["bytes_read"] > 0
    assert second["origin_bytes"] == 0 and second["hit_ratio"] == 1
    assert 0 < first["origin_bytes"] < direct["origin_bytes"]
