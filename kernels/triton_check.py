"""Every Triton kernel against its torch twin, case by case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ellm.kernels import (
    triton_copy,
    triton_heads,
    triton_linear,
    triton_rows,
    triton_tiles,
    triton_tokens,
)
from ellm.kernels.reference import TorchOps
from ellm.kernels.triton_cases import POISON, REAL, TINY, AttentionArgs, Case
from ellm.kernels.triton_floats import INTERPRETED
from ellm.kernels.triton_step_cases import cases
from ellm.kernels.triton_tiles import TileChoice

# Of the largest value: the type's rounding, once for a result and once for a weight of the softmax.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class _Functions:
    """The launches by name, as the modules have them when they are asked for."""

    _modules = (triton_rows, triton_heads, triton_tokens, triton_copy)

    def __getattr__(self, name: str) -> Any:
        return next(getattr(module, name) for module in self._modules if hasattr(module, name))


class Kernels:
    """The kernels themselves: nothing falls back here."""

    poison = POISON
    ops: Any = _Functions()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return triton_linear.linear(x, weight, bias)

    def attend(self, choice: TileChoice, args: AttentionArgs) -> Tensor:
        return triton_tiles.paged_attention(*args, choice)


class Twins:
    """The torch reference."""

    poison = 0.0
    ops: Any = TorchOps()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def attend(self, choice: TileChoice, args: AttentionArgs) -> Tensor:
        result: Tensor = self.ops.paged_attention(*args)
        return result


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case. `error` is a share of the largest value; infinite where NaN or shapes differ."""

    kernel: str
    detail: str
    error: float
    tolerance: float
    seconds: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.error <= self.tolerance

    @property
    def result(self) -> str:
        return f"error {self.error:.1e} of {self.tolerance:.1e}"


def check(device: torch.device, *, quick: bool, kernel: str | None = None) -> Iterator[Verdict]:
    """The verdicts, one by one. Under the interpreter shapes are tiny."""
    for case in cases(TINY if INTERPRETED.value else REAL, quick=quick):
        if kernel in (None, case.kernel):
            yield judge(case, device)


def judge(case: Case, device: torch.device) -> Verdict:
    """Run one case on both bodies and compare all that was written."""
    begin = perf_counter()
    tolerance = 0.0 if case.again or case.exact else TOLERANCE[case.dtype]
    try:
        with _poisoned_memory(), placeless_products() if case.again else nullcontext():
            got = case.run(Kernels(), device)
            expected = case.again(Kernels(), device) if case.again else None
    except Exception as error:  # whatever a kernel raises is this line's failure
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = f"{type(error).__name__}: {reason}"
        return Verdict(case.kernel, case.detail, float("inf"), tolerance, perf_counter() - begin, failure)
    expected = case.run(Twins(), device) if expected is None else expected
    difference = max(map(_difference, got, expected))
    return Verdict(case.kernel, case.detail, difference, tolerance, perf_counter() - begin)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def placeless_products() -> Iterator[None]:
    """Matrix products whose rows have the same bits in every place, as a GPU's have: the interpreter's are
    numpy's, whose rounding depends on where in the tile a row stands."""
    if not INTERPRETED.value:
        yield
        return
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        products = a.data[:, None, :] * np.ascontiguousarray(b.data.T)[None]
        return interpreter.TensorHandle(products.sum(-1, dtype=np.float32) + d.data, d.dtype.scalar)

    before = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = before


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    a, b = got.double(), expected.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))
