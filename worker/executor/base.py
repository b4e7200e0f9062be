"""The seam between the brain and what computes: above it all is the same on CPU, GPU and simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult

__all__ = [
    "BatchPlan",
    "BeginningExecutor",
    "BegunStep",
    "EndedStep",
    "Executor",
    "GrammarCompiler",
    "ModelLimits",
    "StepResult",
]


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


class BegunStep(Protocol):
    """A plan that a device has been asked for."""

    @property
    def ended(self) -> bool:
        """Whether `result` returns at once."""
        ...

    @property
    def feeds_back(self) -> bool:
        """Whether the next plan may begin only when this one's result has been read."""
        ...

    def wait(self) -> None:
        """Until `result` returns at once; from any thread, without keeping a core busy."""
        ...

    def result(self) -> StepResult:
        """Wait for its tokens. Once; in the order in which steps were begun."""
        ...


@dataclass(frozen=True, slots=True)
class EndedStep:
    """A plan that was computed at once: a BegunStep."""

    told: StepResult
    ended = True
    feeds_back = True

    def wait(self) -> None: ...

    def result(self) -> StepResult:
        return self.told


@runtime_checkable
class BeginningExecutor(Executor, Protocol):
    """One whose device has the next step queued while one runs."""

    def begin(self, plan: BatchPlan) -> BegunStep:
        """Ask for a step. At most one other may have been begun and not read."""
        ...


class GrammarCompiler(Protocol):
    """Makes a grammar ready before the step that needs it."""

    def compile(self, grammar: str) -> object:
        """From any thread; takes up to tens of milliseconds, once. Raises InvalidRequest, ConfigError."""
        ...
