"""docs/operator.md has every field of the custom resources and every reason of a condition, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal_controller.kube import datasets, gate, nodes, prefetches

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operator.md").read_text()
CRDS = sorted((ROOT / "charts" / "shoal" / "crds").glob("*.yaml"))


def schema(path: Path) -> dict[str, Any]:
    definition = yaml.safe_load(path.read_text())
    (version,) = definition["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]
    return found


@pytest.mark.parametrize("path", CRDS, ids=lambda path: path.stem)
def test_every_field_is_documented(path: Path) -> None:
    properties = schema(path)
    fields = {f"spec.{name}" for name in properties["spec"]["properties"]} - {"spec.secretRef"}
    documented = set(re.findall(r"^\| `(spec\.\w+)(?:\.name)?` \|", PAGE, re.MULTILINE))
    assert fields <= documented
    for name in properties["status"]["properties"]:
        assert name in ("conditions", "observedGeneration", "origin", "startedAt", "finishedAt", "size") or (
            f"`{name}`" in PAGE
        ), name


def test_no_other_field_is_documented() -> None:
    fields = {f"spec.{name}" for path in CRDS for name in schema(path)["spec"]["properties"]}
    assert set(re.findall(r"^\| `(spec\.\w+)(?:\.name)?` \|", PAGE, re.MULTILINE)) == fields


@pytest.mark.parametrize("module", [datasets, prefetches], ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_reason_is_documented(module: Any) -> None:
    source = Path(module.__file__).read_text()
    reasons = set(re.findall(r'Condition\(\s*"\w+",\s*[^,"]+,\s*"([A-Za-z]+)"', source))
    reasons |= set(re.findall(r'return "([A-Z]\w+)", ', source))
    assert len(reasons) > 5
    assert reasons <= set(re.findall(r"`([A-Z]\w+)`", PAGE)), reasons


@pytest.mark.parametrize("path", CRDS, ids=lambda path: path.stem)
def test_every_default_is_that_of_the_code(path: Path) -> None:
    spec = schema(path)["spec"]["properties"]
    defaults = {name: field["default"] for name, field in spec.items() if "default" in field}
    metadata = {"name": "d", "namespace": "n", "uid": "u"}
    if path.stem.startswith("datasets"):
        for given in ({}, defaults):
            declared = datasets.Declared.parse({"metadata": metadata, "spec": {"origin": "s3://b/d"} | given})
            assert (declared.definition.shard_size, declared.definition.replicas) == (256 << 20, 1)
            assert (declared.is_eager, declared.definition.quota_bytes, declared.problem) == (False, 0, "")
            assert not (declared.definition.is_pinned or declared.definition.is_direct)
    else:
        for given in ({}, defaults):
            assert prefetches.Asked.parse({"metadata": metadata, "spec": {"dataset": "d"} | given}).priority == 0


def test_names_that_people_write_are_documented() -> None:
    for name in (
        *nodes.DRAINING_TAINTS,
        gate.KEY,
        gate.GATE,
        gate.AFFINITY_KEY,
        gate.MAX_WAIT_KEY,
        datasets.REFRESH_KEY,
        datasets.FINALIZER,
        datasets.OPTIONS_KEY,
        prefetches.FINALIZER,
    ):
        assert name in PAGE
