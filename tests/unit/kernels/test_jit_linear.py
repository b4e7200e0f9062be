"""The CPU's own linear layers: values, a row's bits in any batch, and nothing read that is not theirs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paged_batch import same_bits
from torch import Tensor

from ellm.kernels import packed_linear
from ellm.kernels.dispatch import select

pytestmark = pytest.mark.needs_module("numba")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHOLE: dict[tuple[int, int, torch.dtype], Tensor] = {}
SHAPES = [(512, 768), (1536, 512), (40, 48), (33, 77), (64, 1), (1, 64), (129, 513), (4096, 64), (17, 1536)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_rows_keep_their_bits_at_any_batch_size(
    num_in: int, num_out: int, dtype: torch.dtype, threads: int
) -> None:
    from ellm.kernels.numba_linear import JitLinear

    generator = torch.Generator().manual_seed(num_in)
    x, weight = packed_linear._cancelling(num_out, num_in)  # what is left of these sums is rounding alone
    x, weight = (x[:500].to(dtype), weight.to(dtype)) if num_in > 1 else (x[:500] + 1, weight + 1 / 3)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype) if num_in % 2 else None
    linear = JitLinear(weight, bias)
    assert (linear.in_features, linear.out_features) == (num_in, num_out)
    whole = linear(x)
    assert whole.any()
    known = WHOLE.setdefault((num_in, num_out, dtype), whole)  # by the first number of threads
    assert same_bits(whole, known)
    alone = torch.cat([linear(x[i : i + 1]) for i in range(12)])
    assert same_bits(alone, whole[:12])
    for count in (2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 31, 64, 100, 385, 499):
        pick = torch.randperm(500, generator=generator)[:count]
        assert same_bits(linear(x[pick]), whole[pick])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_equals_its_definition(num_in: int, num_out: int, dtype: torch.dtype) -> None:
    from ellm.kernels.numba_linear import JitLinear

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    wide = torch.full((20, num_in + 3), float("nan"), dtype=dtype)
    x = wide[:, :num_in]  # rows with gaps, of which nothing may be read
    x.copy_(torch.randn(20, num_in, generator=generator))
    columns = x.t().contiguous().t()  # neighbours in a row lie apart
    for b in (bias, None):
        linear = JitLinear(weight, b)
        out = linear(x)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert out.dtype == dtype
        limit = torch.finfo(dtype).eps * expected.abs() + 128 * torch.finfo(torch.float32).eps * num_in**0.5
        assert ((out.double() - expected).abs() <= limit).all()
        assert same_bits(linear(columns), out)
        assert linear(x[:0]).shape == (0, num_out)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("width", [1, 16, 77])
def test_half_precision_is_widened_as_torch_does(dtype: torch.dtype, width: int, threads: int) -> None:
    from ellm.kernels.numba_linear import _widened

    x = torch.randn(900, width + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3, 0], x[4, 0] = float("nan"), float("-inf")
    for part in (x, x[:, :width], x[:1, :width], x[:0], x.t()):
        assert same_bits(_widened(part), part.float())


def test_a_row_that_is_not_a_number_spoils_no_other() -> None:
    from ellm.kernels.numba_linear import JitLinear

    linear = JitLinear(torch.randn(70, 50), None)
    x = torch.randn(9, 50)
    expected = linear(x)
    x[4] = float("nan")
    out = linear(x)
    assert out[4].isnan().all()
    rest = torch.arange(9) != 4
    assert same_bits(out[rest], expected[rest])


def test_what_does_not_fit_is_refused() -> None:
    from ellm.kernels.numba_linear import JitLinear

    linear = JitLinear(torch.randn(64, 32), None)
    for x in (torch.randn(2, 31), torch.randn(2, 32, dtype=torch.float64)):
        with pytest.raises(AssertionError):
            linear(x)


OTHER = """
import sys, torch
from ellm.kernels import jit_linear
from ellm.kernels.numba_linear import JitLinear
assert jit_linear._PANELS == 1
assert not jit_linear.HAS_PAIRS
generator = torch.Generator().manual_seed(7)
weight, x = (torch.randn(n, 129, generator=generator) for n in (77, 70))
linear, half = JitLinear(weight, None), JitLinear(weight.bfloat16(), None)
results = [linear(x[:rows]) for rows in (1, 3, 6, 19, 70)]
torch.save((weight, x, results, half(x.bfloat16())), sys.argv[1])
"""


def test_registers_of_twice_the_width_change_no_bit(tmp_path: Path) -> None:
    """The tiles of AVX2 and of AVX-512 walk the same chains; and no instruction of the latter reaches the
    former, where LLVM would abort."""
    from ellm.kernels import jit_linear
    from ellm.kernels.jit_ir import compiled_for
    from ellm.kernels.numba_linear import JitLinear

    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    if platform.machine() in ("x86_64", "AMD64"):
        features = "+avx,+avx2,+fma,+f16c,+sse4.2,+bmi2"
        environment.update(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features)
    command = [sys.executable, "-c", OTHER, str(tmp_path / "results.pt")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert 1 + compiled_for("avx512f") == jit_linear._PANELS, "else both are the same tiles"
    weight, x, narrow, half = torch.load(tmp_path / "results.pt")
    linear = JitLinear(weight, None)
    for result in narrow:
        assert same_bits(linear(x[: len(result)]), result)
    wide = JitLinear(weight.bfloat16(), None)(x.bfloat16())  # pairs round otherwise
    torch.testing.assert_close(wide, half, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize(
    ("features", "suited"),
    [
        ("avx2 fma", {"float32": True, "bfloat16": True, "float16": True}),
        ("avx2", dict.fromkeys(["float32", "bfloat16", "float16"], False)),
        ("avx2 fma packable", {"float32": True, "bfloat16": False, "float16": True}),
        ("avx2 fma avx512f packable", {"float32": True, "bfloat16": False, "float16": True}),
        ("avx2 fma avx512f avx512bf16 packable", {"float32": True, "bfloat16": True, "float16": True}),
        ("avx2 fma avx512f avx512bf16 amx-bf16 packable", {"float32": True, "bfloat16": False}),
    ],
)
def test_suits_where_a_library_has_no_faster_loop(
    monkeypatch: pytest.MonkeyPatch, features: str, suited: dict[str, bool]
) -> None:
    from ellm.kernels import numba_linear

    has = features.split()
    monkeypatch.setattr(numba_linear.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(numba_linear, "compiled_for", has.__contains__)
    monkeypatch.setattr(numba_linear, "HAS_PAIRS", "avx512bf16" in has)
    monkeypatch.setattr(numba_linear, "is_packable", lambda dtype: "packable" in has)
    for name, expected in suited.items():
        assert numba_linear.suits_processor.__wrapped__(getattr(torch, name)) is expected


@pytest.mark.parametrize("deterministic", [True, False])
def test_chosen_where_it_suits_the_processor(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    from ellm.kernels import numba_ops
    from ellm.kernels.numba_linear import JitLinear

    ops, weight = select("cpu", deterministic=deterministic), torch.randn(64, 4096)
    monkeypatch.setattr(numba_ops, "suits_processor", lambda dtype: True)
    assert type(ops.linear(weight, None)) is JitLinear
    monkeypatch.setattr(numba_ops, "suits_processor", lambda dtype: False)
    expected = packed_linear.pack_linear(weight, None, strict=deterministic)
    assert type(ops.linear(weight, None)) is type(expected)
