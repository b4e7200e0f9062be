"""What the results of a GPU say of the aims: one line for each, and one JSON file.

    python -m ellm.loadtest.gpu.summary FOLDER

What was not measured is said, too, with the reason: a peer that is not installed, a shape that was not run, a
file that is not there, a run without a GPU. The exit code is 0 unless there is no result at all: what a
figure falls short of is a finding, what is wrong has failed its own script.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STRICT = (
    "200 random mixes with equal bits",
    "50 of them with a shared prefix",
    "KV of prefill = of decode",
)
_ENGINE = ("decode and prefill tokens/s", "shares of the roofline", "decode and prefill over vLLM's")
# name of a result -> what it should say, for where it is not there
EXPECTED: dict[str, tuple[str, ...]] = {
    "attention": (
        "decode with KV of 256 MiB a layer: share of the copy's rate",
        "prefill: of FlashAttention",
        "both beside FlashInfer",
    ),
    "fusion": ("fused attention beside two launches and two streams",),
    "kernels": ("time of every other kernel beside torch's",),
    "graphs": ("tokens and time of replayed decode steps",),
    "host_copies": ("rate of the link", "streams beside a computation"),
    "steps": ("time of decode steps with streamed and recomputed blocks",),
    "ablation": ("tokens, launches and time with each switch alone",),
    "ranks": ("tokens of two ranks, with and without graphs", "decode tokens/s of two ranks by those of one"),
    "strict": _STRICT,
    "strict-model": _STRICT,
    "strict-switches": _STRICT,
    "starved": ("goodput, TTFT and TPOT of all policies", "cost model's p50 and p95"),
    "starved-sweep": ("goodput by the share that stays uncached", "cost model's p50 and p95"),
    "engine-qwen3-0.6b": _ENGINE,
    "engine-strict": ("decode and prefill with STRICT over those without",),
    "engine-llama-3-8b": ("batch 1: decode, of the memory-bandwidth bound", *_ENGINE),
}
WITHOUT_AIMS = ("fusion", "kernels", "graphs", "host_copies", "steps", "ablation")  # they check, and time


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> what its file holds."""
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in EXPECTED
        if (folder / f"{name}.json").exists()
    }


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """What was found first, then what is missing."""
    said = [line for name, result in results.items() for line in _of_result(name, result)]
    absent = [
        _missing(name, what, f"no {name}.json (failed or not run: see checks.log)")
        for name, whats in EXPECTED.items()
        if name not in results
        for what in whats
    ]
    return [*said, *absent]


def _of_result(name: str, result: dict[str, Any]) -> Iterator[str]:
    aims = result.get("aims", ())
    for one in aims:
        what, figure, least = one["what"], one["figure"], one["least"]
        if result.get("device") == "interpreter":
            yield _missing(name, what, "ran without a GPU")
        elif figure is None:
            yield _missing(name, what, one["reason"])
        elif least is None:
            yield f"beside {name}: {what}: {figure:.4g}"
        else:
            yield f"{'met   ' if one['met'] else 'MISSED'} {name}: {what}: {figure:.4g}, at least {least:.4g}"
    if not aims:
        without = result.get("device") == "interpreter"
        reason = "ran without a GPU" if without else f"{name}.json says nothing of it"
        for what in EXPECTED[name] if without or name not in WITHOUT_AIMS else ():
            yield _missing(name, what, reason)
    for note in result.get("notes", ()):
        if note:
            yield f"note   {name}: {note}"


def _missing(name: str, what: str, reason: str) -> str:
    return f"not measured {name}: {what}: {reason}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    results = read(folder)
    said = lines(results)
    print("\n".join(said))
    if not results:
        return 1
    about = ("device", "torch", "triton", "cuda", "date", "commit")
    first = next(iter(results.values()))
    summary = {key: first.get(key) for key in about} | {"lines": said}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
