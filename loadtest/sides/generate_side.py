"""transformers as its users run it: static batch (`generate`) or continuous batching (`generate_batch`).

python generate_side.py CHECKPOINT DTYPE THREADS generate
python generate_side.py CHECKPOINT DTYPE THREADS generate_batch MOST_SEQUENCES TOKENS_EACH

Left alone, continuous batching takes 60 % of the machine's memory for its cache. Here it gets twice what all
sequences need at their full length, and its manager stays alive between calls, as a server's would, so that
making the cache is in no measured time. A step takes at most MAX_BATCH_TOKENS: attention on a CPU computes
every row of a step against every key of it and masks, so that with the default of 8,192 the prefill of 32
prompts takes several times as long. Of 512, 1,024 and 2,048, the one chosen ends 32 prompts soonest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from protocol import serve  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE = 256  # tokens, transformers' own choice
MAX_BATCH_TOKENS = 1024


def cache_config(most_sequences: int, tokens_each: int) -> ContinuousBatchingConfig:
    """Room for twice that many sequences, each of that many tokens."""
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=2 * most_sequences * -(-tokens_each // PAGE),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=most_sequences,
        allow_block_sharing=False,  # no prefix caching on any side
    )


def serve_static(model: Any, note: str) -> None:
    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return [row[len(prompts[0]) :] for row in out.tolist()]

    serve(generate, note=note)


def serve_continuous(model: Any, note: str, cache: ContinuousBatchingConfig) -> None:
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=cache
    ) as manager:

        def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
            request_ids = manager.add_requests(inputs=prompts, max_new_tokens=max_tokens)
            tokens: dict[str, list[int]] = {}
            while len(tokens) < len(request_ids):
                result = manager.get_result(timeout=1.0)
                assert result is not None or manager.is_running(), "transformers' manager ended"
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    tokens[result.request_id] = list(result.generated_tokens)
            return [tokens[request_id] for request_id in request_ids]

        blocks, rows = cache.num_blocks, cache.max_batch_tokens
        serve(generate, note=f"{note}, a cache of {blocks} blocks of {PAGE} tokens, {rows} rows a step")


def main() -> None:
    folder, dtype, threads, mode = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    note = str(model.config._attn_implementation)
    if mode == "generate_batch":
        serve_continuous(model, note, cache_config(*map(int, sys.argv[5:7])))
    else:
        serve_static(model, note)


if __name__ == "__main__":
    main()
