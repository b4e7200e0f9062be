"""What runs, seen: launches and calls of attention counted, and graphs replayed where there is no GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ellm.kernels import dispatch
from ellm.kernels.ops import Ops
from ellm.worker.executor.local import LocalExecutor
from ellm.worker.model.graphs import NotRecorded, Replay

Launches = Counter[str]


class CallAgain:
    """In the place of graphs where there is no GPU: each replay computes anew."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        out = call().clone()

        def replay() -> None:
            out.copy_(call())

        return replay, out

    def warm(self, call: Callable[[], object]) -> None:
        call()

    def agree(self, problem: str | None) -> None:
        if problem is not None:
            raise NotRecorded(problem)

    def capture(self, call: Callable[[], object]) -> Replay:
        call()

        def replay() -> None:
            call()

        return replay


class _Noted:
    """A kernel that counts its launches."""

    def __init__(self, name: str, kernel: Any, launches: Launches) -> None:
        self._name, self._kernel, self._launches = name, kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self._launches[self._name] += 1
        return self._kernel[grid]


@contextmanager
def counted() -> Iterator[Launches]:
    """Launches of attention by name, wherever they are made; none where Triton is not there."""
    launches: Launches = Counter()
    if dispatch.triton_problem("cuda"):
        yield launches
        return
    from ellm.kernels import triton_tiles

    names = ("attend_kernel", "attend_both_kernel")
    kernels = {name: getattr(triton_tiles, name) for name in names}
    for name, kernel in kernels.items():
        setattr(triton_tiles, name, _Noted(name, kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(triton_tiles, name, kernel)


def count_calls(executor: LocalExecutor, launches: Launches) -> None:
    """The runner's own calls of attention, whatever its body makes of them."""
    ops = executor.runner.ops
    attend = ops.paged_attention

    def noted(*args: Any) -> Tensor:
        launches["calls"] += 1
        return attend(*args)

    ops.paged_attention = noted  # type: ignore[method-assign, assignment]


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Whatever makes the host wait for a GPU within raises RuntimeError, as far as torch sees it."""
    if not device.startswith("cuda"):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def interpreted() -> bool:
    """Whether Triton's kernels run here without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreted_body(device: str, *, fused: bool) -> Ops | None:
    """STRICT on interpreted kernels, where they are; None: what an executor chooses by itself."""
    if device == "cuda" or not interpreted():
        return None
    return dispatch.triton_body(device, deterministic=True, fused=fused)


def placeless() -> AbstractContextManager[None]:
    """Interpreted matrix products give a row the same bits wherever it stands, as a GPU's shall."""
    if not interpreted():
        return nullcontext()
    from ellm.kernels.triton_check import placeless_products

    return placeless_products()


@contextmanager
def taken(body: Ops | None) -> Iterator[None]:
    """Executors that are loaded within compute with `body`; None: as they choose."""
    chosen = dispatch.select
    if body is not None:
        dispatch.select = lambda *_, **__: body
    try:
        yield
    finally:
        dispatch.select = chosen
