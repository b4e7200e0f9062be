"""The HTTP API under requests that nobody means: schemathesis over the server's own OpenAPI document.

    python -m ellm.loadtest.api_fuzz [--cases 5000] [--url http://HOST:PORT]

Without a URL it starts `ellm serve` with two workers on the model that ships, a short context and small
limits, so that random lengths stay payable. Fails on any fault: an answer that the document does not describe
(status, content type, headers, body), a 5xx other than 503, no answer, or something left behind.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext

import httpx

from ellm.loadtest.api_cases import FORBIDDEN, Verdict, judge
from ellm.loadtest.result import Result, command_line
from ellm.loadtest.served import answers, blocks_of, left_over, served

ABOUT = """\
schemathesis over the OpenAPI document of `ellm serve` as deployed (Ray, HAProxy, one router, two workers on
the bundled model, a context of {length} tokens): requests that it allows, most with few of the optional
fields, and {forbidden:.0%} of the bodies as it forbids them. Each answer's status, content type, headers,
JSON body and events must be as the document says. Reached: the share of all cases that generated text.
Afterwards a normal request is made, and every worker is asked for requests and referenced blocks."""
LENGTH = 128
WORDS = (
    "--workers", "2", "--device", "cpu", "--dtype", "float32", "--kv-blocks", "512",
    "--max-model-len", str(LENGTH), "--set", "router.limits.max_n=3", "--set", "router.limits.max_prompts=3",
    "--set", "router.limits.max_stop=4", "--set", "router.limits.max_stop_chars=64",
    "--set", "router.limits.max_logit_bias=32", "--set", "router.limits.max_messages=8",
)  # fmt: skip
MIN_REACHED = 0.3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes that make cases and send them")
    parser.add_argument("--threads", type=int, default=4, help="requests at once of each")
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--port", type=int, default=8175)
    parser.add_argument("--name", default="api-fuzz", help="slug of the result file")
    return parser.parse_args()


def run(url: str, asked: argparse.Namespace) -> tuple[Verdict, list[str], list[str]]:
    """What was answered, everything that is wrong, and where each worker's blocks are afterwards."""
    document = httpx.get(f"{url}/openapi.json", timeout=30).json()
    verdict, share = Verdict(), math.ceil(asked.cases / asked.jobs)
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        parts = [
            pool.submit(judge, document, url, share, 1000 * asked.seed + i, asked.threads)
            for i in range(asked.jobs)
        ]
        for part in as_completed(parts):
            verdict.add(part.result())
            print(f"{verdict.cases} cases, {len(verdict.faults)} faults", flush=True)
    wrong = list(verdict.faults)
    if verdict.reached < MIN_REACHED:
        wrong.append(f"only {verdict.reached:.0%} reached the engine")
    left = left_over(url)
    wrong += [f"left over: {count} {what}" for what, count in left.items() if count]
    if not answers(url):
        wrong.append("a normal request fails")
    return verdict, wrong, blocks_of(url)


def main() -> int:
    asked = parse()
    start = time.monotonic()
    running = nullcontext(asked.url) if asked.url else served(*WORDS, "--port", str(asked.port))
    with running as url:
        verdict, wrong, blocks = run(url, asked)
    rows = [
        {
            "cases": verdict.cases,
            "reached the engine": round(verdict.reached, 3),
            "5xx but 503": sum(
                n for status, n in verdict.by_status().items() if status >= 500 and status != 503
            ),
            "not as described": len(verdict.faults),
            "wrong": len(wrong),
            **{str(status): count for status, count in verdict.by_status().items()},
            "seconds": round(time.monotonic() - start),
        }
    ]
    by_path = {f"{path} {status}": count for (path, status), count in sorted(verdict.statuses.items())}
    about = ABOUT.format(length=LENGTH, forbidden=FORBIDDEN)
    command = command_line("ellm.loadtest.api_fuzz")
    Result(
        asked.name, "Requests that nobody means", about, command, rows,
        seed=asked.seed, notes=wrong[:20] + blocks, raw=by_path,
    ).write()  # fmt: skip
    for line in [*map(str, by_path.items()), str(rows[0]), *wrong[:40], *blocks]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
