"""The engine's own CPU time for a workload: EngineLoop over the simulated executor and nothing else."""

from __future__ import annotations

import threading
import time

from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.loop import EngineLoop


def engine_cpu_per_token(model_path: str, streams: int, prompt_tokens: int, output_tokens: int) -> float:
    """CPU seconds of this process per output token while `streams` requests run from start to end."""
    config = WorkerConfig(model=ModelConfig(path=model_path))
    engine = load_engine(config, lambda what, share: None)
    loop = EngineLoop(engine.core, engine.executor)
    done = threading.Event()
    left = streams
    tokens = 0

    def publish(outputs: list[SequenceOutput]) -> None:
        nonlocal left, tokens
        for output in outputs:
            tokens += len(output.token_ids)
            left -= output.finish_reason is not None
        if not left:
            done.set()

    loop.start(publish)
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    requests = [EngineRequest(str(i), (3 + i,) * prompt_tokens, sampling) for i in range(streams)]
    start = time.process_time()
    loop.submit("alone", 1, requests)
    assert done.wait(600.0), "the engine did not finish"
    spent = time.process_time() - start
    loop.stop(10.0)
    assert tokens == streams * output_tokens
    return spent / tokens
