"""What is generated is up to date: the metrics reference and Grafana's dashboards."""

from __future__ import annotations

import json
import re

import pytest
from support.tree import ROOT

from ellm.deploy import dashboards
from ellm.router import metrics_reference
from ellm.router.metrics_sharing import DECLARED

FOLDER = ROOT / "helm" / "files" / "dashboards"
PARTS = ("", "_bucket", "_sum", "_count")


def test_the_reference_is_what_is_declared() -> None:
    """If this fails: python -m ellm.router.metrics_reference > docs/metrics.md"""
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_reference.page()


def test_the_dashboards_are_what_is_described() -> None:
    """If this fails: python -m ellm.deploy.dashboards helm/files/dashboards"""
    assert {path.stem for path in FOLDER.iterdir()} == set(dashboards.DASHBOARDS)
    for name in dashboards.DASHBOARDS:
        assert (FOLDER / f"{name}.json").read_text() == dashboards.text(name)


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_a_dashboard_asks_for_metrics_that_there_are(name: str) -> None:
    known = {metric.name.removeprefix("ellm") + part for metric in DECLARED for part in PARTS}
    made = json.loads(dashboards.text(name))
    for panel in made["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            asked = re.findall(r"\$\{prefix\}(\w+)", target["expr"])
            assert asked
            assert set(asked) <= known, panel["title"]


def test_panels_do_not_lie_on_each_other() -> None:
    for name in dashboards.DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in dashboards.dashboard(name)["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells
