"""Every command of the documents runs: in a short form where that is quick, else its words are parsed.

Each command is in one of three lists: RUNS (here, for real, shortened), ELSEWHERE (another test file runs a
short form), PARSES (its words alone, and why). A command that appears in a document and in none of them
fails; so does an entry whose command no document has any more. Whatever the list, the very words of the
documents must be taken by the command's own parser.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

import pytest
from support.doc_commands import DocCommand, doc_commands
from support.tree import ROOT

from ellm.deploy.cli import COMMANDS, main, parser
from ellm.loadtest.result import Result

COMMANDS_FOUND = doc_commands()
WHOLE = [command for command in COMMANDS_FOUND if command.whole]

RUNS = {  # command -> words of its short form; OUT is a folder of the test's own
    "ellm version": "",
    "ellm serve": "--print-config",
    "ellm keys": "add --file OUT/keys.json --name alice",
    "ellm.loadtest.benchmarks_page": "--check",
    "ellm.loadtest.paper": "--check",
    "ellm.loadtest.controller_tick": "--workers 4 --routers 2 --tenants 2 --ticks 6",
    "ellm.deploy.dashboards": "OUT",
}
ELSEWHERE = {  # command -> the test that runs a short form
    "ellm chat": "tests/unit/deploy/test_http_commands.py",
    "ellm generate": "tests/unit/deploy/test_generate.py",
    "ellm plan": "tests/sim/test_plan_command.py",
    "ellm bench": "tests/unit/loadtest/test_generator_run.py",
    "ellm simulate": "tests/sim/test_simulator_command.py",
    "ellm kernels": "tests/unit/kernels/test_triton_kernels.py",
    "ellm status": "tests/unit/deploy/test_http_commands.py",
    "ellm top": "tests/unit/deploy/test_top.py",
    "ellm drain": "tests/unit/deploy/test_drain_command.py",
    "ellm.deploy.chart_schema": "tests/unit/helm/test_values.py",
    "ellm.deploy.reference": "tests/unit/deploy/test_reference.py",
    "ellm.router.metrics_reference": "tests/unit/monitoring/test_generated.py",
    "ellm.loadtest.api_fuzz": "tests/unit/router/test_api_fuzz.py",
    "ellm.loadtest.chaos": "tests/chaos/test_chaos.py",
    "ellm.loadtest.day": "tests/sim/test_fleet.py",
    "ellm.loadtest.generator.null_server": "tests/unit/loadtest/test_generator_http.py",
    "ellm.loadtest.head_death": "tests/chaos/test_head_death.py",
    "ellm.loadtest.rollout": "tests/e2e/test_serve_rollout.py",
    "ellm.loadtest.routing_quality": "tests/unit/loadtest/test_routing_quality.py",
    "ellm.loadtest.routing_scale": "tests/unit/loadtest/test_routing_scale.py",
    "ellm.loadtest.rpc_fuzz": "tests/unit/router/rpc/test_fuzz.py",
    "ellm.loadtest.sim.curve": "tests/sim/test_headline.py",
    "ellm.loadtest.sim.headline": "tests/sim/test_headline.py",
    "ellm.loadtest.sim.never_worse": "tests/sim/test_headline.py",
    "ellm.loadtest.sim.ratio_sweep": "tests/sim/test_starved_budgets.py",
    "ellm.loadtest.sim.sweep": "tests/unit/loadtest/test_sim_sweep.py",
    "ellm.loadtest.thousand_streams": "tests/unit/loadtest/test_thousand_streams.py",
}
_PEERS = "needs programs of others, in environments of their own"
_SERVER = "starts a whole server on Ray, for a minute at least"
_SPEED = "measures speed over rounds: a short form takes half a minute and says nothing"
PARSES = {  # command -> why it is only parsed
    "ellm.loadtest.clients.run": _PEERS,
    "ellm.loadtest.generator_agreement": _PEERS,
    "ellm.loadtest.json_schemas": "needs a folder of schemas that is not part of this project",
    "ellm.loadtest.http_cost": _SERVER,
    "ellm.loadtest.paced_streaming": _SERVER,
    "ellm.loadtest.ratio_engine": _SPEED,
    "ellm.loadtest.scale_up": _SERVER,
    "ellm.loadtest.schedule_agreement": _PEERS,
    "ellm.loadtest.serve_ingress": _SERVER,
    "ellm.loadtest.serve_start": _SERVER,
    "ellm.loadtest.side_by_side": _PEERS,
    "ellm.loadtest.soak": _SERVER,
    "ellm.loadtest.tenant_timing": _SERVER,
    "ellm.loadtest.core_cost": _SPEED,
    "ellm.loadtest.data_path_cost": "starts Ray, which no test of this kind may",
    "ellm.loadtest.engine_bench": _SPEED,
    "ellm.loadtest.generator_limits": _SPEED,
    "ellm.loadtest.pipeline_depth": _SPEED,
    "ellm.loadtest.routing_controller": "simulates four settings; tests/sim/test_cluster.py runs its parts",
    "ellm.loadtest.sim.paper_runs": "simulates 70B and long inputs; its parts are run by tests/sim",
    "ellm.loadtest.starved_pool": "minutes of the engine; test_gpu_scripts runs its parts in small",
    "ellm.loadtest.starved_peers": _PEERS,
    "ellm.loadtest.structured_speed": _SPEED,
    "ellm.loadtest.tp_overlap": _SPEED,
}
WITHOUT_PARSER = {  # they take no words, or a folder
    "ellm.deploy.chart_schema",
    "ellm.deploy.dashboards",
    "ellm.deploy.reference",
    "ellm.router.metrics_reference",
}
NAMES = {  # code in a sentence that is the name of an option or a part, not a command
    ("ellm drain", ("--node",)),
    ("ellm keys", ("add",)),
}


class ParsedError(Exception):
    """The words were taken: the command goes no further."""


def test_each_command_is_in_one_list() -> None:
    lists = [set(RUNS), set(ELSEWHERE), set(PARSES)]
    known = set().union(*lists)
    assert sum(map(len, lists)) == len(known), "a command is in two lists"
    found = {command.name for command in COMMANDS_FOUND}
    assert found - known == set(), "new commands: run each in a short form, or say why that is not done"
    assert known - found == set(), "no document has these any more"
    assert {name.split()[1] for name in found if name.startswith("ellm ")} <= set(COMMANDS)
    assert {(command.name, command.words) for command in WHOLE} >= NAMES


def test_short_forms_elsewhere_are_there() -> None:
    for name, place in ELSEWHERE.items():
        text = (ROOT / place).read_text()
        last = name.split()[-1].split(".")[-1]
        used = re.search(
            rf"ellm\.[\w.]*\b{last}\b|import [\w, ]*\b{last}\b|\"{last}[\" ]|'{last}'|\b{last}\.py", text
        )
        assert used, f"{place} does not run {name}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", WHOLE, ids=lambda c: f"{c.place} {c.name} {' '.join(c.words)}"[:80])
def test_the_words_of_the_documents_are_taken(command: DocCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    if (command.name, command.words) in NAMES:
        return
    if command.name in WITHOUT_PARSER:
        assert len(command.words) <= 1
        return
    words = [word for word in command.words if word != "--help"]
    if command.name.startswith("ellm "):
        name = command.name.split()[1]
        parser(name).parse_args([name, *words])
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        parse(self, *args, **kwargs)  # type: ignore[call-overload]
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [command.name, *words])
    with pytest.raises(ParsedError):
        runpy.run_module(command.name, run_name="__main__", alter_sys=True)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", RUNS)
def test_the_short_form_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = RUNS[name].replace("OUT", str(tmp_path)).split()
    if name.startswith("ellm "):
        assert main([name.split()[1], *words]) == 0
        return
    monkeypatch.setattr(Result, "write", lambda self: tmp_path / f"{self.name}.json")  # not among the results
    monkeypatch.setattr(sys, "argv", [name, *words])
    code: object = None
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    assert not code
