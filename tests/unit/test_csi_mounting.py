"""What the CSI driver gives to the command that mounts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from shoal_csi import __main__ as program
from shoal_csi.driver import Config
from shoal_csi.mounting import CommandMounts
from shoal_csi.probing import Prober

SNAPSHOT = "f" * 32


def test_each_mount_is_given_the_options(tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = ["sh", "-c", f'echo "$@" > {said}', "sh"]
    CommandMounts(command, "", Prober(1.0)).mount("set", SNAPSHOT, "/m")
    assert said.read_text() == f"mount set@{SNAPSHOT} /m\n"
    CommandMounts(command, "", Prober(1.0), ["--local-tier", "/tier"]).mount("set", SNAPSHOT, "/m")
    assert said.read_text() == f"mount set@{SNAPSHOT} /m --local-tier /tier\n"


def test_a_local_tier_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Config] = []
    monkeypatch.setattr(program, "_serve", configs.append)
    words = ["--endpoint", "/csi.sock", "--node-id", "n"]
    assert CliRunner().invoke(program.main, words).exit_code == 0
    assert CliRunner().invoke(program.main, [*words, "--local-tier", "/t", "--local-tier-size", "2GiB"]).exit_code == 0
    found = [(config.local_tier, config.local_tier_size) for config in configs]
    assert found == [(None, 0), (Path("/t"), 2 << 30)]
    refused = CliRunner().invoke(program.main, [*words, "--local-tier", "/t"])
    assert (refused.exit_code, "go together" in refused.output) == (1, True)
