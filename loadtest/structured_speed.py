"""Tokens per second with a grammar and without, on the engine of the model that ships.

    python -m ellm.loadtest.structured_speed [--batch 1 8] [--tokens 128] [--rounds 9]

Each round runs the same batch twice on one engine, free and constrained, in turn. The constrained
requests have a JSON schema each, all different, that allows no end before `--tokens` tokens; the free
ones are told to pass over an end. So both emit the same number of tokens in the same number of steps, and
the difference is the mask: made in each step for each row, and applied by the sampler. Grammars are
compiled before the clock starts, as routers compile them before a request goes to a worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from ellm.loadtest.open_loop import run_open_loop
from ellm.loadtest.result import Result, Row, command_line
from ellm.router.openai.structured import json_grammar
from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine

MODEL = Path(__file__).resolve().parent.parent / "deploy" / "bundled" / "pydoc-5m"
PROMPT = 32  # tokens
ABOUT = """\
The bundled model's engine on one thread, the same batch free and constrained by a JSON schema per request,
{tokens} tokens each, in turn; tokens per second of CPU time, prompts included, medians of {rounds} rounds
after one to warm up."""


def schema(number: int) -> dict[str, Any]:
    """A list that is longer than any answer here, of objects of three levels."""
    inner = {
        "type": "object",
        "properties": {
            f"name_{number}": {"type": "string", "maxLength": 12},
            "values": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 5},
            "kind": {"enum": ["first", "second", f"kind {number}"]},
        },
        "required": [f"name_{number}", "values", "kind"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": inner, "minItems": 500}


def requests(batch: int, tokens: int, seed: int, constrained: bool) -> list[EngineRequest]:
    made = []
    for i in range(batch):
        grammar = json_grammar(schema(i), "schema") if constrained else None
        sampling = SamplingParams(
            max_tokens=tokens, temperature=1.0, seed=seed + i, grammar=grammar, ignore_eos=not constrained
        )
        prompt = tuple(10 + (seed * 31 + i * 7 + k) % 4000 for k in range(PROMPT))
        made.append(EngineRequest(f"{seed}-{i}", prompt, sampling))
    return made


def once(batch: int, tokens: int, seed: int, constrained: bool) -> float:
    """Tokens per second of this process's CPU time: on one thread, what an idle core would give."""
    engine = load_engine(
        WorkerConfig(model=ModelConfig(path=str(MODEL), device="cpu"), num_threads=1), lambda *_: None
    )
    assert engine.grammars is not None
    asked = requests(batch, tokens, seed, constrained)
    for request in asked:
        if request.sampling.grammar is not None:
            engine.grammars.compile(request.sampling.grammar)
    begun = time.process_time()
    run = run_open_loop(engine, asked, [0.0] * batch)
    spent = time.process_time() - begun
    count = sum(map(len, run.tokens))
    assert count == batch * tokens, f"{count} tokens came, {batch * tokens} were asked for"
    return count / spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    rows: list[Row] = []
    raw: dict[int, list[tuple[float, float]]] = {}
    for batch in arguments.batch:
        raw[batch] = []
        once(batch, 8, 99, True)
        for number in range(arguments.rounds):
            order = (False, True) if number % 2 else (True, False)
            found = {constrained: once(batch, arguments.tokens, number, constrained) for constrained in order}
            raw[batch].append((found[False], found[True]))
        rows.append(
            {
                "batch": batch,
                "tokens/s free": statistics.median(free for free, _ in raw[batch]),
                "tokens/s with a grammar": statistics.median(bound for _, bound in raw[batch]),
                "share kept": statistics.median(bound / free for free, bound in raw[batch]),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = Result(
        name="structured-speed",
        title="Tokens per second with a grammar and without",
        about=ABOUT.format(tokens=arguments.tokens, rounds=arguments.rounds),
        command=command_line("ellm.loadtest.structured_speed"),
        rows=rows,
        raw=raw,
    )
    if not arguments.no_write:
        print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
