"""What one replica is made of: a model on a group of GPUs, how long its steps take, and what fits.

    T = t0 + max(w / W, row FLOPs * rows / F) + KV bytes / W + attention FLOPs / F + all-reduces

with the weights w, the KV heads and the FLOPs shared out over the group; t0 is a constant of 3 ms. This is
the truth that the executor goes by. The engine has a cost model of its own, which has learnt from a profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

from ellm.loadtest.sim.presets import BYTES, GpuPreset, ModelPreset
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import ModelLimits

OVERHEAD_S = 3e-3  # of every step: launches, sampling, planning that nothing hides
ALL_REDUCE_S = 10e-6  # latency of each; two per layer
EOS = 0
VOCAB_SIZE = 1 << 40  # token ids cost nothing here, so that every prompt can have its own


@dataclass(frozen=True, slots=True)
class Device:
    """`tp` GPUs that serve one model together."""

    model: ModelPreset
    gpu: GpuPreset
    tp: int = 1
    kv_bytes: float | None = None  # for the KV pool, over the whole group; None: what the weights leave
    host_bytes: float = 0.0  # of the host tier
    block_size: int = 16  # tokens

    def check(self) -> None:
        """Raise ConfigError unless the model fits and a request could run."""
        if self.tp < 1 or self.model.num_kv_heads % self.tp:
            raise ConfigError(
                f"tp must divide the {self.model.num_kv_heads} KV heads of {self.model.name}, not {self.tp}"
            )
        if self.block_size < 1:
            raise ConfigError(f"the block size must be at least 1, not {self.block_size}")
        if self.host_bytes < 0:
            raise ConfigError("the host tier cannot be below 0")
        weights, usable = self.model.weight_bytes, self.tp * self.gpu.usable_bytes
        if weights >= usable:
            raise ConfigError(
                f"{self.model.name} has {weights / 1e9:.1f} GB of weights; {self.tp} x {self.gpu.name} "
                f"hold {usable / 1e9:.1f} GB: raise --tp"
            )
        if self.kv_bytes is not None and self.kv_bytes > usable - weights:
            raise ConfigError(
                f"--kv-bytes {self.kv_bytes:.4g} is more than the {usable - weights:.4g} beside the weights"
            )
        if self.num_blocks < 2:
            raise ConfigError(
                f"the KV pool of {self.pool_bytes:.4g} bytes holds {self.num_blocks} blocks of "
                f"{self.block_bytes} bytes: too few for any request"
            )

    @property
    def pool_bytes(self) -> float:
        if self.kv_bytes is not None:
            return self.kv_bytes
        return self.tp * self.gpu.usable_bytes - self.model.weight_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.model.kv_token_bytes

    @property
    def num_blocks(self) -> int:
        return int(self.pool_bytes // self.block_bytes)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def weights_s(self) -> float:
        """One read of all weights."""
        return self.model.weight_bytes / (self.tp * self.gpu.memory_bytes_per_s)

    @property
    def kv_token_s(self) -> float:
        """One read of one token's KV."""
        return self.model.kv_token_bytes / (self.tp * self.gpu.memory_bytes_per_s)

    @property
    def row_s(self) -> float:
        """The linear layers for one more row, once they are bound by arithmetic."""
        return self.model.row_flop / (self.tp * self.gpu.flop_per_s)

    @property
    def all_reduce_s(self) -> tuple[float, float]:
        """Seconds per step, and per row: a ring, two all-reduces of a layer's hidden states."""
        if self.tp == 1:
            return 0.0, 0.0
        per_row = 2 * (self.tp - 1) / self.tp * BYTES * self.model.hidden / self.gpu.peer_bytes_per_s
        count = 2 * self.model.num_layers
        return count * ALL_REDUCE_S, count * per_row

    @property
    def full_step_s(self) -> float:
        """A decode step while the memory is full: it reads all of it."""
        constant, _ = self.all_reduce_s
        return OVERHEAD_S + constant + self.weights_s + self.capacity_tokens * self.kv_token_s

    def cost(self) -> CostModel:
        """The truth. A new object each time: one that learns must not be the executor's."""
        constant, per_row = self.all_reduce_s
        return CostModel.known(
            overhead_s=OVERHEAD_S + constant + self.weights_s,
            every_row_s=per_row,
            row_s=self.row_s,
            knee_rows=round(self.weights_s / self.row_s),
            kv_token_s=self.kv_token_s,
            pair_s=self.model.pair_flop / (self.tp * self.gpu.flop_per_s),
        )

    def limits(self, num_transient: int = 0) -> ModelLimits:
        """Sequences may be as long as the pool: what lengths occur is the workload's to say. Transient blocks
        are shared by all layers, in two banks, and take their room from the pool."""
        banks = 2 * num_transient / self.model.num_layers  # in blocks
        num_blocks = int(self.pool_bytes / self.block_bytes - banks)
        if num_blocks < 2:
            raise ConfigError(f"{num_transient} transient blocks leave no room for the KV pool")
        return ModelLimits(
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_model_len=num_blocks * self.block_size,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            num_host_blocks=int(self.host_bytes // self.block_bytes),
            num_transient_blocks=num_transient,
            block_bytes=self.block_bytes,
        )


def profile(truth: CostModel, *, max_rows: int, max_kv_tokens: int) -> CostModel:
    """A cost model that has seen what a profile at start measures: decode batches, prompts and mixtures of
    both on a grid up to the largest step, each once, in random order. It knows nothing else of `truth`."""
    learnt = CostModel()
    grid = _grid(max_rows, max_kv_tokens)
    Random(0).shuffle(grid)
    for features in grid:
        learnt.update(features, truth.predict(features))
    return learnt


def _grid(max_rows: int, max_kv_tokens: int) -> list[StepFeatures]:
    decodes = [n for n in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max_rows]
    chunks = [0, *(n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= max_rows)]
    shares = (0.01, 0.1, 0.3, 0.6, 1.0)
    grid = []
    for num_decode, chunk, share in product(decodes, chunks, shares):
        rows = num_decode + chunk
        if not 0 < rows <= max_rows:
            continue
        context = int(share * max_kv_tokens) if num_decode else 0
        kv_tokens = max(rows, context)
        pairs = chunk * (chunk + 1) // 2
        grid.append(StepFeatures(rows, num_decode, kv_tokens, pairs, num_decode + bool(chunk)))
    return grid
