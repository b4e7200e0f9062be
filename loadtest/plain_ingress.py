"""A streaming completion server as one writes it with Ray Serve alone: the baseline of
`thousand_streams`, `serve_ingress` and `side_by_side`.

    python -m ellm.loadtest.plain_ingress --stages 2 --port 8165 --model simulated:overhead_s=0.005

`--stages 1`: a FastAPI ingress whose replicas hold the engine. `--stages 2`: the ingress calls the engine's
deployment through a streaming handle, one call per request, so that there can be more of either. The engine
is the product's (EngineLoop, on a checkpoint or the simulated executor), and so are detokenising and the
bytes of a chunk: only Serve stands where the product's own path is. Who starts it says by Ray's variables
whether HAProxy is used.
"""

# Annotations are values here: FastAPI reads those of a class that Serve wraps.

import argparse
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.schema import LoggingConfig

from ellm.loadtest.data_path_ways import PerRequestWorker, Tokens
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api import wire
from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams

TOKENIZER = Path(__file__).parent.parent / "deploy" / "bundled" / "pydoc-5m"
MAX_ONGOING = 5000  # Serve's own default, 5, would cripple it
MODEL = "plain"
_CHUNK = (
    b'data: {"id":"%s","object":"text_completion","created":%d,"model":"plain","choices":[{"index":0,"text":',
    b',"logprobs":null,"finish_reason":null}]}\n\n',
)
_LAST = b'"","logprobs":null,"finish_reason":"length"}]}\n\n'


def wants_usage(body: dict[str, Any]) -> bool:
    return bool((body.get("stream_options") or {}).get("include_usage"))


class Completions:
    """Of one ingress: from a body to events."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.load(TOKENIZER)

    @staticmethod
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    def request(self, body: dict[str, Any]) -> EngineRequest:
        sampling = SamplingParams(temperature=0.0, max_tokens=body["max_tokens"], ignore_eos=True)
        return EngineRequest(uuid.uuid4().hex, tuple(body["prompt"]), sampling)

    async def events(
        self, request: EngineRequest, tokens: AsyncIterator[Tokens], usage: bool
    ) -> AsyncIterator[bytes]:
        before = _CHUNK[0] % (request.request_id.encode(), int(time.time()))
        detokenizer = self._tokenizer.detokenizer(after=request.prompt_ids)
        count = 0
        async for ids in tokens:
            count += len(ids)
            if text := detokenizer.feed(ids):
                yield before + orjson.dumps(text) + _CHUNK[1]
        yield before + _LAST
        if usage:
            prompt = len(request.prompt_ids)
            counts = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
            yield (
                b"data: " + orjson.dumps({"id": request.request_id, "choices": [], "usage": counts}) + b"\n\n"
            )
        yield b"data: [DONE]\n\n"


class Engine(PerRequestWorker):
    """The engine, started with its first request."""

    async def generate(self, packed: wire.Message) -> AsyncIterator[Tokens]:
        await self.start()
        async for tokens in super().generate(packed):
            yield tokens


one_app, two_app = FastAPI(), FastAPI()


@serve.ingress(one_app)
class OneStage(Engine):
    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._completions = Completions()

    @one_app.post("/v1/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        body = orjson.loads(await request.body())
        asked = self._completions.request(body)
        tokens = self.generate(wire.pack_request(asked))
        events = self._completions.events(asked, tokens, wants_usage(body))
        return StreamingResponse(events, media_type="text/event-stream")

    @one_app.get("/v1/models")
    def models(self) -> dict[str, Any]:
        return self._completions.models()


@serve.ingress(two_app)
class TwoStages:
    def __init__(self, engine: Any) -> None:
        self._engine = engine.options(stream=True)
        self._completions = Completions()

    @two_app.post("/v1/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        body = orjson.loads(await request.body())
        asked = self._completions.request(body)
        tokens = self._engine.generate.remote(wire.pack_request(asked))
        events = self._completions.events(asked, tokens, wants_usage(body))
        return StreamingResponse(events, media_type="text/event-stream")

    @two_app.get("/v1/models")
    def models(self) -> dict[str, Any]:
        return self._completions.models()


def application(stages: int, config: WorkerConfig) -> serve.Application:
    options: dict[str, Any] = {"max_ongoing_requests": MAX_ONGOING, "ray_actor_options": {"num_cpus": 0}}
    if stages == 1:
        return serve.deployment(OneStage, name="Ingress", **options).bind(config)
    engine = serve.deployment(Engine, name="Engine", **options).bind(config)
    return serve.deployment(TwoStages, name="Ingress", **options).bind(engine)


def wait_until_served(port: int) -> None:
    body = orjson.dumps({"prompt": [5, 6, 7], "max_tokens": 2})
    deadline, error = time.monotonic() + 300.0, ""
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data=body)
            with urllib.request.urlopen(request, timeout=5.0) as answer:
                if b"[DONE]" in answer.read():
                    return
        except urllib.error.HTTPError as found:
            error = f"{found} {found.read()[:2000]!r}"
        except OSError as found:
            error = str(found)
        time.sleep(0.2)
    raise RuntimeError(f"the plain ingress does not answer: {error}")


def config_of(arguments: argparse.Namespace) -> WorkerConfig:
    cache = CacheConfig(
        num_blocks=arguments.num_blocks,
        block_size=arguments.block_size,
        prefix_caching=arguments.prefix_caching,
    )
    limits = SchedulerConfig(max_num_seqs=arguments.max_num_seqs, max_step_tokens=arguments.max_step_tokens)
    model = ModelConfig(arguments.model, dtype=arguments.dtype, max_model_len=arguments.max_model_len)
    return WorkerConfig(model=model, cache=cache, scheduler=limits, num_threads=arguments.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, choices=(1, 2), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--num-blocks", type=int, default=16384)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    config = config_of(arguments)
    ended = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        logging_level="ERROR",
    )
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": arguments.port},
            logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
        )
        serve.run(application(arguments.stages, config), name="plain", route_prefix="/")
        wait_until_served(arguments.port)
        print(f"Ready: http://127.0.0.1:{arguments.port}", flush=True)
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    # By its own name: what is in `__main__` would be pickled to the replicas piece by piece.
    from ellm.loadtest import plain_ingress

    sys.exit(plain_ingress.main())
