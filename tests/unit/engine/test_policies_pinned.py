"""What each baseline decides on one fixed trace: who starts at which step, who is stopped, and what it costs.

A change here is a change of the comparison that other policies are measured by: it belongs in the changelog.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_driver import LIMITS, EngineDriver, request

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.engine.plan import NewSequence
from ellm.worker.engine.policies import resolve_config
from ellm.worker.executor.simulated_link import LinkSpeed

PROMPTS = (12, 40, 5, 23, 9, 31, 2, 17, 28, 6, 14, 8)
HOSTED = ("full-swap", "full-offload")
OUTPUTS = (30, 12, 44, 8, 60, 21, 35, 5, 16, 50, 27, 10)


def output_length(new: NewSequence) -> int:
    return OUTPUTS[new.sampling.seed]


def run(policy: str) -> EngineDriver:
    """Twelve requests, one every second step, in a pool of 160 tokens; a host with room for all where it is
    asked for."""
    config = SchedulerConfig(
        policy=policy, max_step_tokens=32, pipeline_depth=1, watermark=0.05, tpot_slo_ms=20.0
    )
    driver = EngineDriver(
        replace(LIMITS, num_blocks=40, num_host_blocks=200 if policy in HOSTED else 0, block_bytes=1000),
        scheduler=resolve_config(config)[0],
        prefix_caching=False,
        output_length=output_length,
        link=LinkSpeed(bytes_per_s=1e6),  # 1 ms a block
    )
    for i, num_prompt in enumerate(PROMPTS):
        driver.add(request(str(i), num_prompt, seed=i, max_tokens=64))
        driver.turn()
        driver.turn()
    driver.run()
    return driver


def starts(driver: EngineDriver) -> str:
    """`request@step` for every time that one starts or starts again."""
    return " ".join(f"{new.sampling.seed}@{plan.step}" for plan in driver.plans for new in plan.new)


# starts, steps, preemptions, recomputed tokens
EXPECTED = {
    "full-recompute": (
        "0@0 1@2 2@4 3@6 4@8 5@10 6@12 5@17 6@18 7@22 6@36 8@37 8@42 9@43 10@43 8@58 9@61 10@61 11@62",
        106,
        7,
        151,
    ),
    "full-recompute(max_num_seqs=4)": (
        "0@0 1@2 2@4 3@6 4@14 5@18 6@36 7@40 8@45 9@54 10@62 11@75",
        106,
        0,
        0,
    ),
    "full-chunked": (
        "0@0 1@2 2@4 3@6 4@8 5@14 6@15 7@15 8@16 6@30 8@36 9@37 8@48 9@49 10@52 11@52",
        96,
        4,
        86,
    ),
    "full-swap": (
        "0@0 1@2 2@4 3@6 4@8 5@10 6@12 5@17 6@17 7@20 8@21 6@39 8@41 9@43 10@43 8@60 9@60 10@60 11@62",
        107,
        7,
        11,
    ),
    "full-offload": (
        "0@0 1@2 2@4 3@6 4@8 5@14 6@15 7@15 8@16 6@30 8@36 9@36 8@48 9@48 10@48 10@53 11@53",
        95,
        5,
        64,
    ),
    "full-predictive": (
        "0@0 1@30 2@43 3@83 4@91 5@131 6@152 7@152 8@187 9@187 10@203 11@230",
        240,
        0,
        0,
    ),
}


@pytest.mark.parametrize("policy", EXPECTED)
def test_decisions_are_those_of_always(policy: str) -> None:
    driver = run(policy)
    report = driver.core.report(driver.now)
    found = (starts(driver), report.num_steps, report.num_preemptions, report.recomputed_tokens)
    assert found == EXPECTED[policy]
    assert {name: len(stream) for name, stream in driver.streams.items()} == {
        str(i): output for i, output in enumerate(OUTPUTS)
    }
