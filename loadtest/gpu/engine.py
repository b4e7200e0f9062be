"""The engine on random weights in known shapes: decode and prefill tokens per second, their share of what the
device allows, and vLLM beside it.

    python -m ellm.loadtest.gpu.engine --out engine.json [--vllm-python PYTHON]

A point is two runs of the same prompts, as in `ellm.loadtest.engine_bench`: one that emits a single token
(prefill) and one that emits `--output`; decode speed is the tokens between the two by the difference of their
times. The bound of a decode step is the larger of what it must read at the rate of a plain copy and what it
must compute at the rate of a large matrix product, both measured here; so is that of a prefill. vLLM runs
after ours has given the memory back, on the same checkpoints, or in a run of its own (`--only`). Aims: 75 %
of the bound for Llama-3-8B at batch 1, 0.8 of vLLM everywhere. Without a GPU a tiny model shows that it
works, and nothing else:

    python -m ellm.loadtest.gpu.engine --device cpu --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ellm.loadtest.engine_bench import one_sample
from ellm.loadtest.gpu.models import SHAPES, Work, make_model, work_of
from ellm.loadtest.gpu.timing import aim, beside, copy_rate, seconds, unmeasured, write
from ellm.loadtest.side import SIDES, Answer, Side
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import LoadedEngine, load_engine
from ellm.worker.loop import EngineLoop

BLOCK = 16
WAIT_S = 300.0


class OwnSide:
    """Ours, in this process, seen as engine_bench sees a side."""

    name = "ellm"

    def __init__(self, engine: LoadedEngine) -> None:
        self._done = threading.Event()
        self._loop = EngineLoop(engine.core, engine.executor, on_failure=lambda _: self._done.set())
        self._tokens: dict[str, list[int]] = {}
        self._left = self._number = 0
        self._loop.start(self._publish)

    def run(self, prompts: list[list[int]], max_tokens: int, wait_s: float = WAIT_S) -> Answer:
        """Exactly `max_tokens` for every prompt. Raises RuntimeError where the engine ends, because of what
        ended it, and where that takes longer than `wait_s`."""
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._number += 1
        names = [f"{self._number}-{i}" for i in range(len(prompts))]
        requests = [EngineRequest(n, tuple(p), sampling) for n, p in zip(names, prompts, strict=True)]
        self._tokens = {name: [] for name in names}
        self._left = len(names)
        self._done.clear()
        begin = time.perf_counter()
        self._loop.submit("bench", self._number, requests)
        if not self._done.wait(wait_s) or self._loop.state != "running":
            raise RuntimeError(f"the engine is {self._loop.state}") from self._loop.failure
        elapsed = time.perf_counter() - begin
        tokens = [self._tokens[name] for name in names]
        assert all(len(one) == max_tokens for one in tokens)
        return Answer(elapsed, tokens, [0])

    def close(self) -> None:
        self._loop.stop(30.0)

    def _publish(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(str(output.error))
            self._tokens[output.request_id] += output.token_ids
            self._left -= output.finish_reason is not None
        if not self._left:
            self._done.set()


def config_of(args: argparse.Namespace, folder: Path, *, strict: bool = False) -> WorkerConfig:
    most, length = max(args.batch), args.input + args.output + BLOCK
    return WorkerConfig(
        model=ModelConfig(
            path=str(folder), device=args.device, max_model_len=length, deterministic=strict or None
        ),
        cache=CacheConfig(num_blocks=most * -(-length // BLOCK), prefix_caching=False),
        scheduler=SchedulerConfig(
            policy="full-chunked", max_num_seqs=most, max_step_tokens=args.step_tokens, max_waiting=2 * most
        ),
        cuda_graphs=args.device == "cuda",
    )


def product_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of `size` squared."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / seconds(lambda: a @ b, device)


def points(args: argparse.Namespace, side: OwnSide | Side, vocab: int) -> list[dict[str, Any]]:
    """Medians of the rounds at each batch size."""
    found = []
    for batch in args.batch:
        rng = random.Random(batch)
        prompts = [[rng.randrange(3, vocab) for _ in range(args.input)] for _ in range(batch)]
        side.run(prompts, min(8, args.output))
        samples = [one_sample(side, prompts, args.output)[0] for _ in range(args.rounds)]  # type: ignore[arg-type]
        row = {"side": side.name, "batch": batch}
        row |= {key: median(s[key] for s in samples) for key in ("prefill_tok_s", "decode_tok_s")}
        found.append(row)
        print(row, flush=True)
    return found


def with_shares(
    args: argparse.Namespace, rows: list[dict[str, Any]], work: Work, bandwidth: float, peak: float
) -> None:
    """Of the roofline: what the device allows for the bytes and operations that cannot be avoided."""
    for row in rows:
        batch, context = row["batch"], args.input + args.output / 2
        step_s = max(work.decode_bytes(batch, context) / bandwidth, work.decode_flops(batch, context) / peak)
        row["decode_share"] = row["decode_tok_s"] * step_s / batch
        prefill_s = max(work.prefill_flops(batch, args.input) / peak, 2 * work.matrix_elements / bandwidth)
        row["prefill_share"] = row["prefill_tok_s"] * prefill_s / (batch * args.input)


def with_ratios(rows: list[dict[str, Any]]) -> None:
    """Ours by the other side's, at equal batch."""
    theirs = {row["batch"]: row for row in rows if row["side"] != OwnSide.name}
    for row in rows:
        other = theirs.get(row["batch"])
        if row["side"] == OwnSide.name and other is not None:
            row["decode_over_vllm"] = row["decode_tok_s"] / other["decode_tok_s"]
            row["prefill_over_vllm"] = row["prefill_tok_s"] / other["prefill_tok_s"]


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Ours on one model, and what the device allows."""
    device = torch.device(args.device)
    folder = make_model(name, args.models, args.device)
    work = work_of(folder)
    begin = time.perf_counter()
    side = OwnSide(load_engine(config_of(args, folder), lambda what, share: None))
    start_s = time.perf_counter() - begin
    rows = points(args, side, work.arch.vocab_size)
    side.close()
    del side
    strict = strict_points(args, folder, work.arch.vocab_size) if args.strict else []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    bandwidth = copy_rate(device, args.copy_mib)
    peak = product_rate(device, args.product, torch.bfloat16)
    sizes = {"weight_bytes": 2 * work.matrix_elements, "kv_token_bytes": work.kv_token_bytes}
    rates = {"copy_bytes_per_s": bandwidth, "product_flop_per_s": peak, "start_s": start_s}
    return {"model": name, **sizes, **rates, "rows": rows, "strict_rows": strict, "notes": []}


def strict_points(args: argparse.Namespace, folder: Path, vocab: int) -> list[dict[str, Any]]:
    """The same with STRICT, in the same run."""
    gc.collect()
    side = OwnSide(load_engine(config_of(args, folder, strict=True), lambda what, share: None))
    rows = points(args, side, vocab)
    side.close()
    return rows


def with_vllm(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """vLLM's rows to ours, where there is a vLLM."""
    if args.vllm_python is None:
        found["notes"].append("vLLM not run: no --vllm-python was given")
        return
    folder = make_model(found["model"], args.models, args.device)
    command = [str(args.vllm_python), str(SIDES / "vllm_side.py"), str(folder), "bfloat16"]
    try:
        other = Side("vllm", command, 4, Path(".cache/vllm-gpu.log"))
        found["notes"].append(other.note)
        found["rows"] += points(args, other, work_of(folder).arch.vocab_size)
        other.close()
    except (RuntimeError, OSError) as error:
        found["notes"].append(f"vLLM did not run: {error}")


def earlier(path: str) -> list[dict[str, Any]]:
    """Ours of a file that was written before."""
    models: list[dict[str, Any]] = json.loads(Path(path).read_text())["models"]
    for found in models:
        found["rows"] = [row for row in found["rows"] if row["side"] == OwnSide.name]
        found["notes"] = []
    return models


def finish(args: argparse.Namespace, found: dict[str, Any]) -> None:
    work = work_of(make_model(found["model"], args.models, args.device))
    with_shares(args, found["rows"], work, found["copy_bytes_per_s"], found["product_flop_per_s"])
    with_ratios(found["rows"])


def aims(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM has not said is said to be missing."""
    made = []
    for found in models:
        if found.get("strict_rows"):  # a run for that alone
            made += _cost_of_strict(found)
            continue
        own = [row for row in found["rows"] if row["side"] == OwnSide.name]
        alone = next((row for row in own if row["batch"] == 1), None)
        if found["model"] == "llama-3-8b":
            what = f"{found['model']}, batch 1: decode, of the memory-bandwidth bound"
            missing = unmeasured(what, "batch 1 was not run")
            made.append(missing if alone is None else aim(what, alone["decode_share"], 0.75))
        reason = "; ".join(found["notes"]) or "vLLM was not run (VLLM_PYTHON names its interpreter)"
        for row in own:
            for kind in ("decode", "prefill"):
                what, ratio = f"{found['model']}, batch {row['batch']}: {kind}", row.get(f"{kind}_over_vllm")
                missing = unmeasured(f"{what} over vLLM's", reason)
                made.append(missing if ratio is None else aim(f"{what} over vLLM's", ratio, 0.8))
    return made


def _cost_of_strict(found: dict[str, Any]) -> list[dict[str, Any]]:
    strict = {row["batch"]: row for row in found["strict_rows"]}
    return [
        beside(
            f"{found['model']}, batch {row['batch']}: {kind}, STRICT over plain",
            strict[row["batch"]][f"{kind}_tok_s"] / row[f"{kind}_tok_s"],
        )
        for row in found["rows"]
        for kind in ("decode", "prefill")
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--model", nargs="+", default=["qwen3-0.6b", "llama-3-8b"], choices=list(SHAPES))
    add("--models", type=Path, default=Path(".cache/gpu-models"), help="where checkpoints are, or are made")
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    add("--input", type=int, default=512, help="prompt tokens")
    add("--output", type=int, default=128, help="tokens to emit")
    add("--rounds", type=int, default=3)
    add("--step-tokens", type=int, default=8192, help="rows of a step")
    add("--copy-mib", type=int, default=1024)
    add("--product", type=int, default=8192, help="rows and columns of the matrix product")
    add("--only", choices=("ellm", "vllm"), help="one side; vllm is put beside what --out holds of ours")
    add("--vllm-python", type=Path, default=None, help="interpreter of an environment with vLLM")
    add("--strict", action="store_true", help="the same with STRICT, too: what it costs")
    add("--tiny", action="store_true", help="a tiny model, short runs: shows that it works")
    add("--out", default="engine.json")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(model=["tiny"], batch=[1, 3], input=40, output=12, rounds=1)
        vars(args).update(copy_mib=1, product=128, step_tokens=64)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    found = earlier(args.out) if args.only == "vllm" else [measure(args, name) for name in args.model]
    for model in found:
        if args.only != "ellm":
            with_vllm(args, model)
        finish(args, model)
    write(args.out, torch.device(args.device), vars(args), models=found, aims=aims(found))


if __name__ == "__main__":
    main()
