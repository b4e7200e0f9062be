"""docs/tuning.md says what `ellm plan` says, and names metrics, alerts and settings that there are."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml
from support.tree import ROOT

from ellm.cluster.api import metrics as of_controller
from ellm.deploy import cli
from ellm.deploy.tree import ALIASES, TYPES
from ellm.loadtest.sim.layouts import size_up
from ellm.loadtest.sim.setting import Setting
from ellm.router import metrics_declared as of_routers
from ellm.worker.api import metrics as of_workers
from ellm.worker.api.metrics import Metric

TEXT = (ROOT / "docs" / "tuning.md").read_text()
RUNS = re.findall(r"^```sh\n(ellm plan .*?)```\n+```text\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.findall(r"<!-- from ellm plan -->\n(.*?)\n\n", TEXT, re.DOTALL)[0].splitlines()[2:]
]
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE))


def test_the_page_has_what_is_tested_here() -> None:
    assert len(RUNS) >= 3
    assert len(ROWS) >= 6
    assert TEXT.count("```sh\nellm plan") == len(RUNS)


@pytest.mark.parametrize(("command", "printed"), RUNS)
def test_a_command_prints_what_stands_below_it(
    capsys: pytest.CaptureFixture[str], command: str, printed: str
) -> None:
    _, *words = shlex.split(command.replace("\\\n", " "))
    assert cli.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not re.match(r"\[ *[\d.]+ s\] ", line)]
    shown = printed.splitlines()
    missing = [line for line in shown if line not in (*lines, "...")]
    assert missing == []
    assert sorted(lines.index(line) for line in shown if line != "...") == [
        lines.index(line) for line in shown if line != "..."
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:4]))
def test_a_row_of_the_table_is_what_plan_says(row: list[str]) -> None:
    model, gpu, tp, kv, slo_ms, *figures = row
    options: dict[str, Any] = {} if kv == "what is left" else {"kv_bytes": float(kv)}
    sized = size_up(Setting(model=model, gpu=gpu, tpot_slo_ms=float(slo_ms), **options), [int(tp)])
    chosen, price = sized.chosen, sized.prices
    ratio = sized.literal_ratio_with_link
    assert figures == [
        f"{chosen.capacity_tokens:,}",
        f"{chosen.pool_over_weights:.2f}",
        f"{1e3 * chosen.full_step_s:.1f} ms",
        f"{chosen.slo_over_full_step:.2f}",
        f"{chosen.phi:.2f}",
        f"{price.literal_limit_tokens:,.0f}",
        f"{price.literal_limit_with_link_tokens:,.0f}",
        f"r = {ratio:.2f}" if ratio else "no",
    ]


def declared() -> set[str]:
    of = (of_workers, of_controller, of_routers)
    return {v.name for module in of for v in vars(module).values() if isinstance(v, Metric)} | {
        metric.name for module in of for metric in module.DECLARED
    }


def test_what_it_names_is_there() -> None:
    alerts = {
        rule["alert"]
        for group in yaml.safe_load((ROOT / "helm/files/alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    metrics = {word.partition("{")[0] for word in CODE if word.startswith("ellm_")}
    settings = {
        word.partition("=")[0] for word in CODE if re.match(r"(worker|router|cluster|controller)\.\w", word)
    }
    named = {word for word in CODE if re.fullmatch(r"Ellm[A-Za-z]+", word)}
    assert len(metrics) > 12
    assert metrics <= declared()
    assert len(settings) > 15
    assert settings <= set(TYPES)
    assert len(named) > 5
    assert named <= alerts
    short = {word.partition("=")[0] for word in CODE if re.fullmatch(r"[a-z_]+=\S+", word)}
    assert short <= set(ALIASES)
