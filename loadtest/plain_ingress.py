"""A streaming completion server as one writes it with Ray Serve alone: the baseline of `thousand_streams`.

    python -m ellm.loadtest.plain_ingress --stages 2 --port 8165 --model simulated:overhead_s=0.005

`--stages 1`: a FastAPI ingress whose replicas hold the engine. `--stages 2`: the ingress calls the engine's
deployment through a streaming handle, one call per request, so that there can be more of either. The engine
is the product's (EngineLoop on the simulated executor), and so are detokenising and the bytes of a chunk:
only Serve stands where the product's own path is. Who starts it says by Ray's variables whether HAProxy is
used.
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
_CHUNK = (
    b'data: {"id":"%s","object":"text_completion","created":%d,"model":"plain","choices":[{"index":0,"text":',
    b',"logprobs":null,"finish_reason":null}]}\n\n',
)
_LAST = b'"","logprobs":null,"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


class Completions:
    """Of one ingress: from a body to events."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.load(TOKENIZER)

    def request(self, body: dict[str, Any]) -> EngineRequest:
        sampling = SamplingParams(temperature=0.0, max_tokens=body["max_tokens"], ignore_eos=True)
        return EngineRequest(uuid.uuid4().hex, tuple(body["prompt"]), sampling)

    async def events(self, request: EngineRequest, tokens: AsyncIterator[Tokens]) -> AsyncIterator[bytes]:
        before = _CHUNK[0] % (request.request_id.encode(), int(time.time()))
        detokenizer = self._tokenizer.detokenizer(after=request.prompt_ids)
        async for ids in tokens:
            if text := detokenizer.feed(ids):
                yield before + orjson.dumps(text) + _CHUNK[1]
        yield before + _LAST


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
        asked = self._completions.request(orjson.loads(await request.body()))
        events = self._completions.events(asked, self.generate(wire.pack_request(asked)))
        return StreamingResponse(events, media_type="text/event-stream")


@serve.ingress(two_app)
class TwoStages:
    def __init__(self, engine: Any) -> None:
        self._engine = engine.options(stream=True)
        self._completions = Completions()

    @two_app.post("/v1/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        asked = self._completions.request(orjson.loads(await request.body()))
        tokens = self._engine.generate.remote(wire.pack_request(asked))
        return StreamingResponse(self._completions.events(asked, tokens), media_type="text/event-stream")


def application(stages: int, config: WorkerConfig) -> serve.Application:
    options: dict[str, Any] = {"max_ongoing_requests": MAX_ONGOING, "ray_actor_options": {"num_cpus": 0}}
    if stages == 1:
        return serve.deployment(OneStage, name="Ingress", **options).bind(config)
    engine = serve.deployment(Engine, name="Engine", **options).bind(config)
    return serve.deployment(TwoStages, name="Ingress", **options).bind(engine)


def wait_until_served(port: int) -> None:
    body = orjson.dumps({"prompt": [5, 6, 7], "max_tokens": 2})
    deadline, error = time.monotonic() + 300.0, ""  # a busy machine; nothing is measured yet
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data=body)
            with urllib.request.urlopen(request, timeout=60.0) as answer:
                if b"[DONE]" in answer.read():
                    return
        except urllib.error.HTTPError as found:
            error = f"{found} {found.read()[:2000]!r}"
        except OSError as found:
            error = str(found)
        time.sleep(0.2)
    raise RuntimeError(f"the plain ingress does not answer: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, choices=(1, 2), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--num-blocks", type=int, default=16384)
    arguments = parser.parse_args()
    config = WorkerConfig(
        model=ModelConfig(path=arguments.model),
        scheduler=SchedulerConfig(max_num_seqs=arguments.max_num_seqs),
        cache=CacheConfig(num_blocks=arguments.num_blocks),
    )
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
