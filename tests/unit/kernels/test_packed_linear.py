"""Packed linears: values, a row's bits at any batch size, and what STRICT does where a library differs."""

from __future__ import annotations

import pytest
import torch
from support.paged_batch import same_bits
from torch import Tensor

from ellm.kernels import packed_linear
from ellm.kernels.packed_linear import PlainLinear, StrictLinear, pack_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(512, 768), (1536, 512), (40, 48), (33, 77), (64, 1), (1, 64), (129, 513), (4096, 64), (17, 1536)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_rows_keep_their_bits_at_any_batch_size(num_in: int, num_out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_in)
    x, weight = packed_linear._cancelling(num_out, num_in)
    x, weight = x[:300].to(dtype), weight.to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype) if num_in % 2 else None
    linear = pack_linear(weight, bias, strict=True)
    assert (linear.in_features, linear.out_features) == (num_in, num_out)
    whole = linear(x)
    for count in (1, 2, 3, 7, 8, 16, 31, 64, 100, 255, 299):
        pick = torch.randperm(300, generator=generator)[:count]
        assert same_bits(linear(x[pick]), whole[pick])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_equals_its_definition(num_in: int, num_out: int, dtype: torch.dtype, strict: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    x = torch.randn(20, num_in + 3, generator=generator).to(dtype)[:, :num_in]  # rows with gaps
    for b in (bias, None):
        out = pack_linear(weight, b, strict=strict)(x)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert out.dtype == dtype
        limit = torch.finfo(dtype).eps * expected.abs() + 128 * torch.finfo(torch.float32).eps * num_in**0.5
        assert ((out.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("strict", [False, True])
def test_a_processor_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr(packed_linear, "is_packable", lambda dtype: dtype == torch.float32)
    packed_linear._safe_rows.clear()
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(48, 96).bfloat16()
    try:
        out = pack_linear(weight, weight[:, 0].contiguous(), strict=strict)(x)
        assert packed_linear.PackedLinear(weight, None)._weight.dtype == torch.float32
    finally:
        packed_linear._safe_rows.clear()
    expected = torch.nn.functional.linear(x.float(), weight.float(), weight[:, 0].float())
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_no_rows(strict: bool) -> None:
    linear = pack_linear(torch.randn(6, 2048), None, strict=strict)
    assert linear(torch.empty(0, 2048)).shape == (0, 6)


class MoodyLinear(PlainLinear):
    """A library whose sums depend on the number of rows: with few rows they are off by a rounding."""

    few = 5

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.batches: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        out = super().__call__(x)
        return out * (1 + 2**-20) if len(x) < self.few else out


class UnevenLinear(MoodyLinear):
    few = 100


@pytest.mark.parametrize("kind", [MoodyLinear, UnevenLinear])
def test_a_library_that_differs_is_found_and_worked_around(kind: type[MoodyLinear]) -> None:
    weight = torch.randn(32, 64)
    moody = kind(weight, None)
    linear = packed_linear._make_strict(moody, weight, None)
    assert isinstance(linear, StrictLinear)
    assert not moody.batches  # it was tried out on another weight
    for rows in (1, 3, 5, 33, 64, 70):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(linear(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    if kind is MoodyLinear:
        assert moody.batches == [5, 5, 5, 33, 64, 70]
    else:
        assert set(moody.batches) == {packed_linear.TILE}
