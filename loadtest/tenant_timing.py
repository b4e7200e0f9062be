"""Whether one tenant can tell by the clock what another has asked: times to the first token, by ratio.

    python -m ellm.loadtest.tenant_timing [--prompts 60] [--tokens 768]

One router and one worker with the model that ships, over HTTP in one process, two API keys. For each of
many random prompts: the first tenant asks it (nothing is cached), and asks it again (its own blocks are
found); then the other tenant asks it, and a prompt that nobody has asked, in random order. What the other
sees of a cached prompt must be what it sees of a new one. Beside the ratio of the medians stands how
often the asked-before prompt was the faster of the two (ties count half): 0.5 is a coin, 1 a perfect spy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from ellm.loadtest.result import Result, Row, command_line
from ellm.router.app import ModelSource, create_app
from ellm.router.config import RouterConfig
from ellm.router.keys import ApiKey, new_key, write_keys
from ellm.worker.api.config import ModelConfig, WorkerConfig
from ellm.worker.api.report import WorkerInfo
from ellm.worker.build import load_engine
from ellm.worker.front import WorkerFront
from ellm.worker.local_channel import LocalChannel, LocalDirectory
from ellm.worker.loop import EngineLoop

MODEL = Path(__file__).resolve().parent.parent / "deploy" / "bundled" / "pydoc-5m"
NAMES = ("first time", "its own again", "another's", "nobody's")
ABOUT = """\
One router and one worker with the bundled model in one process, asked over HTTP with two API keys:
{prompts} random prompts of {tokens} tokens, one token of answer each. `first time`: the first tenant asks
a prompt; `its own again`: it asks the same again; `another's`: the other tenant asks that prompt;
`nobody's`: the other tenant asks one that nobody has asked. Milliseconds until the answer; cached tokens
as the server told the client. `over nobody's` is of medians; `faster than nobody's` is the share of
prompts for which it was (0.5: a coin)."""


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    keys: tuple[str, str]


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Until the block ends."""
    made = [new_key(ApiKey("", name)) for name in ("first", "other")]
    write_keys(folder / "keys.json", [stored for stored, _ in made])
    config = RouterConfig(api_key_file=str(folder / "keys.json"), audit_log=str(folder / "audit.jsonl"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready, end = threading.Event(), threading.Event()
        work = threading.Thread(target=lambda: asyncio.run(_serve(config, listener, ready, end)), daemon=True)
        work.start()
        assert ready.wait(600.0), "the server did not start"
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", (made[0][1], made[1][1]))
        end.set()
        work.join(30.0)


async def _serve(
    config: RouterConfig, listener: socket.socket, ready: threading.Event, end: threading.Event
) -> None:
    worker = WorkerConfig(model=ModelConfig(path=str(MODEL), device="cpu"), heartbeat_s=0.05)
    engine = load_engine(worker, lambda what, share: None)
    limits = engine.executor.limits
    info = WorkerInfo(
        "w0", "epoch0", engine.served_name, "node", limits.max_model_len, limits.block_size,
        limits.num_blocks, limits.vocab_size, limits.eos_token_ids, engine.device, engine.dtype,
        engine.deterministic,
    )  # fmt: skip
    front = WorkerFront(info, worker, EngineLoop(engine.core, engine.executor, report_s=0.05))
    front.start()
    source = ModelSource(engine.served_name, MODEL, LocalDirectory(LocalChannel(front)))
    app = create_app(config, [source])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    ready.set()
    await asyncio.to_thread(end.wait)
    server.should_exit = True
    await running
    await front.close()


def ask(client: httpx.Client, key: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the answer, and how much of the prompt was cached."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    begun = time.perf_counter()
    answer = client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    elapsed = time.perf_counter() - begun
    answer.raise_for_status()
    return elapsed, answer.json()["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)


def measure(found: Served, prompts: int, tokens: int, seed: int) -> dict[str, list[tuple[float, int]]]:
    """By NAMES, in the prompts' order."""
    chance = random.Random(seed)
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in NAMES}
    first, other = found.keys

    def drawn() -> list[int]:
        return [chance.randrange(10, 4000) for _ in range(tokens)]

    with httpx.Client(base_url=found.url, timeout=120.0) as client:
        for key in found.keys:
            ask(client, key, drawn())
        for _ in range(prompts):
            prompt, fresh = drawn(), drawn()
            times["first time"].append(ask(client, first, prompt))
            times["its own again"].append(ask(client, first, prompt))
            pairs = [("another's", prompt), ("nobody's", fresh)]
            chance.shuffle(pairs)
            for name, asked in pairs:
                times[name].append(ask(client, other, asked))
    return times


def rows_of(times: dict[str, list[tuple[float, int]]]) -> list[Row]:
    new = [elapsed for elapsed, _ in times["nobody's"]]
    rows: list[Row] = []
    for name, taken in times.items():
        seconds = [elapsed for elapsed, _ in taken]
        faster = [
            0.5 if one == fresh else float(one < fresh) for one, fresh in zip(seconds, new, strict=True)
        ]
        rows.append(
            {
                "prompt": name,
                "ms, median": 1e3 * statistics.median(seconds),
                "ms, 10 %": 1e3 * statistics.quantiles(seconds, n=10)[0],
                "ms, 90 %": 1e3 * statistics.quantiles(seconds, n=10)[-1],
                "over nobody's": statistics.median(seconds) / statistics.median(new),
                "faster than nobody's": statistics.fmean(faster),
                "cached tokens": statistics.median(cached for _, cached in taken),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as found:
        times = measure(found, arguments.prompts, arguments.tokens, arguments.seed)
    rows = rows_of(times)
    print(json.dumps(rows, indent=1))
    result = Result(
        name="tenant-timing",
        title="What one tenant learns by the clock of another's prompts",
        about=ABOUT.format(prompts=arguments.prompts, tokens=arguments.tokens),
        command=command_line("ellm.loadtest.tenant_timing"),
        rows=rows,
        seed=arguments.seed,
        raw=times,
    )
    if not arguments.no_write:
        print(f"wrote {result.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
