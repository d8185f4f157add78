"""The chart as a cluster would be given it: rendered by Helm's own engine, without a cluster."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

helm_python = pytest.importorskip("helm_python", reason="Helm's engine is not installed: pip install helm-python-sdk")

CHART = Path(__file__).parents[2] / "charts/shoal"
RELEASE = NAMESPACE = "shoal"
NOTES = "shoal/templates/NOTES.txt"

Manifest = Mapping[str, Any]

#: Kinds that have pods; the path of their template.
POD_TEMPLATES = {"DaemonSet": ("spec", "template"), "Deployment": ("spec", "template"), "Pod": ()}


class Refused(Exception):
    """Helm will not render these values; its own words."""


@functools.cache
def chart() -> Any:
    return helm_python.Chart.load(CHART)


@functools.cache
def _files(values: str, release: str) -> Mapping[str, str]:
    try:
        chart().validate_schema(json.loads(values))
        rendered: Mapping[str, str] = chart().render(json.loads(values), name=release, namespace=NAMESPACE)
    except helm_python.HelmError as error:
        raise Refused(str(error)) from error
    return rendered


def files(values: Mapping[str, Any], release: str = RELEASE) -> Mapping[str, str]:
    """Rendered text by template. Raises Refused."""
    return _files(json.dumps(values, sort_keys=True), release)


def manifests(values: Mapping[str, Any], release: str = RELEASE) -> list[Manifest]:
    """Every object of a release, to be read only: others have the same. Raises Refused."""
    return [*_manifests(json.dumps(values, sort_keys=True), release)]


@functools.cache
def _manifests(values: str, release: str) -> tuple[Manifest, ...]:
    texts = [text for path, text in _files(values, release).items() if path.endswith(".yaml")]
    return tuple(document for text in texts for document in yaml.load_all(text, yaml.CSafeLoader) if document)


def lint(values: Mapping[str, Any]) -> list[str]:
    """What `helm lint --strict` finds fault with."""
    report = helm_python.lint(CHART, dict(values), strict=True, namespace=NAMESPACE)
    found = [f"{each['path']}: {each['error']}" for each in report["messages"] if each["severity"] >= 2]
    return [*found, *report["errors"]]


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in objects if each["kind"] == kind]


def named(objects: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def pods(objects: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """The pods of a release: their component, and the pod or its template."""
    for each in objects:
        if each["kind"] in POD_TEMPLATES:
            pod = functools.reduce(lambda inner, name: inner[name], POD_TEMPLATES[each["kind"]], each)
            yield pod["metadata"]["labels"]["app.kubernetes.io/component"], pod


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
