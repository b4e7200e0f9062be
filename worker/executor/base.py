"""The seam between the brain and what computes: above it all is the same on CPU, GPU and simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ellm.worker.engine.plan import BatchPlan, StepResult


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What an executor decided at start; the brain plans within it."""

    num_blocks: int
    block_size: int  # tokens
    max_model_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    memory: tuple[tuple[str, int], ...] = ()  # (what, bytes): how the pool was sized, for printing


class Executor(Protocol):
    """Carries out plans one at a time, in the order of their numbers."""

    @property
    def limits(self) -> ModelLimits: ...

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step; blocks until its tokens are known. Any exception ends the worker group."""
        ...

    def close(self) -> None:
        """Free what `execute` needs. No call may follow."""
        ...
