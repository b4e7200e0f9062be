"""What an engine holds after many mixed requests is what it held after the first of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import write_checkpoint

from ellm.worker.primitive_cache import VARIABLES

GROWTH_MIB = 24.0  # it is 6; an unbounded cache of routines grows by 80
# In a process of its own, loaded on a thread that ends, as a rank does it.
PROGRAM = """
import json, os, random, sys, threading
from concurrent.futures import ThreadPoolExecutor
from ellm.loadtest.processes import process_memory
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.loop import EngineLoop

config = WorkerConfig(
    model=ModelConfig(path=sys.argv[1], device="cpu", jit=False, deterministic=False),
    cache=CacheConfig(num_blocks=40, host_bytes=1 << 20, host_tier="copied"),
    scheduler=SchedulerConfig(max_num_seqs=8, max_step_tokens=512),
    num_threads=1, profile=False,
)
with ThreadPoolExecutor(1) as thread:
    engine = thread.submit(load_engine, config, lambda what, share: None).result()
loop = EngineLoop(engine.core, engine.executor)
left, done = 0, threading.Event()

def publish(outputs):
    global left
    left -= sum(output.finish_reason is not None for output in outputs)
    if not left:
        done.set()

def one(rng, name):
    prompt = tuple(rng.randrange(256) for _ in range(rng.randrange(1, 250)))
    choices = {"temperature": rng.choice((0.0, 0.8)), "logprobs": rng.choice((None, None, 2))}
    if rng.random() < 0.2:
        choices |= {"top_p": 0.9, "repetition_penalty": 1.1}
    choices |= {"max_tokens": rng.randrange(1, 40), "ignore_eos": True}
    return EngineRequest(name, prompt, SamplingParams(**choices))

loop.start(publish)
held, count = [], int(sys.argv[2])
for turn in range(4):
    rng = random.Random(0)  # the same lengths in each: what differs is how many have been before
    requests = [one(rng, f"{turn}-{i}") for i in range(count)]
    left = len(requests)
    done.clear()
    loop.submit("test", turn, requests)
    assert done.wait(300.0), loop.state
    held.append(process_memory(os.getpid()).held_bytes / 2**20)
assert loop.stop(30.0)
print(json.dumps(held))
"""


def held_mib(folder: Path, count: int, **variables: str) -> list[float]:
    """After each of four times `count` requests."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(count)],
        capture_output=True, text=True, timeout=300, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held: list[float] = json.loads(done.stdout.splitlines()[-1])
    return held


@pytest.mark.needs_platform("linux")
def test_memory_is_what_it_was(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    held = held_mib(tmp_path, 60, MALLOC_ARENA_MAX="1")
    assert max(held[1:]) - held[0] < GROWTH_MIB, held
