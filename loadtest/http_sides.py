"""The servers that `thousand_streams` compares, each with one simulated worker.

ellm             `ellm serve`: HAProxy, one router, one worker
serve 2          Serve's own proxy, a FastAPI ingress, the engine's deployment behind a streaming handle
serve 1          the same with the engine within the ingress: no second hop, and no second process
serve 2 haproxy  `serve 2` behind Serve's HAProxy, with Serve's settings for throughput
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ellm.loadtest.http_cost import TOKENIZER, wait_ready

BLOCKS = 16_384
OURS = "ellm"
SIDES = (OURS, "serve 2", "serve 1", "serve 2 haproxy")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # as ours sets them
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
}


@contextmanager
def server(side: str, model: str, port: int, streams: int) -> Iterator[int]:
    """The side's server, ready; yields its first process. `model`: a simulated one."""
    seqs = max(64, streams + 24)
    if side == OURS:
        command = ["ellm.deploy.cli", "serve", model, "--port", str(port), "--workers", "1"]
        for setting in (f"router.tokenizer={TOKENIZER}", f"worker.scheduler.max_num_seqs={seqs}"):
            command += ["--set", setting]
        command += ["--set", f"worker.cache.num_blocks={BLOCKS}"]
        environment = dict(os.environ)
    else:
        stages = side.split()[1]
        command = ["ellm.loadtest.plain_ingress", "--stages", stages, "--port", str(port), "--model", model]
        command += ["--max-num-seqs", str(seqs), "--num-blocks", str(BLOCKS)]
        environment = {**os.environ, **QUIET, **(HAPROXY if side.endswith("haproxy") else {})}
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        wait_ready(process, begun)
        yield process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
