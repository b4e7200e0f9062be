"""`ellm bench`: an open-loop load test of any OpenAI-compatible server, or of ours over gRPC."""

from __future__ import annotations

import argparse
import sys
from typing import Any

EPILOG = """\
Requests are sent by the clock, whatever the server does; a request that goes out late counts from when it was
due. LENGTHS are one of N, LOW-HIGH, normal:MEAN,STD, lognormal:MEAN,SIGMA, exponential:MEAN, choice:N,N,...
Definitions of the figures: docs/bench.md.

examples:
  ellm bench --url http://127.0.0.1:8000 --rate 4 --num-requests 200 --html report.html
  ellm bench --url http://127.0.0.1:8000 --rate 4 --ttft-slo-ms 500 --tpot-slo-ms 50 --json a.json
  ellm bench --url grpc://127.0.0.1:8001 --rate 10 --arrivals gamma --cv 2 --input-tokens lognormal:300,0.8
  ellm bench --url ... --trace azure.csv --rate 5          a trace's rhythm and lengths, at 5 requests/s
  ellm bench --url ... --dataset sharegpt.json --chat --turns 1-5 --think-s 2 --rate 2
  ellm bench --url ... --sweep rate=1:10 --duration-s 60 --tpot-slo-ms 50 --html sweep.html
  ellm bench --url ... --search 90,95,99 --rate 4 --duration-s 60 --ttft-slo-ms 500 --tpot-slo-ms 50
  ellm bench --compare a.json b.json --html both.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    _target(parser.add_argument_group("the server"))
    _load(parser.add_argument_group("when requests come"))
    _content(parser.add_argument_group("what they ask"))
    _judged(parser.add_argument_group("what they are measured against, and where that goes"))


def _target(group: Any) -> None:
    add = group.add_argument
    add("--url", metavar="URL", help="http://HOST:PORT, https://..., or grpc://HOST:PORT (ellm.v1.Inference)")
    add("--model", metavar="M", help="default: the server's first")
    add("--chat", action="store_true", help="chat completions (default: completions)")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="may be repeated")
    add("--extra-body", metavar="JSON", help="more fields of each request, such as '{\"tpot_slo_ms\": 50}'")
    add("--timeout-s", type=float, default=600.0, metavar="S", help="per request (default: 600)")


def _load(group: Any) -> None:
    add = group.add_argument
    add("--rate", type=float, metavar="R", help="requests per second in the mean; inf: all at once")
    add("--num-requests", type=int, metavar="N", help="default: 100; of sessions with --turns")
    add(
        "--duration-s",
        type=float,
        metavar="S",
        help="instead of --num-requests: as many as come in S seconds",
    )
    add(
        "--arrivals",
        choices=("poisson", "gamma", "constant", "bursts", "trace"),
        help="default: poisson; with --trace the trace's own, stretched to --rate where that is given",
    )
    add("--cv", type=float, default=1.0, metavar="C", help="variation of the gaps, for gamma (default: 1)")
    add("--burst-size", type=int, default=8, metavar="N", help="requests at once, for bursts (default: 8)")
    add("--warmup", type=int, default=0, metavar="N", help="requests before that count in no figure")
    add("--cancel", type=float, default=0.0, metavar="SHARE", help="of requests whose client goes away")
    add("--cancel-after-s", type=float, default=1.0, metavar="S", help="mean time till then (default: 1)")
    add("--processes", type=int, default=0, metavar="N", help="senders; default: as many as the rate needs")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same requests (default: 0)")


def _content(group: Any) -> None:
    add = group.add_argument
    add("--input-tokens", default="256", metavar="LENGTHS", help="of prompts (default: 256)")
    add("--output-tokens", metavar="LENGTHS", help="default: 128, or what a trace or dataset says")
    add("--trace", metavar="FILE", help="Azure's or BurstGPT's CSV, Mooncake's JSONL with shared prefixes")
    add(
        "--trace-scale", type=float, default=1.0, metavar="X", help="factor on a trace's lengths (default: 1)"
    )
    add("--dataset", metavar="FILE", help="ShareGPT's JSON, or JSON lines with prompt or messages")
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.json: prompts of exactly the asked length")
    add("--prompt-ids", action="store_true", help="send token ids instead of text: exact lengths everywhere")
    add("--shared-prompts", type=int, default=0, metavar="N", help="different system prompts (default: none)")
    add("--shared-tokens", type=int, default=0, metavar="N", help="tokens of each system prompt")
    add("--turns", default="1", metavar="LENGTHS", help="of a conversation; each sends all said before")
    add(
        "--think-s", type=float, default=0.0, metavar="S", help="mean pause before the next turn (default: 0)"
    )
    add("--no-ignore-eos", action="store_true", help="let answers end by themselves; some servers want this")


def _judged(group: Any) -> None:
    add = group.add_argument
    for name, what in (
        ("ttft", "first token"),
        ("tpot", "mean time per output token"),
        ("e2e", "last token"),
    ):
        add(f"--{name}-slo-ms", type=float, metavar="X", help=f"{what}; goodput counts who keeps all given")
    add("--json", metavar="OUT", help="everything, every request")
    add("--html", metavar="OUT", help="a report with plots, in one file")
    add("--quiet", action="store_true", help="no live line")
    add("--sweep", metavar="rate=A:B[:STEP]", help="several rates, one after the other")
    add(
        "--search",
        nargs="?",
        const="90,95,99",
        metavar="P,P",
        help="the highest rates that keep the SLOs for these percentages of requests (default: 90,95,99)",
    )
    add("--compare", nargs=2, metavar=("A", "B"), help="two files of --json instead of a run")


def run(args: argparse.Namespace) -> int:
    from ellm.deploy.commands.simulate import check_folder
    from ellm.worker.api.errors import ConfigError

    for path in (args.json, args.html):
        check_folder(path)
    if args.compare:
        from ellm.loadtest.generator.session import compare

        return compare(args.compare, args.html)
    if args.url is None:
        raise ConfigError("--url is needed, such as --url http://127.0.0.1:8000")
    from ellm.loadtest.generator import session

    options = options_of(args)
    outputs = session.Outputs(args.json, args.html, args.quiet or not sys.stderr)
    if args.sweep:
        return session.sweep_rates(options, args.sweep, args.duration_s, outputs)
    if args.search:
        return session.search_rates(options, args.search, args.duration_s, outputs)
    return session.single(options, outputs)


def options_of(args: argparse.Namespace) -> Any:
    """The flags as Options. Raises ConfigError."""
    from dataclasses import fields

    from ellm.loadtest.generator.options import Options, Slo

    names = {field.name for field in fields(Options)} & set(vars(args))
    values = {name: getattr(args, name) for name in names}
    values |= {
        "num_requests": _count(args),
        "arrivals": args.arrivals or ("trace" if args.trace else "poisson"),
        "cancel_share": args.cancel,
        "ignore_eos": not args.no_ignore_eos,
        "extra_body": _json(args.extra_body),
        "headers": dict(_header(text) for text in args.header),
        "slo": Slo(*(_seconds(getattr(args, f"{name}_slo_ms")) for name in ("ttft", "tpot", "e2e"))),
    }
    return Options(**values)


def _count(args: argparse.Namespace) -> int:
    from ellm.worker.api.errors import ConfigError

    if args.duration_s is None:
        return 100 if args.num_requests is None else int(args.num_requests)
    if args.num_requests is not None:
        raise ConfigError("--num-requests or --duration-s, not both")
    if args.duration_s <= 0.0:
        raise ConfigError("--duration-s must be above 0")
    if args.rate is None:
        if args.sweep:
            return 1  # each rate has its own
        raise ConfigError("--duration-s needs --rate R")
    return max(1, round(args.duration_s * args.rate)) if 0.0 < args.rate < float("inf") else 1


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000.0


def _json(text: str | None) -> dict[str, Any]:
    import json

    from ellm.worker.api.errors import ConfigError

    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("--extra-body must be a JSON object")
    return value


def _header(text: str) -> tuple[str, str]:
    from ellm.worker.api.errors import ConfigError

    name, colon, value = text.partition(":")
    if not colon or not name.strip() or "\n" in text or "\r" in text:
        raise ConfigError(f"--header {text!r} is not NAME:VALUE")
    return name.strip(), value.strip()
