"""vLLM's own scheduler without a model: which step gives which request a token, run with its interpreter.

python vllm_schedule.py CHECKPOINT < settings.json

A JSON list of objects in (`arrivals` in steps, `prompts`, `outputs`, `num_blocks`, `block_size`,
`max_num_seqs`, `max_step_tokens`, `max_model_len`), one out: the steps after which each request's tokens
come, and how often a request was preempted. A step is a unit of time; the sampled token is always the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from protocol import ANSWERS  # type: ignore[import-not-found]
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

TOKEN = 5


def make_scheduler(folder: str, setting: dict[str, Any]) -> Any:
    import torch

    config = EngineArgs(
        model=folder,
        dtype="float32",
        block_size=setting["block_size"],
        max_model_len=setting["max_model_len"],
        max_num_seqs=setting["max_num_seqs"],
        max_num_batched_tokens=setting["max_step_tokens"],
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        num_gpu_blocks_override=setting["num_blocks"] + 1,
    ).create_engine_config()
    blocks = setting["num_blocks"] + 1  # it keeps its first one for itself
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(
        block_size=setting["block_size"], num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return Scheduler(config, cache, StructuredOutputManager(config), setting["block_size"], log_stats=False)


def requests_of(setting: dict[str, Any]) -> list[Any]:
    made = []
    for i, (prompt, output) in enumerate(zip(setting["prompts"], setting["outputs"], strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        made.append(Request(str(i), [TOKEN] * prompt, sampling, None, arrival_time=float(i)))
    return made


def run(scheduler: Any, setting: dict[str, Any]) -> dict[str, Any]:
    requests, arrivals = requests_of(setting), setting["arrivals"]
    times: list[list[int]] = [[] for _ in requests]
    step = sent = 0
    while sent < len(requests) or scheduler.has_unfinished_requests():
        while sent < len(requests) and arrivals[sent] <= step:
            scheduler.add_request(requests[sent])
            sent += 1
        plan = scheduler.schedule()
        step += 1
        ids = list(plan.num_scheduled_tokens)
        whole = [requests[int(i)].num_computed_tokens >= requests[int(i)].num_tokens for i in ids]
        tokens = [[TOKEN] if complete else [] for complete in whole]
        result = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens)
        scheduler.update_from_output(plan, result)
        for name, new in zip(ids, tokens, strict=True):
            times[int(name)] += [step] * len(new)
    return {"times": times, "preempted": sum(request.num_preemptions for request in requests)}


def main() -> None:
    found = [run(make_scheduler(sys.argv[1], setting), setting) for setting in json.load(sys.stdin)]
    print(json.dumps(found), file=ANSWERS)


if __name__ == "__main__":
    main()
