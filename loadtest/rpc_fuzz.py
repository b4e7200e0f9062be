"""The gRPC API under messages that nobody means: of any bytes, of extreme values, for the wrong method, with
odd metadata, from clients that leave.

    python -m ellm.loadtest.rpc_fuzz [--calls 5000] [--grpc HOST:PORT --url http://HOST:PORT]

Without addresses it starts `ellm serve` with two workers on the model that ships. Fails on any status that is
not one of ours, on a good message that does not reach the engine, or on something left behind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

import grpc

from ellm.loadtest.result import Result, command_line
from ellm.loadtest.rpc_messages import GENERATE, Call, calls
from ellm.loadtest.served import answers, left_over, served

ABOUT = """\
`ellm serve` (two workers on the bundled model) gets {calls:,} gRPC messages, eight at once: 45 % are
good ones of Generate and ModelInfer, the others have extreme values in any field, changed or random
bytes, odd metadata, belong to another method, or come from clients that leave. Each must end with a
status of ours and every good one with OK. Afterwards a normal request is made, and all workers are
asked for requests and referenced blocks."""
OURS = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
SHORT_S = 1.0  # a client with less patience leaves


@dataclass(slots=True)
class Verdict:
    statuses: Counter[str] = field(default_factory=Counter)
    reached: int = 0  # good ones that were answered
    faults: list[str] = field(default_factory=list)


def status_of(channel: grpc.Channel, call: Call) -> grpc.StatusCode:
    """How a call ended, by the server's word."""
    make = channel.unary_stream if call.method == GENERATE else channel.unary_unary
    try:
        answer = make(call.method)(call.data, metadata=call.metadata, timeout=call.timeout_s)
        if call.method == GENERATE:
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def send(channel: grpc.Channel, sent: Sequence[Call], threads: int = 8) -> Verdict:
    verdict = Verdict()
    with ThreadPoolExecutor(threads) as pool:
        codes = list(pool.map(lambda call: status_of(channel, call), sent))
    for call, code in zip(sent, codes, strict=True):
        verdict.statuses[code.name] += 1
        verdict.reached += call.good and code is grpc.StatusCode.OK
        left = call.timeout_s < SHORT_S and code is grpc.StatusCode.DEADLINE_EXCEEDED
        if (code not in OURS and not left) or (call.good and code is not grpc.StatusCode.OK):
            verdict.faults.append(f"{call.method} {call.data[:60]!r}: {code.name}")
    return verdict


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grpc", help="HOST:PORT of a server that runs already")
    parser.add_argument("--url", help="and its URL")
    parser.add_argument("--port", type=int, default=8185, help="and the next for gRPC")
    parser.add_argument("--name", default="rpc-fuzz", help="slug of the result file")
    return parser.parse_args()


def main() -> int:
    asked, start = parse(), time.monotonic()
    if (asked.grpc is None) != (asked.url is None):
        raise SystemExit("--grpc and --url go together")
    address = asked.grpc or f"127.0.0.1:{asked.port + 1}"
    words = ("--workers", "2", "--device", "cpu", "--dtype", "float32", "--kv-blocks", "1024",
             "--port", str(asked.port), "--grpc-port", str(asked.port + 1))  # fmt: skip
    with (
        nullcontext(asked.url) if asked.url else served(*words) as url,
        grpc.insecure_channel(address) as line,
    ):
        verdict = send(line, list(calls(asked.seed, asked.calls)))
        wrong = verdict.faults + [f"left over: {n} {what}" for what, n in left_over(url).items() if n]
        if not answers(url):
            wrong.append("a normal request fails")
    row = {
        "calls": verdict.statuses.total(),
        "good and answered": verdict.reached,
        **dict(sorted(verdict.statuses.items())),
        "wrong": len(wrong),
        "seconds": round(time.monotonic() - start),
    }
    Result(
        asked.name, "Messages that nobody means", ABOUT.format(calls=asked.calls),
        command_line("ellm.loadtest.rpc_fuzz"), [row], seed=asked.seed, notes=wrong[:20],
    ).write()  # fmt: skip
    print(row, *wrong[:40], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
