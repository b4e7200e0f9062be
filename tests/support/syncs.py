"""What makes a host wait for its GPU, seen without one: calls that read a tensor's values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Of Python's, which on a CPU reach no operation; and operations whose result's shape depends on values.
CALLS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
CALLS |= {"__contains__", "__reversed__", "is_nonzero", "equal", "allclose"}
OPERATIONS = {"_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal"}
OPERATIONS |= {"_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "allclose"}


class _Calls(TorchFunctionMode):
    """Also gives zeros for memory that is not written: kernels that do not run leave it so."""

    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in CALLS or (name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))):
            self._found.append(name)
        if func in (torch.empty, torch.empty_like):
            func = torch.zeros if func is torch.empty else torch.zeros_like
        elif name == "new_empty":
            func = torch.Tensor.new_zeros
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        counted = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name.startswith("index") and any(map(_is_mask, torch.utils._pytree.tree_leaves(args[1:2])))
        if name in OPERATIONS or counted or masked:
            self._found.append(name)
        return func(*args, **kwargs)


def _is_mask(index: object) -> bool:
    """Whose true places must be counted."""
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The names of what has read values of tensors within, as they are called. On tensors of a CPU, which
    stand for a GPU's: the code that is watched has none of its own."""
    found: list[str] = []
    with _Operations(found), _Calls(found):
        yield found
