"""Every metric has a line in the docs, and the docs name no metric that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from shoal_cachenode import metrics
from tests.support.minicluster import MiniCluster

DOCS = Path(__file__).parents[2] / "docs"


def test_node_metrics_are_documented(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x"}) as cluster:
        text = metrics.exposition(cluster.nodes[0], cluster.servers[0]).decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation.endswith(".") for family in families)
    served = {sample.name for family in families for sample in family.samples}
    documented = set(re.findall(r"\bshoal_node_\w+", (DOCS / "cachenode.md").read_text()))
    assert served == documented
