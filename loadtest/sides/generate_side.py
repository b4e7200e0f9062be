"""transformers as its users run it: static batch (`generate`) or continuous batching (`generate_batch`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from protocol import serve  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, GenerationConfig


def main() -> None:
    folder, dtype, threads, mode = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    continuous = mode == "generate_batch"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def config(max_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    def static(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config(max_tokens)
            )
        return [row[len(prompts[0]) :] for row in out.tolist()]

    def batched(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        out = model.generate_batch(inputs=prompts, generation_config=config(max_tokens), warmup=False)
        return [
            list(out[key].generated_tokens) for key in sorted(out, key=lambda name: int(name.split("_")[-1]))
        ]

    serve(batched if continuous else static, note=str(model.config._attn_implementation))


if __name__ == "__main__":
    main()
