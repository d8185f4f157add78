"""What docs/csi.md says is all that there is: flags, attributes, mount options, codes."""

from __future__ import annotations

import re
from pathlib import Path

from shoal_csi import capability, refusals, volume
from shoal_csi.__main__ import main
from shoal_csi.identity import DRIVER_NAME

PAGE = (Path(__file__).parents[2] / "docs/csi.md").read_text()


def test_flags() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert {flag for option in main.params for flag in option.opts} - {"--version"} <= named


def test_attributes_and_mount_options() -> None:
    table = re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)
    assert table == list(volume.KEYS)
    for option in capability.OPTIONS:
        assert f"`{option}`" in PAGE


def test_codes() -> None:
    codes = re.findall(r"^    ([A-Z_]+) ", refusals.__doc__ or "", re.MULTILINE)
    assert codes
    for code in codes:
        assert f"| {code} |" in PAGE


def test_examples_are_volumes() -> None:
    """Every volumeAttributes and parameters of an example."""
    found = re.findall(r"^ *(?:volumeAttributes|parameters):\n((?: +[a-z]+: \S+\n)+)", PAGE, re.MULTILINE)
    examples = [dict(line.split(": ") for line in map(str.strip, block.splitlines())) for block in found]
    assert [volume.parse(example).dataset for example in examples] == ["imagenet"] * 3
    assert PAGE.count(DRIVER_NAME) > 3
