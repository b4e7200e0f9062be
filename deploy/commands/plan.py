"""`ellm plan`: what a GPU can hold and serve of a model, which layout to choose, and what pays there."""

from __future__ import annotations

import argparse
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ellm.deploy.commands.simulate import bar, check_folder, write_json
from ellm.loadtest.sim.table import align, in_bytes

if TYPE_CHECKING:
    from ellm.loadtest.sim.advice import Advice
    from ellm.loadtest.sim.layouts import Layout, Sized
    from ellm.loadtest.sim.trials import Trial

EPILOG = """\
examples:
  ellm plan llama2-13b --gpu a100-80g --workload sharegpt --tpot-slo-ms 100 --rate 0.75
  ellm plan ./my-checkpoint --gpu h100 --tpot-slo-ms 50 --tp 1,2,4 --json plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("model", metavar="MODEL", help="a preset (a wrong name lists them) or a folder with a config.json")
    add("--gpu", default="a100-80g", help="a preset (default: %(default)s)")
    add("--workload", default="sharegpt", metavar="W", help="sharegpt, leval, or a trace file")
    add("--tpot-slo-ms", type=float, required=True, metavar="X", help="per output token")
    add("--ttft-slo-ms", type=float, metavar="X", help="to the first token (default: none)")
    add("--rate", type=float, metavar="R", help="requests per second that will come")
    add("--load", type=float, metavar="L", help="instead: as a share of capacity (default: 0.9 and 1.2)")
    add("--cv", type=float, default=1.7, metavar="C", help="variation of the gaps, 1: Poisson (default: 1.7)")
    add(
        "--tp",
        default="1,2,4,8",
        metavar="N[,N...]",
        help="GPUs that may serve it together (default: 1,2,4,8)",
    )
    add("--host-gb", type=float, metavar="G", help="host memory for KV (default: what could pay; 0: none)")
    add("--kv-bytes", type=float, metavar="B", help="of the KV pool (default: what the weights leave)")
    add("--max-num-seqs", type=int, default=256, metavar="N", help="default: 256")
    add("--num-requests", type=int, metavar="N", help="per simulation (default: by what a step holds)")
    add("--no-trials", action="store_true", help="arithmetic alone: nothing is simulated, it takes a second")
    add("--jobs", type=int, default=1, metavar="N", help="processes that simulate side by side (default: 1)")
    add("--json", metavar="OUT", help="write everything to this file")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ellm.deploy.progress import Progress
    from ellm.loadtest.sim.advice import advise, arithmetic, as_result
    from ellm.loadtest.sim.layouts import host_gb, num_requests, rates, size_up

    sized = size_up(*_setting(args))
    check_folder(args.json)
    at = rates(sized, args.rate, args.load)
    host = host_gb(sized) if args.host_gb is None else args.host_gb
    count = num_requests(sized) if args.num_requests is None else args.num_requests
    sized = replace(sized, setting=replace(sized.setting, num_requests=count))
    for line in (*_title(sized), "", *_layouts(sized.layouts), ""):
        print(line)
    if args.no_trials:
        advice = arithmetic(sized, host, rate=args.rate)
        for line in _advice(advice):
            print(line)
        if args.json:
            write_json(args.json, as_result(sized, [], advice))
        return 0
    progress = Progress()
    with progress.phase(f"Simulating TP {sized.chosen.tp}, {count} requests at a time") as phase:
        trials, advice = advise(
            sized,
            at,
            host,
            rate=args.rate,
            jobs=max(1, args.jobs),
            on_progress=lambda share: phase.note(bar(share)),
        )
        phase.note("")
    for line in ("", *_trials(trials), "", *_advice(advice)):
        print(line)
    if args.json:
        write_json(args.json, as_result(sized, trials, advice))
    return 0


def _setting(args: argparse.Namespace) -> tuple[Any, list[int]]:
    """What is asked, checked, and the numbers of GPUs."""
    from dataclasses import fields, replace

    from ellm.loadtest.sim.checkpoint import find_model
    from ellm.loadtest.sim.presets import find_gpu
    from ellm.loadtest.sim.setting import Setting
    from ellm.worker.api.errors import ConfigError

    given = {
        key: value for key, value in vars(args).items() if value is not None and key not in ("tp", "rate")
    }
    names = {field.name for field in fields(Setting)} - {"load"}
    setting = Setting(**{key: value for key, value in given.items() if key in names})
    rate, load = args.rate, args.load
    if rate is None and load is None:
        load = 1.0
    find_model(args.model)
    find_gpu(args.gpu)
    replace(setting, rate=rate, load=load).check_values()
    if args.max_num_seqs < 1:
        raise ConfigError(f"--max-num-seqs must be at least 1, not {args.max_num_seqs}")
    return replace(setting, host_gb=0.0), _numbers(args.tp)


def _numbers(text: str) -> list[int]:
    from ellm.worker.api.errors import ConfigError

    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"--tp takes whole numbers from 1 on, with commas between them, not {text!r}")
    return sorted(set(numbers))


def _title(sized: Sized) -> list[str]:
    setting, demand, price = sized.setting, sized.demand, sized.prices
    model = setting.device.model
    return [
        f"{model.name} on {setting.gpu}: {model.num_params / 1e6:,.0f} million parameters, "
        f"{in_bytes(model.weight_bytes)} in bfloat16, {in_bytes(model.kv_token_bytes)} of KV per token",
        f"{setting.workload}: prompts of {demand.prompt_tokens:,.0f} tokens, outputs of "
        f"{demand.output_tokens:,.0f}, {demand.context_tokens:,.0f} held by a request that decodes; SLO "
        f"{setting.tpot_slo_ms:g} ms per token",
        f"one token's KV, TP {sized.chosen.tp}: read {1e6 * price.read_s:.3g} us, by the link "
        f"{1e6 * price.link_s:.3g} us, recomputed {1e6 * price.recompute_s:.3g} us; the mean prompt alone "
        f"{1e3 * sized.first_token_s:.3g} ms",
    ]


_COLUMNS = (
    ("weights", lambda s: in_bytes(s.weight_bytes)),
    ("KV pool", lambda s: in_bytes(s.pool_bytes)),
    ("N tokens", lambda s: f"{s.capacity_tokens:,}"),
    ("M/w", lambda s: f"{s.pool_over_weights:.2f}"),
    ("T0", lambda s: f"{1e3 * s.full_step_s:.1f} ms"),
    ("SLO/T0", lambda s: f"{s.slo_over_full_step:.2f}"),
    ("phi", lambda s: f"{s.phi:.2f}"),
    ("requests held", lambda s: f"{s.requests_held:.1f}"),
    ("running", lambda s: f"{s.running:.1f}"),
    ("limit", lambda s: s.limited_by),
    ("bound tok/s", lambda s: f"{s.bound_tok_s:,.0f}"),
    ("capacity tok/s", lambda s: f"{s.capacity_tok_s:,.0f}"),
    ("per GPU", lambda s: f"{s.capacity_tok_s_per_gpu:,.0f}"),
    ("req/s", lambda s: f"{s.capacity_requests_s:.3g}"),
)


def _layouts(layouts: list[Layout]) -> list[str]:
    rows = [["TP", *(title for title, _ in _COLUMNS)]]
    rows += [
        [str(layout.tp), *(form(layout.sizing) for _, form in _COLUMNS)]
        for layout in layouts
        if layout.sizing is not None
    ]
    return [*align(rows), *(f"TP {layout.tp}: {layout.reason}" for layout in layouts if layout.reason)]


def _trials(trials: list[Trial]) -> list[str]:
    rows = [["policy", "host", "req/s", "load", "tok/s", "goodput", "SLO", "TTFT mean", "p99", "preempt."]]
    rows += [
        [
            trial.policy,
            f"{trial.host_gb:g} GB",
            f"{trial.rate:.3g}",
            f"{trial.load:.2f}",
            f"{trial.throughput_tok_s:.0f}",
            f"{trial.goodput_tok_s:.0f}",
            f"{trial.slo_attainment:.3f}",
            f"{trial.ttft_mean_s:.3g} s",
            f"{trial.ttft_p99_s:.3g} s",
            f"{trial.preemptions:.0f}",
        ]
        for trial in trials
    ]
    return align(rows)


def _advice(advice: list[Advice]) -> list[str]:
    """A paragraph each."""
    return [
        fill(f"{one.topic[0].upper()}{one.topic[1:]}: {one.verdict}. {one.text}", 110, subsequent_indent="  ")
        for one in advice
    ]
