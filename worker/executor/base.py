"""The seam between the brain and what computes: above it all is the same on CPU, GPU and simulator."""

from __future__ import annotations

from typing import Protocol

from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult

__all__ = ["BatchPlan", "Executor", "GrammarCompiler", "ModelLimits", "StepResult"]


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


class GrammarCompiler(Protocol):
    """Makes a grammar ready before the step that needs it."""

    def compile(self, grammar: str) -> object:
        """From any thread; takes up to tens of milliseconds, once. Raises InvalidRequest, ConfigError."""
        ...
