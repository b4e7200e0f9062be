"""What a row of kernel launches is made of while it runs for the first time, so that it can run again.

Kernels see addresses alone. To launch them again on the same addresses, results must lie where nobody else
puts anything, and nothing but kernels may have touched data in between. So while a Recording is on, memory
comes from an Arena of its own, and what torch itself computes is found out: such a run cannot be played.
What torch is not asked for, as numpy's arithmetic on a tensor's memory, would not be seen.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALIGNMENT = 64  # bytes
_LEAST_BYTES = 4096
_EMPTY = torch.ops.aten.empty.memory_format
_FROM_PYTHON = torch.ops.aten.lift_fresh.default  # torch.tensor's, with memory from elsewhere


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


def current() -> Recording | None:
    """The recording that is on in this thread."""
    return _current.recording


class Arena:
    """Memory for results, used again as soon as the tensor that had it is gone: by then all launches that
    read it have been recorded, and whoever has it next comes after them whenever they are played."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.num_bytes = 0  # ever made

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, aligned."""
        size = 1 << (max(num_bytes, _LEAST_BYTES) - 1).bit_length()
        free = self._free[size]
        memory = free.pop() if free else self._make(size)
        own = memory[:num_bytes]  # an object that lives as long as the tensor's storage
        weakref.finalize(own, free.append, memory).atexit = False
        return torch.from_numpy(own)

    def _make(self, size: int) -> np.ndarray:
        self.num_bytes += size
        memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + size]


def _shares(out: Any, args: Any) -> bool:
    """Whether all results lie in the memory of an argument: `reshape` and `to` may be views and may copy."""
    theirs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
    results = out if isinstance(out, (tuple, list)) else (out,)
    return all(isinstance(r, Tensor) and r.untyped_storage().data_ptr() in theirs for r in results)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the launches of this thread while it is entered."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arena = arena
        self.launches: list[tuple[int, int, tuple[int, ...]]] = []  # function, units, words
        self.checks: dict[Hashable, Callable[[], None]] = {}
        self.kept: list[object] = []
        self.problem: str | None = None  # why it cannot be played
        self._scratch: dict[int, Tensor] = {}
        self._aside = False

    def __enter__(self) -> Recording:
        assert _current.recording is None
        super().__enter__()  # type: ignore[no-untyped-call]
        _current.recording = self
        return self

    def __exit__(self, *exc: Any) -> None:
        _current.recording = None
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def launch(self, function: int, units: int, words: tuple[int, ...]) -> None:
        """A kernel ran: its address, its units of work and its arguments after the header."""
        self.launches.append((function, units, words))

    def keep(self, what: object) -> None:
        """It holds memory whose address is among the arguments."""
        self.kept.append(what)

    def before(self, key: Hashable, check: Callable[[], None]) -> None:
        """Make a check of data that may differ next time: now, and before each play. Once for each `key`."""
        if key not in self.checks:
            self.checks[key] = check
            with self._unseen():
                check()

    def scratch(self, num_bytes: int) -> int:
        """The address of so many aligned bytes that hold nothing from one launch to the next. When the
        recording is gone another's tape may have them."""
        memory = self._scratch.get(num_bytes)
        if memory is None:
            with self._unseen():
                memory = self._scratch[num_bytes] = self.arena.take(num_bytes)
        return memory.data_ptr()

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _EMPTY and not self._aside:
            made = self._empty(*args, **kwargs)
            if made is not None:
                return made
        out = func(*args, **kwargs)
        is_view = func.is_view and func is not _FROM_PYTHON and _shares(out, args)
        if func is not _EMPTY and not self._aside and not is_view:
            self.problem = self.problem or f"{func} runs between the kernels"
        return out

    def _empty(
        self, size: Any, dtype: torch.dtype | None = None, device: Any = None, **others: Any
    ) -> Tensor | None:
        """In the arena; None where it is no plain tensor of a CPU's."""
        if torch.device(device or "cpu").type != "cpu" or any(others.values()):
            self.problem = self.problem or "a tensor is made that is none of a CPU's"
            return None
        dtype = dtype or torch.get_default_dtype()
        return self.arena.take(prod(size) * dtype.itemsize).view(dtype).view(size)
