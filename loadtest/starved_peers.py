"""KV-starved servers beside each other: ours, our model of vLLM, and vLLM, over HTTP.

    python -m ellm.loadtest.starved_peers --vllm .cache/vllm/bin/vllm --trace azure_conv_2023.csv

First both servers run with room for all. What each then says is what it must say with a starved pool; how
much context they held at once, divided by `--times`, is the pool. All is judged by three SLOs. `unstarved` is
the TPOT that the slower of the two keeps for 95 % of its requests with room for all, times `--slo-ratio`.
`full pool` is the step of the slower of the two when as many run as the starved pool holds, times
`--full-slo-ratio`: what a request gets that is admitted and never disturbed (1.13 is the paper's overload
setting); `full pool, faster` is that of the faster of the two. Where it is ours, `full-chunked` is a rival
that is no slower. Then the same requests come at the same times to each side on the starved pool: without a
host tier, and with one where the sides without get its bytes as more pool. Ours runs once for each SLO, since
it plans for it; what the others do does not depend on it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ellm.loadtest.bench_checkpoint import make_checkpoint, with_tokenizer
from ellm.loadtest.generator_limits import how_busy, portable
from ellm.loadtest.peer_servers import (
    VLLM,
    Setting,
    ellm_server,
    kv_token_bytes,
    unwind_on_sigterm,
    vllm_server,
)
from ellm.loadtest.result import Result, Row, command_line
from ellm.loadtest.served import Started
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.starved_peer_rows import ADAPTIVE, CHUNKED, Outcome, counters, with_ratios
from ellm.loadtest.starved_peer_rows import row_of as outcome_row
from ellm.loadtest.starved_roomy import TIMEOUT_S, Unstarved, as_if_full, at_once, in_time
from ellm.loadtest.starved_workload import (
    Spec,
    Workload,
    ended_bodies,
    endless_bodies,
    make_workload,
    same_share,
)
from ellm.loadtest.text_table import text_table
from ellm.loadtest.timed_requests import Answers, send_timed

ABOUT = """\
28M-parameter Llama with random weights in {dtype} over HTTP, {threads} thread(s) a side; {requests} requests
at {rate:.2f}/s ({arrivals}), mean {prompt:.0f} prompt and {output:.0f} output tokens, ended by a stop token
that no server can foresee under `max_tokens` {cap}. With room for all, {peak:,} tokens of context are held at
once; the pool holds {pool:,}, {times:g} times less, the host tier as many bytes, {tier}.
Blocks of {block} tokens, at most {seqs} sequences and {step} tokens a step, no watermark, no prefix
caching on any side. The SLO per output token is {ratio:g} times what 95 % of the requests of the slower
side keep unstarved, and {full_ratio:g} times its step when as many run as the starved pool holds, and that
of the faster side.
`ratio`: our goodput over vLLM's, `by full-chunked`: over that of our own engine planning as vLLM does,
`ratio TTFT`: its mean TTFT over ours; `same` is the share of answers that are, token by token, those of the
same server unstarved; `by vLLM` is the figure over vLLM's."""

TIERS = {
    "auto": "by default more of\nthe pool on a CPU, whose memory it is",
    "copied": "in which KV is\ncopied to and fro as on a GPU",
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vllm", type=Path, help="the `vllm` of an environment of its own; without: ours alone"
    )
    parser.add_argument("--trace", type=Path, help="whose arrivals are taken; without: gamma gaps, cv 1.7")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--prompt", type=int, default=64, help="mean prompt tokens")
    parser.add_argument("--output", type=int, default=256, help="mean output tokens")
    parser.add_argument("--cap", type=int, default=768, help="max_tokens of every request")
    parser.add_argument(
        "--load", type=float, default=0.7, help="share of what the slower side serves unstarved"
    )
    parser.add_argument("--times", type=float, default=3.0, help="offered context over the pool")
    parser.add_argument("--slo-ratio", type=float, default=1.1, help="SLO over the unstarved p95 TPOT")
    parser.add_argument("--full-slo-ratio", type=float, default=1.13, help="SLO over the step at a full pool")
    parser.add_argument("--host", default="off,on", help="the host tier: off, on or both")
    parser.add_argument("--host-tier", default="auto", choices=tuple(TIERS), help="auto: on a CPU more pool")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=512)
    parser.add_argument("--vllm-more", default="", help="further arguments of vLLM, such as --enforce-eager")
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/bench-28m"), help="made if missing")
    parser.add_argument("--port", type=int, default=8431, help="and the next one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="starved-peers", help="slug of the result file")
    return parser.parse_args(words)


def setting_of(arguments: argparse.Namespace, kv_bytes: int) -> Setting:
    return Setting(
        arguments.checkpoint,
        arguments.dtype,
        arguments.threads,
        kv_bytes,
        arguments.block_size,
        arguments.max_num_seqs,
        arguments.max_step_tokens,
        max_model_len=arguments.cap + 4 * arguments.prompt,  # the longest there may be
        vllm_more=tuple(arguments.vllm_more.split()),
    )


def roomy_bytes(arguments: argparse.Namespace, work: Workload) -> int:
    """For as many as may run at once, each of the mean length at its end, and half as much again."""
    each = fmean(len(p) + n for p, n in zip(work.prompts, work.wanted, strict=True)) + arguments.block_size
    most = min(arguments.requests, arguments.max_num_seqs)
    return int(1.5 * most * each) * kv_token_bytes(arguments.checkpoint, arguments.dtype)


def pool_tokens(arguments: argparse.Namespace, found: dict[str, Unstarved]) -> int:
    peak = min(one.peak_tokens for one in found.values())
    return int(peak / arguments.times) // int(arguments.block_size) * int(arguments.block_size)


def unstarved(arguments: argparse.Namespace, work: Workload) -> tuple[dict[str, Unstarved], float]:
    """Both servers with room for all; and the rate."""
    setting = setting_of(arguments, roomy_bytes(arguments, work))
    with ExitStack() as stack:
        servers = {ADAPTIVE: stack.enter_context(ellm_server(setting, arguments.port, "full-chunked"))}
        if arguments.vllm is not None:
            log = Path(".cache/vllm-roomy.log")
            servers[VLLM] = stack.enter_context(vllm_server(arguments.vllm, setting, arguments.port + 1, log))
        found = {name: Unstarved() for name in servers}
        for name, server in servers.items():
            at_once(server, work, found[name])
            print(f"{name}, all at once: {found[name].tok_s:.0f} tok/s", flush=True)
        slowest = min(one.tok_s for one in found.values())
        rate = arguments.load * slowest / max(one.mean_output for one in found.values())
        for name, server in servers.items():
            in_time(server, work, rate, found[name])
            one = found[name]
            print(
                f"{name}, roomy: TPOT p95 {1e3 * one.tpot_p95_s:.1f} ms, "
                f"{one.peak_tokens} tokens at the peak, same {one.same:.3f}",
                flush=True,
            )
        for name, server in servers.items():
            as_if_full(server, work, pool_tokens(arguments, found), found[name])
            print(f"{name}, as if full: {1e3 * found[name].full_step_s:.1f} ms a step", flush=True)
    return found, rate


@dataclass(frozen=True, slots=True)
class Starved:
    """What all starved runs have in common."""

    arguments: argparse.Namespace
    work: Workload
    rate: float
    pool_bytes: int
    slos: dict[str, float]
    unstarved: dict[str, Unstarved]

    def run(self, side: str, host: bool, slos: Sequence[str]) -> list[Outcome]:
        """A fresh server that plans for the first SLO, and what became of the requests by each."""
        ours = side == ADAPTIVE
        host_bytes = self.pool_bytes if host and ours else 0
        pool = self.pool_bytes * (2 if host and not ours else 1)
        setting, port = setting_of(self.arguments, pool), self.arguments.port
        with ExitStack() as stack:
            if side == VLLM:
                log = Path(f".cache/vllm-starved-{host}.log")
                server = stack.enter_context(vllm_server(self.arguments.vllm, setting, port + 1, log))
            else:
                policy = "adaptive" if ours else "full-chunked"
                # vLLM on a CPU plans no step ahead, so what is to be like it does not either.
                keys = {"tpot_slo_ms": 1e3 * self.slos[slos[0]], "pipeline_depth": 2 if ours else 1}
                more = {f"worker.scheduler.{key}": value for key, value in keys.items()}
                more["worker.cache.host_tier"] = self.arguments.host_tier
                server = stack.enter_context(ellm_server(setting, port, policy, host_bytes, more))
            outcome, answers = self.offer(server, side, host, (pool, host_bytes))
        return [self.judged(outcome, answers, slo) for slo in slos]

    def judged(self, outcome: Outcome, answers: Answers, slo: str) -> Outcome:
        metrics = measure(self.work.due_s(self.rate), answers.token_times, self.slos[slo])
        return replace(outcome, slo=slo, slo_s=self.slos[slo], metrics=metrics)

    def offer(self, server: Started, side: str, host: bool, room: tuple[int, int]) -> tuple[Outcome, Answers]:
        """The requests in time. `room` is what the server has, in bytes: its pool and its host tier."""
        known = self.unstarved[VLLM if side == VLLM else ADAPTIVE]
        assert known.expected is not None
        due = self.work.due_s(self.rate)
        warm = replace(self.work, prompts=self.work.prompts[:4], wanted=[8] * 4)
        send_timed(server.url, endless_bodies(warm), [0.0] * 4, TIMEOUT_S)
        before = counters(server.url)
        answers: Answers = send_timed(server.url, ended_bodies(self.work, known.expected), due, TIMEOUT_S)
        after = counters(server.url)
        first = next(iter(self.slos))
        outcome = Outcome(
            side,
            "on" if host else "off",
            first,
            self.slos[first],
            *room,
            measure(due, answers.token_times, self.slos[first]),
            same_share(answers.tokens, known.expected),
            sum(map(len, answers.tokens)),
            {name: after[name] - before[name] for name in after},
            answers.late_p99_s,
        )
        return outcome, answers


def run_all(starved: Starved) -> tuple[list[Row], list[Any]]:
    outcomes: list[Outcome] = []
    sides = [ADAPTIVE, CHUNKED] + ([VLLM] if starved.arguments.vllm is not None else [])
    for host in starved.arguments.host.split(","):
        for side in sides:
            slos = list(starved.slos)
            for those in [[slo] for slo in slos] if side == ADAPTIVE else [slos]:
                some = starved.run(side, host == "on", those)
                outcomes += some
                print(text_table([outcome_row(one) for one in some]), flush=True)
    return with_ratios(outcomes), [asdict(outcome) for outcome in outcomes]


def main() -> int:
    arguments = parse()
    unwind_on_sigterm()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with_tokenizer(make_checkpoint(arguments.checkpoint, 0))
    spec = Spec(
        arguments.requests, arguments.prompt, arguments.output, arguments.cap, arguments.trace, arguments.seed
    )
    work = make_workload(spec)
    found, rate = unstarved(arguments, work)
    peak = min(one.peak_tokens for one in found.values())
    token_bytes = kv_token_bytes(arguments.checkpoint, arguments.dtype)
    pool = pool_tokens(arguments, found)
    pool_bytes = pool * token_bytes
    longest = setting_of(arguments, pool_bytes).max_model_len
    if pool_bytes < longest * token_bytes:
        raise RuntimeError(f"a request of {longest} tokens does not fit: more requests, or a higher --load")
    slos = {
        "unstarved": arguments.slo_ratio * max(one.tpot_p95_s for one in found.values()),
        "full pool": arguments.full_slo_ratio * max(one.full_step_s for one in found.values()),
        "full pool, faster": arguments.full_slo_ratio * min(one.full_step_s for one in found.values()),
    }
    said = ", ".join(f"SLO {1e3 * slo:.1f} ms ({name})" for name, slo in slos.items())
    print(f"{rate:.2f} requests/s, pool {pool} of {peak} tokens, {said}", flush=True)
    rows, raw = run_all(Starved(arguments, work, rate, pool_bytes, slos, found))
    print(text_table(rows))
    about = ABOUT.format(
        dtype=arguments.dtype,
        threads=arguments.threads,
        requests=arguments.requests,
        rate=rate,
        arrivals=f"arrivals of {arguments.trace.name}" if arguments.trace else "gamma gaps, cv 1.7",
        prompt=fmean(map(len, work.prompts)),
        output=found[ADAPTIVE].mean_output,
        cap=arguments.cap,
        peak=peak,
        pool=pool,
        times=arguments.times,
        block=arguments.block_size,
        seqs=arguments.max_num_seqs,
        step=arguments.max_step_tokens,
        ratio=arguments.slo_ratio,
        full_ratio=arguments.full_slo_ratio,
        tier=TIERS[arguments.host_tier],
    )
    notes = [how_busy()] + [
        f"unstarved, {name}: {one.tok_s:.0f} tok/s all at once, TPOT p95 {1e3 * one.tpot_p95_s:.1f} ms, "
        f"{one.peak_tokens:,} tokens of context at the peak, same {one.same:.3f}; "
        f"{1e3 * one.full_step_s:.1f} ms a step as if the starved pool were full"
        for name, one in found.items()
    ]
    result = Result(
        name=arguments.name,
        title="KV-starved servers beside each other",
        about=about,
        command=portable(command_line("ellm.loadtest.starved_peers")),
        rows=rows,
        seed=arguments.seed,
        notes=notes,
        raw={"unstarved": {k: asdict(v) for k, v in found.items()}, "starved": raw, "slos": slos},
    )
    print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
