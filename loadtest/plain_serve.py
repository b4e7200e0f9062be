"""An LLM application on Ray Serve as its documentation writes one: the side that ours is compared with.

    python -m ellm.loadtest.plain_serve [--port 8178] [--step-ms 10]

A FastAPI ingress streams server-sent events from a model deployment by handle, through Serve's own proxy. The
model computes nothing: like our simulated worker it ends a step each `step-ms`, and each step gives every
request one token.
"""

# No postponed annotations: FastAPI reads them in a process to which this module's names do not come along.

import argparse
import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

MODEL = "plain"
MAX_ONGOING = 10_000
WORD = " token"


def application(step_s: float) -> Any:
    """The bound application. Ray is imported here, after the environment is set."""
    import fastapi
    from fastapi.responses import StreamingResponse
    from ray import serve

    app = fastapi.FastAPI()

    @serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    class Model:
        """Steps by the clock, shared by all requests."""

        async def generate(self, tokens: int) -> AsyncIterator[str]:
            first = int(time.monotonic() / step_s) + 2  # the step that runs now is not this request's
            for i in range(tokens):
                await asyncio.sleep(max(0.0, (first + i) * step_s - time.monotonic()))
                yield WORD

    @serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
    @serve.ingress(app)
    class Ingress:
        """OpenAI's streamed completions, as far as a load generator needs them."""

        def __init__(self, model: Any) -> None:
            self._model = model.options(stream=True)

        @app.get("/v1/models")
        def models(self) -> dict[str, Any]:
            return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

        @app.post("/v1/completions")
        async def completions(self, body: dict[str, Any]) -> Any:
            tokens = int(body.get("max_tokens") or 16)
            prompt = len(str(body.get("prompt")).split())
            usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
            if not body.get("stream"):
                choice = {"index": 0, "text": WORD * tokens, "finish_reason": "length"}
                return {"id": "p", "object": "text_completion", "choices": [choice], "usage": usage}
            return StreamingResponse(self._events(tokens, usage), media_type="text/event-stream")

        async def _events(self, tokens: int, usage: dict[str, int]) -> AsyncIterator[bytes]:
            count = 0
            async for text in self._model.generate.remote(tokens):
                count += 1
                reason = "length" if count == tokens else None
                yield event({"choices": [{"index": 0, "text": text, "finish_reason": reason}]})
            yield event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

    return Ingress.bind(Model.bind())  # type: ignore[attr-defined]


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event of a completion."""
    whole = {"id": "p", "object": "text_completion", "created": 1, "model": MODEL, **data}
    return b"data: " + json.dumps(whole).encode() + b"\n\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8178)
    parser.add_argument("--step-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    os.environ.update(
        {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    )
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": arguments.port},
            logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),  # as ours
        )
        serve.run(application(arguments.step_ms / 1e3), name="plain", route_prefix="/")
        print(f"Ready: http://127.0.0.1:{arguments.port}", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
