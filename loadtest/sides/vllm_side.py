"""vLLM's offline engine (its CPU build here), run with the interpreter of its own environment."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from protocol import serve  # type: ignore[import-not-found]
from vllm import LLM, SamplingParams


def main() -> None:
    folder, dtype = sys.argv[1:3]
    engine = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    serve(generate)


if __name__ == "__main__":
    main()
