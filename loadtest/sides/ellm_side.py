"""Our engine as it serves: EngineLoop over the local executor, without a router or Ray.

python -m ellm.loadtest.sides.ellm_side CHECKPOINT DTYPE THREADS ellm|ellm-fast|ellm-torch

ellm is STRICT, ellm-fast the same body without, ellm-torch the torch body, which has no STRICT.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from protocol import serve  # type: ignore[import-not-found]

from ellm.worker.api.config import CacheConfig, ModelConfig, WorkerConfig
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.build import load_engine
from ellm.worker.loop import EngineLoop


class Batch:
    """Collects the tokens of one call's requests."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[int]] = {}
        self._left = 0
        self._done = threading.Event()

    def begin(self, request_ids: list[str]) -> None:
        self._tokens = {request_id: [] for request_id in request_ids}
        self._left = len(request_ids)
        self._done.clear()

    def publish(self, outputs: list[SequenceOutput]) -> None:
        """On the engine's thread."""
        for output in outputs:
            assert output.error is None, output.error
            self._tokens[output.request_id].extend(output.token_ids)
            self._left -= output.finish_reason is not None
        if not self._left:
            self._done.set()

    def wait(self) -> list[list[int]]:
        self._done.wait()
        return list(self._tokens.values())


def main() -> None:
    folder, dtype, threads, mode = sys.argv[1:5]
    model = ModelConfig(
        path=folder,
        dtype="float32" if dtype == "float32" else "bfloat16",
        device="cpu",
        max_model_len=1024,
        jit=mode != "ellm-torch",
        deterministic=mode == "ellm",
    )
    cache = CacheConfig(prefix_caching=False, num_blocks=1024)
    config = WorkerConfig(model=model, cache=cache, num_threads=int(threads))
    engine = load_engine(config, lambda what, share: print(f"{what} {share:.0%}", file=sys.stderr))
    batch = Batch()
    loop = EngineLoop(engine.core, engine.executor)
    loop.start(batch.publish)
    calls = 0

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        nonlocal calls
        calls += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        requests = [
            EngineRequest(f"{calls}-{index}", tuple(ids), sampling) for index, ids in enumerate(prompts)
        ]
        batch.begin([request.request_id for request in requests])
        loop.submit("bench", calls, requests)
        return batch.wait()

    serve(generate)
    loop.stop(10.0)


if __name__ == "__main__":
    main()
