"""The alert rules, by Prometheus' own tool: each fires for its fault and is silent without one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.prometheus import ALERTS, hasty

from ellm.router.metrics_sharing import DECLARED

CASES = Path(__file__).with_name("alerts.yaml")
RULES = yaml.safe_load(ALERTS.read_text())["groups"]


def promtool(*words: str, folder: Path) -> None:
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.needs_tool("promtool")
def test_the_rules_are_rules(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS), folder=tmp_path)
    (tmp_path / "hasty.yaml").write_text(hasty(ALERTS.read_text()))
    promtool("check", "rules", "hasty.yaml", folder=tmp_path)


@pytest.mark.needs_tool("promtool")
def test_each_alert_fires_for_its_fault(tmp_path: Path) -> None:
    shutil.copyfile(ALERTS, tmp_path / "alerts.yaml")
    shutil.copyfile(CASES, tmp_path / "cases.yaml")
    promtool("test", "rules", "cases.yaml", folder=tmp_path)


def test_each_alert_is_tested_to_fire_and_to_be_silent() -> None:
    alerts = {rule["alert"] for group in RULES for rule in group["rules"] if "alert" in rule}
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    declared = {metric.name for metric in DECLARED}
    recorded = {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
    asked = {
        name
        for group in RULES
        for rule in group["rules"]
        for name in re.findall(r"ellm[_:][\w:]+", rule["expr"])
    }
    assert asked <= declared | recorded
    assert recorded <= asked


def test_every_alert_says_what_it_means() -> None:
    for group in RULES:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["annotations"]["summary"], rule["alert"]
                assert rule["labels"]["severity"] in ("critical", "warning")
