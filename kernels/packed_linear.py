"""Linear layers with the weight laid out once for the device.

On a CPU the weight is packed for oneDNN; elsewhere, and where oneDNN cannot take it, it stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ellm.kernels.ops import Linear

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PlainLinear:
    """torch's own linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """oneDNN on a prepacked weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = bias
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        if x.shape[0] == 0:
            return x.new_empty((0, self.out_features))
        out: Tensor = self._run(x, self._weight, self._bias, "none", [], "")
        return out


def pack_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest linear for weight [out, in] on its device."""
    if weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and torch._C._has_mkldnn:
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)
