"""What processes tell Prometheus, and what the docs say of it."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("metrics.md", "cachenode.md", "controller.md")
#: Of each process, and not ours to describe: `prometheus_client` does.
_FOREIGN = ("process_", "python_")


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name and the values of the labels, which are in the order of their names."""
    found = (sample for family in families(text) for sample in family.samples)
    return {(each.name, *(value for _, value in sorted(each.labels.items()))): each.value for each in found}


def own(text: str) -> list[Metric]:
    """The families that are described by us."""
    return [family for family in families(text) if not family.name.startswith(_FOREIGN)]


def names(found: Iterable[Metric]) -> set[str]:
    """As Prometheus keeps them, and as the docs write them: a histogram by its name alone."""
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in found}


def labels(*pages: str) -> dict[str, set[str]]:
    """Names that the docs have, in the first column of tables or among those of every process; with their labels."""
    text = "\n".join((DOCS / page).read_text() for page in pages)
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    found = re.findall(r"`(shoal_\w+)(?:\{([\w,]+)\})?`", rows) + re.findall(r"`((?:process|python)_\w+)()`", text)
    return {name: set(filter(None, names.split(","))) for name, names in found}


def documented(*pages: str, prefix: str = "shoal_") -> set[str]:
    """Names in the first column of tables."""
    return {name for name in labels(*pages) if re.match(prefix, name)}


def check(text: str) -> None:
    """Every metric is described, by a sentence and by the docs, with its labels."""
    found, known = own(text), labels(*PAGES)
    assert [family.name for family in found if not re.fullmatch(r"[A-Z0-9].*[^ .]\.", family.documentation)] == []
    assert sorted(names(found) - known.keys()) == []
    for family in found:
        (name,) = names([family])
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == known[name], name
