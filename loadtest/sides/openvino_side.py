"""OpenVINO GenAI's continuous batching, run with the interpreter of its own environment.

python openvino_side.py CHECKPOINT DTYPE THREADS EXPORTED KV_TOKENS

The checkpoint is exported to EXPORTED with the environment's `optimum-cli` unless it is there. What it
computes in and keeps its KV cache in is DTYPE: left alone, the cache would be in 8 bits.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import serve  # type: ignore[import-not-found]

BLOCK = 32  # tokens of a block of its cache on a CPU
TYPES = {"float32": ("f32", ov.Type.f32), "bfloat16": ("bf16", ov.Type.bf16)}


def export(checkpoint: str, exported: Path) -> None:
    """Weights in float32: the plugin converts them as it computes in another type."""
    if (exported / "openvino_model.xml").exists():
        return
    program = Path(sys.executable).parent / "optimum-cli"
    words = ["export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past"]
    subprocess.run([str(program), *words, "--weight-format", "fp32", str(exported)], check=True)


def main() -> None:
    checkpoint, dtype, threads, folder, kv_tokens = sys.argv[1:6]
    exported = Path(folder)
    export(checkpoint, exported)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = -(-int(kv_tokens) // BLOCK)
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_batched_tokens = 2048
    hint, kv_type = TYPES[dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": hint,
        "KV_CACHE_PRECISION": kv_type,
        "INFERENCE_NUM_THREADS": int(threads),
    }
    pipeline = genai.ContinuousBatchingPipeline(exported, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        tensors = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(tensors, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    serve(generate, note=f"KV cache in {hint}, {scheduler.num_kv_blocks} blocks of {BLOCK} tokens")


if __name__ == "__main__":
    main()
