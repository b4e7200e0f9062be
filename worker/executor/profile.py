"""A cost model from a short profile at start: real steps on the executor's pool, before anybody is served.

Decode batches of several sizes and contexts, chunks at several places, and mixtures of both; each several
times, of which the median counts. Cheap steps come first, and one that would pass what is left of the time
is left out, so that a large model on a slow device starts soon: the fit goes on from there as it serves.

What was measured is kept in the user's cache folder, by a key of everything that a step's time depends on, so
that the next start reads it. A cache that cannot be read or written is no error.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from itertools import count, product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from ellm.kernels import dispatch
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, ModelLimits, NewSequence, PlanEntry, step_features
from ellm.worker.executor.base import Executor

log = logging.getLogger(__name__)

BUDGET_S = 1.5
REPEATS = 3
_PASSES = 4  # over the measured steps, in random order: the fit converges by small moves
_GREEDY = SamplingParams(temperature=0.0)
_DECODES = (0, 1, 4, 8, 16, 32, 64, 128, 256)
_CHUNKS = (0, 16, 64, 256, 1024)
_MIXED = (16, 256)  # chunks that are measured beside decode rows, too
_CONTEXTS = (0.02, 1.0)  # of the longest that the pool holds for so many sequences
_DISTRIBUTION = "ellm-on-ray"

Progress = Callable[[str, float], None]  # (what, share done)
Measured = list[tuple[StepFeatures, float]]  # seconds


def measure_steps(
    executor: Executor,
    scheduler: SchedulerConfig,
    progress: Progress,
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Run the grid; the median of each. The executor must have served nothing yet: the steps write to its
    pool's blocks, and leave no sequence behind."""
    begun, rough = clock(), CostModel()
    grid, steps = list(profile_grid(executor.limits, scheduler)), count()
    features = [step_features(_plan(0, entries)) for entries in grid]
    times: list[list[float]] = [[] for _ in grid]

    def run(index: int) -> float:
        return time_step(executor, steps, grid[index])

    run(0)  # what the first step of a device costs says nothing of the others
    recorded = {len(grid[0])}
    for turn in range(REPEATS):
        # First all that are affordable, cheap ones first; then again, in an order that says nothing.
        order = list(range(len(grid))) if turn == 0 else Random(turn).sample(range(len(grid)), len(grid))
        for done, index in enumerate(order):
            progress("measuring steps", (turn + done / len(grid)) / REPEATS)
            left = budget_s - (clock() - begun)
            if rough.predict(features[index]) > left or (turn and not times[index]):
                continue
            if left > 0.0:
                if _decodes(grid[index]) and len(grid[index]) not in recorded:
                    recorded.add(len(grid[index]))
                    run(index)  # nor does the first decode step of its size: a CPU records its kernels
                times[index].append(run(index))
                rough.update(features[index], times[index][-1])
    progress("measuring steps", 1.0)
    return [(f, median(taken)) for f, taken in zip(features, times, strict=True) if taken]


def _decodes(entries: list[PlanEntry]) -> bool:
    return all(entry.num_tokens == 1 for entry in entries)


def time_step(executor: Executor, steps: Iterator[int], entries: list[PlanEntry]) -> float:
    """Seconds of a step of these entries, whose sequences are new; none of them stays. `steps` numbers it,
    and what takes them away again."""
    elapsed_s = executor.execute(_plan(next(steps), entries)).elapsed_s
    executor.execute(_release(next(steps), entries))
    return elapsed_s


def fit(measured: Measured) -> CostModel:
    """A cost model that has seen these steps. It depends on them alone."""
    model, order = CostModel(), Random(0)
    for _ in range(_PASSES):
        for features, elapsed_s in order.sample(measured, len(measured)):
            model.update(features, elapsed_s)
    return CostModel.from_dict(model.to_dict())  # without the errors of the fit: none of them was in service


def profile_grid(limits: ModelLimits, scheduler: SchedulerConfig) -> Iterator[list[PlanEntry]]:
    """Entries of each step, those with few rows first. No block is named twice in a step, and no sequence
    is longer, and no step larger, than in service."""
    size, max_rows = limits.block_size, scheduler.max_step_tokens
    decodes = [n for n in _DECODES if n <= min(max_rows, scheduler.max_num_seqs)]
    chunks = [n for n in _CHUNKS if n <= min(max_rows, limits.max_model_len)]
    seen: set[tuple[int, int, int]] = set()
    # The time of a mixture follows from those of its parts: every other batch is enough.
    mixed = decodes[1::2]
    for num_decode, chunk, share in sorted(
        product(decodes, chunks, _CONTEXTS), key=lambda x: (x[0] + x[1], x)
    ):
        num_seqs = num_decode + bool(chunk)
        if num_decode and chunk and (chunk not in _MIXED or num_decode not in mixed):
            continue
        if not 0 < num_decode + chunk <= max_rows or num_seqs > scheduler.max_num_seqs:
            continue
        blocks = min(limits.num_blocks // num_seqs, -(-limits.max_model_len // size))
        room = min(blocks * size, limits.max_model_len)  # tokens of each
        context = max(1, min(int(share * room), room - 1))  # tokens before the step's own
        start = context if num_decode else max(0, int(share * (room - chunk)))
        if blocks < 1 or (chunk and room < chunk) or (num_decode, chunk, start) in seen:
            continue
        seen.add((num_decode, chunk, start))
        yield step_entries(num_decode, chunk, start, blocks, size)


def step_entries(num_decode: int, chunk: int, start: int, blocks: int, size: int) -> list[PlanEntry]:
    """`num_decode` rows after `start` tokens each, and a chunk: after `start` tokens alone, else at 0."""

    def table(index: int) -> list[int]:
        return list(range(index * blocks, (index + 1) * blocks))

    entries = [PlanEntry(-1 - i, start, 1, (0,), table(i), samples=True) for i in range(num_decode)]
    if chunk:
        at = 0 if num_decode else start
        tokens = (0,) * chunk
        entries.append(PlanEntry(-1 - num_decode, at, chunk, tokens, table(num_decode), samples=True))
    return entries


def _plan(step: int, entries: list[PlanEntry]) -> BatchPlan:
    new = tuple(NewSequence(entry.seq_id, entry.token_ids, (), _GREEDY, 0) for entry in entries)
    rows = sum(entry.num_tokens for entry in entries)
    return BatchPlan(step, tuple(entries), new, (), rows, sum(e.num_tokens == 1 for e in entries))


def _release(step: int, entries: list[PlanEntry]) -> BatchPlan:
    return BatchPlan(step, (), (), tuple(entry.seq_id for entry in entries), 0, 0)


def cache_key(
    folder: Path, limits: ModelLimits, scheduler: SchedulerConfig, about: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a step's time depends on. `about`: device, dtype, threads, body."""
    config = folder / "config.json"
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "model": hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else str(folder),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "code": _code_version(),
        "num_blocks": limits.num_blocks,
        "block_size": limits.block_size,
        "max_model_len": limits.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_step_tokens": scheduler.max_step_tokens,
        **about,
    }


def cache_folder() -> Path:
    """Where profiles lie: below the user's cache folder, as the XDG base directories say."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "ellm" / "profiles"


def read_profile(key: Mapping[str, Any], folder: Path) -> Measured | None:
    """What was measured under this key; None if nothing readable is there."""
    try:
        data = json.loads(_path(key, folder).read_text())
        if data["key"] != dict(key):
            return None
        return [(StepFeatures(**features), float(elapsed_s)) for features, elapsed_s in data["steps"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_profile(key: Mapping[str, Any], measured: Measured, folder: Path) -> None:
    """Atomically; a folder that cannot be written is only logged."""
    path = _path(key, folder)
    steps = [(asdict(features), elapsed_s) for features, elapsed_s in measured]
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"key": dict(key), "steps": steps}, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        log.warning("the profile of steps is not kept: %s", error)


def profiled_cost_model(
    executor: Executor,
    scheduler: SchedulerConfig,
    key: Mapping[str, Any],
    progress: Progress,
    folder: Path | None = None,
) -> CostModel:
    """From the cache, or from steps measured now and kept there."""
    folder = folder or cache_folder()
    measured = read_profile(key, folder)
    if not measured:
        measured = measure_steps(executor, scheduler, progress)
        wanted = len(list(profile_grid(executor.limits, scheduler)))
        if 2 * len(measured) >= wanted:  # a machine that is busy now need not be so at the next start
            write_profile(key, measured, folder)
    return fit(measured)


def _path(key: Mapping[str, Any], folder: Path) -> Path:
    text = json.dumps(dict(key), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@functools.cache
def _code_version() -> str:
    """The package's, and a digest of the kernels: between two releases, too, a step's time follows them."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(dispatch.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version} {digest.hexdigest()}"
