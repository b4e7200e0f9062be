"""When the Triton body is chosen, and what takes the place of a kernel that does not compile."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from ellm.kernels import dispatch
from ellm.kernels.ops import KernelError
from ellm.kernels.reference import TorchOps

NEEDS_TRITON = pytest.mark.needs_module("triton")
X = torch.randn(3, 8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a Hopper GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


@NEEDS_TRITON
def test_a_gpu_gets_the_triton_body(gpu: pytest.MonkeyPatch) -> None:
    for device in ("cuda", "cuda:1"):
        assert dispatch.select(device).name == "triton"
    assert dispatch.select("cuda", jit=False).name == "torch"
    assert dispatch.select("cpu", jit=False).name == "torch"
    strict = dispatch.select("cuda", deterministic=True)
    assert (strict.name, strict.deterministic) == ("triton", True)
    assert not dispatch.select("cuda").deterministic
    with pytest.raises(ValueError, match=r"deterministic=True cannot be had on 'cuda' without the Triton"):
        dispatch.select("cuda", jit=False, deterministic=True)


@NEEDS_TRITON
def test_a_gpu_that_is_too_old_is_told_so(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.select("cuda").name == "torch"
    (message,) = (r.getMessage() for r in caplog.records)
    assert "need compute capability 8.0, this GPU has 7.5" in message
    with pytest.raises(ValueError, match=r"7\.5"):
        dispatch.triton_body("cuda")
    with pytest.raises(ValueError, match=r"deterministic=True cannot be had on 'cuda': .* has 7\.5"):
        dispatch.select("cuda", deterministic=True)


def test_without_triton_a_gpu_gets_torchs_body_and_nothing_of_triton_is_imported() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from ellm.kernels import dispatch\n"
        "print(dispatch.select('cuda').name, 'ellm.kernels.triton_ops' in sys.modules)\n"
        "print(dispatch.triton_problem('cuda'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.split() == ["torch", "False"]
    assert "triton is not installed" in second
    assert "triton is not installed" in done.stderr


@NEEDS_TRITON
def test_on_a_cpu_the_body_is_the_interpreters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="need a GPU, or their interpreter"):
        dispatch.triton_body("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.triton_problem("cpu") is None


def _errors() -> list[Exception]:
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources, PTXASError

    compiler = ["ptxas", "-v"]
    return [
        TritonError("unsupported"),
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("bad instruction"),
        RuntimeError("PassManager::run failed"),
        subprocess.CalledProcessError(1, compiler),
    ]


@NEEDS_TRITON
def test_a_kernel_that_does_not_compile_is_named_once_and_torchs_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ellm.kernels import triton_rows
    from ellm.kernels.triton_ops import TritonOps

    calls = []
    expected = TorchOps().silu_mul(X)
    for error in _errors():
        caplog.clear()
        calls.clear()

        def fails(*_: object, error: Exception = error) -> None:
            calls.append(1)
            raise error

        monkeypatch.setattr(triton_rows, "silu_mul", fails)
        monkeypatch.setattr(triton_rows, "layer_norm", lambda *_: "the kernel's")
        ops = TritonOps("cpu")
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert torch.equal(ops.silu_mul(X), expected)
        (message,) = (r.getMessage() for r in caplog.records)
        assert "silu_mul" in message
        assert "\n" not in message
        assert len(calls) == 1
        assert ops.layer_norm(X, X[0], X[0], 1e-5) == "the kernel's"  # type: ignore[comparison-overlap]


@NEEDS_TRITON
def test_strict_is_never_given_up_for_a_kernel_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But for one that only moves bits."""
    from ellm.kernels import triton_copy, triton_linear, triton_rows
    from ellm.kernels.triton_ops import TritonOps

    def fails(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(triton_rows, "silu_mul", fails)
    monkeypatch.setattr(triton_linear, "linear", fails)
    monkeypatch.setattr(triton_copy, "kv_copy", fails)
    ops = TritonOps("cpu", deterministic=True)
    linear = ops.linear(X, None)
    for name, call in (("silu_mul", lambda: ops.silu_mul(X)), ("linear", lambda: linear(X))):
        with pytest.raises(KernelError, match=f"the Triton kernel {name} does not compile.*PassManager"):
            call()
    source, target = torch.randn(1, 2, 3, 1, 4, 8), torch.zeros(1, 2, 3, 1, 4, 8)
    ops.kv_copy(source, target, torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(target[:, :, :2], source[:, :, [2, 1]])
    assert not target[:, :, 2].any()
    assert ops.broken == {"kv_copy"}
    assert "kv_copy does not compile" in caplog.text


@NEEDS_TRITON
def test_what_is_no_fault_of_the_compiler_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from ellm.kernels import triton_rows
    from ellm.kernels.triton_ops import TritonOps

    for error in (torch.OutOfMemoryError("CUDA out of memory"), AssertionError("a stride")):

        def fails(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(triton_rows, "silu_mul", fails)
        with pytest.raises(type(error)):
            TritonOps("cpu").silu_mul(X)
