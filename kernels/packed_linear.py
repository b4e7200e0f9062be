"""Linear layers with the weight laid out once for the device, and, where asked for, STRICT.

STRICT: a row's result has the same bits in a batch of any size. A matrix library picks its loops by the
number of rows, so the choice is tried out at load, once per shape, on sums that cancel to rounding. oneDNN on
a packed weight differs for a single row only (a matrix-vector loop, for long rows), and then two rows are
computed. Where more differs, rows are computed in tiles of one fixed size.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ellm.kernels.ops import Linear

log = logging.getLogger(__name__)

TRIED_ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 31, 32, 33, 48, 64, 65, 100, 128, 256, 512)
MOST_ROWS = 1024
TILE = 32  # rows


def is_packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes such a weight on this processor: bfloat16 needs AVX-512 or AVX-NE-CONVERT."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


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
    """oneDNN on a packed weight. A half-precision weight that it cannot take is widened to float32: twice the
    memory, and on a processor without bfloat16 some 7 times as fast as torch's own loops."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._dtype = weight.dtype
        self._wide = not is_packable(weight.dtype)
        if self._wide:
            weight, bias = weight.float(), None if bias is None else bias.float()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = bias
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        if x.shape[0] == 0:
            return x.new_empty((0, self.out_features))
        if self._wide:
            x = x.float()
        out: Tensor = self._run(x, self._weight, self._bias, "none", [], "")
        return out.to(self._dtype) if self._wide else out


_Linear = PlainLinear | PackedLinear


class StrictLinear:
    """Rows with the same bits at any batch size, on top of a linear that does not promise it."""

    def __init__(self, linear: Linear, least_rows: int, tile: int | None) -> None:
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self._linear = linear
        self._least_rows = least_rows
        self._tile = tile

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        rows = x.shape[0]
        if self._tile is not None:
            parts = [self._at_least(part, self._tile) for part in torch.split(x, self._tile)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        if 0 < rows < self._least_rows:
            return self._at_least(x, self._least_rows)
        return self._linear(x)

    def _at_least(self, x: Tensor, count: int) -> Tensor:
        rows = x.shape[0]
        if rows in (0, count):
            return self._linear(x)
        if rows == 1:
            return self._linear(x.expand(count, -1))[:1]
        return self._linear(x.repeat(-(-count // rows), 1)[:count])[:rows]


_safe_rows: dict[tuple[Any, ...], tuple[int, int | None]] = {}


def _make_strict(linear: _Linear, weight: Tensor, bias: Tensor | None) -> Linear:
    """Wrap `linear` as far as its shape needs it."""
    key = (type(linear), weight.shape, weight.dtype, bias is None, torch.get_num_threads())
    if key not in _safe_rows:
        _safe_rows[key] = _try_rows(linear, weight, bias)
    least_rows, tile = _safe_rows[key]
    if least_rows == 1 and tile is None:
        return linear
    return StrictLinear(linear, least_rows, tile)


def _cancelling(num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
    """(x, weight) whose products cancel: what is left is rounding, so any other order of sums shows."""
    generator = torch.Generator().manual_seed(0)
    half = num_in // 2
    x = 64 * torch.randn(MOST_ROWS, half, generator=generator)
    weight = torch.randn(num_out, half, generator=generator)
    order = torch.randperm(2 * half, generator=generator)
    x, weight = torch.cat([x, -x], dim=1)[:, order], torch.cat([weight, weight], dim=1)[:, order]
    return F.pad(x, (0, num_in % 2)), F.pad(weight, (0, num_in % 2))


def _try_rows(
    linear: PackedLinear | PlainLinear, weight: Tensor, bias: Tensor | None
) -> tuple[int, int | None]:
    """The smallest number of rows from which on all agree, or (1, TILE) where that is not below 16."""
    x, trial_weight = (t.to(weight.dtype) for t in _cancelling(*weight.shape))
    trial = type(linear)(trial_weight, None if bias is None else torch.zeros_like(bias))
    expected = trial(x)
    differing = [rows for rows in TRIED_ROWS if not torch.equal(trial(x[-rows:]), expected[-rows:])]
    if not differing:
        return 1, None
    if differing[-1] < 16:
        return min(rows for rows in TRIED_ROWS if rows > differing[-1]), None
    log.info("linear %s %s: rows in tiles of %d, for STRICT", tuple(weight.shape), weight.dtype, TILE)
    return 1, TILE


def pack_linear(weight: Tensor, bias: Tensor | None, *, strict: bool = False) -> Linear:
    """The fastest linear for weight [out, in] on its device; `strict` as the module says."""
    linear: _Linear
    on_cpu = weight.device.type == "cpu" and torch._C._has_mkldnn
    if on_cpu and (strict or weight.dtype in (torch.float32, torch.bfloat16)):
        linear = PackedLinear(weight, bias)
    else:
        linear = PlainLinear(weight, bias)
    return _make_strict(linear, weight, bias) if strict else linear
