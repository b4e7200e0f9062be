"""The servers that `thousand_streams` compares, each with one simulated worker.

ellm             `ellm serve`: HAProxy, one router, one worker
serve 2          Serve's own proxy, a FastAPI ingress, the engine's deployment behind a streaming handle
serve 1          the same with the engine within the ingress: no second hop, and no second process
serve 2 haproxy  `serve 2` behind Serve's HAProxy, with Serve's settings for throughput
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from ellm.loadtest.http_cost import TOKENIZER
from ellm.loadtest.served import SERVE, Started, started

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


def server(side: str, model: str, port: int, streams: int) -> AbstractContextManager[Started]:
    """The side's server. `model`: a simulated one."""
    seqs = max(64, streams + 24)
    if side == OURS:
        words = ["serve", model, "--port", str(port), "--workers", "1"]
        for setting in (f"router.tokenizer={TOKENIZER}", f"worker.scheduler.max_num_seqs={seqs}"):
            words += ["--set", setting]
        words += ["--set", f"worker.cache.num_blocks={BLOCKS}"]
        return started(SERVE, words)
    words = ["--stages", side.split()[1], "--port", str(port), "--model", model]
    words += ["--max-num-seqs", str(seqs), "--num-blocks", str(BLOCKS)]
    environment = {**os.environ, **QUIET, **(HAPROXY if side.endswith("haproxy") else {})}
    return started("ellm.loadtest.plain_ingress", words, environment)
