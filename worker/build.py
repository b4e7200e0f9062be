"""From a WorkerConfig to an engine: which executor runs the model, and the brain within its limits.

With several ranks this is rank 0's part: either the others are started elsewhere (`spec` says where the
group meets; see parallel/group.py) or here, as child processes. A path that begins with `simulated:` takes
the simulated executor: real scheduling, made-up tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ellm.worker.api.config import SIMULATED, WorkerConfig, served_name
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.core import EngineCore
from ellm.worker.executor.base import Executor, GrammarCompiler, ModelLimits
from ellm.worker.executor.simulated import SimulatedExecutor
from ellm.worker.load_thread import Progress, on_own_thread
from ellm.worker.primitive_cache import bound_primitive_caches

if TYPE_CHECKING:
    from ellm.worker.executor.local import LocalExecutor
    from ellm.worker.executor.tensor_parallel import TensorParallelExecutor
    from ellm.worker.parallel.group import RankSpec, Rendezvous


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An executor and its brain, and what they are."""

    core: EngineCore
    executor: Executor
    served_name: str
    device: str
    dtype: str
    deterministic: bool
    grammars: GrammarCompiler | None = None  # None: requests with a grammar are refused


def load_engine(
    config: WorkerConfig,
    progress: Progress,
    *,
    spec: RankSpec | None = None,
    rendezvous: Rendezvous | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> LoadedEngine:
    """Load the model, on a thread that ends with it; may take minutes. `on_failure`: called once when the
    group of ranks has ended by an error, also while nothing is executed.

    Raises ConfigError naming what cannot work, and GroupFailed where another rank died.
    """
    if config.model.path.startswith(SIMULATED):
        return _simulated(config, progress)
    return on_own_thread(
        lambda tell: _load(config, tell, spec, rendezvous, on_failure),
        progress,
        lambda engine: engine.executor.close(),
    )


def _load(
    config: WorkerConfig,
    progress: Progress,
    spec: RankSpec | None,
    rendezvous: Rendezvous | None,
    on_failure: Callable[[Exception], None] | None,
) -> LoadedEngine:
    # Torch is imported here, where it is needed: the import alone takes seconds.
    bound_primitive_caches()
    progress("importing torch", 0.0)
    executor = _load_executor(config, progress, spec, rendezvous, on_failure)
    cost_model = executor.profile(config, progress) if config.profile else None
    return LoadedEngine(
        EngineCore(executor.limits, config, cost_model=cost_model),
        executor,
        served_name(config.model),
        executor.device,
        executor.dtype,
        executor.deterministic,
        executor.grammars,
    )


def _load_executor(
    config: WorkerConfig,
    progress: Progress,
    spec: RankSpec | None,
    rendezvous: Rendezvous | None,
    on_failure: Callable[[Exception], None] | None,
) -> LocalExecutor | TensorParallelExecutor:
    from ellm.worker.executor.local import LocalExecutor

    if config.tensor_parallel_size == 1:
        return LocalExecutor.load(config, progress)
    from ellm.worker.executor.tensor_parallel import TensorParallelExecutor, check_group
    from ellm.worker.parallel.group import Group
    from ellm.worker.parallel.local_group import LocalGroup

    if spec is None:
        return LocalGroup(config, progress).executor
    check_group(config)
    progress("waiting for the other ranks", 0.0)
    return TensorParallelExecutor.load(config, Group.join(spec, rendezvous), progress, on_failure)


def _simulated(config: WorkerConfig, progress: Progress) -> LoadedEngine:
    """`simulated:overhead_s=0.005,row_s=1e-5`: the coefficients of CostModel.known, `vocab_size`, and
    `load_s`, the time that loading takes."""
    values = _coefficients(config.model.path.removeprefix(SIMULATED))
    load_s = values.pop("load_s", 0.0)
    for i in range(10):
        progress("simulating weights", i / 10)
        time.sleep(load_s / 10)
    limits = ModelLimits(
        num_blocks=config.cache.num_blocks or 4096,
        block_size=config.cache.block_size,
        max_model_len=config.model.max_model_len or 4096,
        vocab_size=int(values.pop("vocab_size", 32_000)),
        eos_token_ids=(0,),
    )
    values.setdefault("overhead_s", 0.005)
    knee_rows = int(values.pop("knee_rows", 0))
    executor = SimulatedExecutor(
        limits, CostModel.known(knee_rows=knee_rows, **values), verify=False, realtime=True
    )
    name = served_name(config.model)
    return LoadedEngine(EngineCore(limits, config), executor, name, "simulated", "none", True)


def _coefficients(text: str) -> dict[str, float]:
    """`key=number` pairs. Raises ConfigError."""
    costs = ("overhead_s", "row_s", "knee_rows", "kv_token_s", "pair_s", "logits_row_s")
    known = (*costs, "vocab_size", "load_s")
    values: dict[str, float] = {}
    for pair in filter(None, text.split(",")):
        key, _, number = pair.partition("=")
        try:
            values[key] = float(number)
        except ValueError:
            raise ConfigError(f"{SIMULATED}{text}: {pair} is not key=number", param="model.path") from None
        if key not in known:
            raise ConfigError(f"{SIMULATED} knows {', '.join(known)}, not {key}", param="model.path")
    return values
