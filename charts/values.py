"""What is known of the chart's values, made from the lines above them in ``charts/shoal/values.yaml``:

    # -- [type] sentence
    name: value

`python charts/values.py` writes charts/shoal/values.schema.json and the table in docs/kubernetes.md;
tests/unit/test_chart.py fails where they are stale, or where a value has no such line.

The rule: a value is described once. The schema knows no value that values.yaml lacks, so a misspelt one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
VALUES = ROOT / "charts/shoal/values.yaml"
SCHEMA = ROOT / "charts/shoal/values.schema.json"
PAGE = ROOT / "docs/kubernetes.md"
BEGIN, END = "<!-- values: made by charts/values.py -->\n", "<!-- end of values -->\n"

#: Words in <> that a type may be. Messages of a refused pattern show the pattern, so the simplest one wins.
PATTERNS = {
    "path": r"^/[^:]*$",
    "digest": r"^(sha256:[0-9a-f]{64})?$",
    "quantity": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?$",
    "size": r"^([0-9]+(\.[0-9]+)?\s*([kKMGT]i?)?B?)?$",
    "time": r"^[0-9]+(\.[0-9]+)?(s|min|h|d)?$",
    "interval": r"^[0-9]+(ms|s|m|h|d)$",  # Prometheus's, which has another word for minutes
    "count": r"^[0-9]+%?$",
    "image": r"^.+(:[^:/]+|@sha256:[0-9a-f]{64})$",
}
_STRINGS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
_STORAGE_CLASS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "dataset"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "description": "of the StorageClass"},
        "dataset": {"type": "string", "minLength": 1, "description": "name of a dataset"},
        "snapshot": {"type": "string", "description": "digest, or newest"},
        "subpath": {"type": "string", "description": "folder of the dataset"},
        "writers": {"enum": ["refuse", "read-only"], "description": "what becomes of claims that ask for writing"},
        "mountOptions": {"type": "array", "items": {"type": "string"}, "description": "such as noatime"},
        "annotations": {**_STRINGS, "description": "of the StorageClass"},
    },
}
_LINE = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z]\w*):(?P<rest>.*)$")
_COMMENT = re.compile(r"^ *# -- (?:\[(?P<type>[^\]]+)\] )?(?P<sentence>.+)$")
_BOUNDS = re.compile(r"^(int|number)(?: (-?[\d.]+?)?\.\.(-?[\d.]+)?)?$")


@dataclass(frozen=True, slots=True)
class Value:
    """A line of values.yaml.

    Attributes:
        path: names from the root.
        type: as written; "" for a group of values.
        default: None for a group.
    """

    path: tuple[str, ...]
    type: str
    sentence: str
    default: Any


class Undescribed(ValueError):
    """A value has no line of its own, or one that says nothing that can be used."""


def read(text: str) -> list[Value]:
    """The values of a values.yaml, groups included, in order. Raises Undescribed."""
    defaults = yaml.safe_load(text)
    found: list[Value] = []
    open_groups: list[str] = []
    inside: int | None = None  # lines indented further are part of the last value
    above = ""
    for line in text.splitlines():
        match = _LINE.match(line)
        depth = len(line) - len(line.lstrip())
        if inside is not None and line.strip() and depth > inside:
            continue
        if match is None:
            above = line if line.lstrip().startswith("#") else ""
            continue
        open_groups = [*open_groups[: depth // 2], match["name"]]
        path, comment = tuple(open_groups), _COMMENT.match(above)
        if comment is None:
            raise Undescribed(f"{'.'.join(path)} has no line '# -- [type] sentence' above it")
        default = _at(defaults, path)
        is_group = comment["type"] is None
        if is_group and not isinstance(default, dict):
            raise Undescribed(f"{'.'.join(path)} is a value, and its line has no [type]")
        found.append(Value(path, comment["type"] or "", comment["sentence"], None if is_group else default))
        inside, above = (None if is_group else depth), ""
    return found


def schema(values: list[Value]) -> dict[str, Any]:
    """The JSON schema, in which every group refuses names that it does not have, and wants all that it has.

    Helm checks values with the chart's own among them, so what is missing is new in the chart, and the values are those
    of an older one (``--reuse-values``): programs would be given empty flags, and would not start.

    Raises:
        Undescribed: a value has no line, or one that says too little.
    """
    root: dict[str, Any] = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the chart shoal"}
    root |= {"type": "object", "additionalProperties": False, "properties": {}}
    # What Helm itself puts among a chart's values.
    root["properties"]["global"] = {"type": "object", "description": "values that parent charts share; not used"}
    for value in values:
        group = root
        for name in value.path[:-1]:
            group = group["properties"][name]
        if value.type:
            made = {"description": value.sentence, **_schema_of(value)}
        else:
            made = {"description": value.sentence, "type": "object", "additionalProperties": False, "properties": {}}
        group["properties"][value.path[-1]] = made
        group.setdefault("required", []).append(value.path[-1])
    return root


def table(values: list[Value]) -> str:
    """The Markdown table."""
    lines = ["| value | default | |", "|---|---|---|"]
    for value in values:
        if not value.type:
            lines.append(f"| **`{'.'.join(value.path)}`** | | **{_cell(value.sentence)}** |")
            continue
        default = json.dumps(value.default, ensure_ascii=False)
        lines.append(f"| `{'.'.join(value.path)}` | `{_cell(default)}` | {_cell(value.sentence)} |")
    return "\n".join(lines) + "\n"


def page(text: str, values: list[Value]) -> str:
    """The page with the table of now in it. Raises ValueError where it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines {BEGIN!r} and {END!r}")
    return before + begin + table(values) + end + after


def schema_text(values: list[Value]) -> str:
    return json.dumps(schema(values), indent=2, ensure_ascii=False) + "\n"


def _at(defaults: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        defaults = defaults[name]
    return defaults


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _schema_of(value: Value) -> dict[str, Any]:
    kind = value.type
    if kind.startswith("list of "):
        return {"type": "array", "items": _simple(kind.removeprefix("list of "), value)}
    return _simple(kind, value)


def _simple(kind: str, value: Value) -> dict[str, Any]:
    if " | " in kind:
        return {"enum": kind.split(" | ")}
    if bounds := _BOUNDS.match(kind):
        number, low, high = bounds.groups()
        made: dict[str, Any] = {"type": {"int": "integer", "number": "number"}[number]}
        return made | {name: float(b) if "." in b else int(b) for name, b in _named(low, high)}
    if kind == "<storageClass>":
        return _STORAGE_CLASS
    if kind == "<count>":
        return {"type": ["integer", "string"], "pattern": PATTERNS["count"], "minimum": 0}
    if kind.startswith("<") and kind[1:-1] in PATTERNS:
        return {"type": "string", "pattern": PATTERNS[kind[1:-1]]}
    match kind:
        case "bool":
            return {"type": "boolean"}
        case "string":
            return {"type": "string"}
        case "string nonempty":
            return {"type": "string", "minLength": 1}
        case "map of string":
            return _STRINGS
        case "object":
            return {"type": "object"}
    raise Undescribed(f"{'.'.join(value.path)} has the type {kind!r}, which is none: see {VALUES.name}")


def _named(low: str | None, high: str | None) -> Iterator[tuple[str, str]]:
    if low:
        yield "minimum", low
    if high:
        yield "maximum", high


def main() -> None:
    values = read(VALUES.read_text())
    SCHEMA.write_text(schema_text(values))
    PAGE.write_text(page(PAGE.read_text(), values))


if __name__ == "__main__":
    main()
