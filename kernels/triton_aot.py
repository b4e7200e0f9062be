"""Compiles the Triton kernels for a GPU that is not there, and reads what they take of it.

The launches are those of the cases, recorded instead of run: same arguments, sizes and options as in service.
Needs the compiler, so nothing here works in a process where kernels are interpreted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from ellm.kernels.dispatch import LEAST_CAPABILITY
from ellm.kernels.triton_cases import COMPILED, QUICKLY_COMPILED
from ellm.kernels.triton_check import Kernels
from ellm.kernels.triton_step_cases import cases

SHARED_LIMIT = 227 * 1024  # bytes of one block on sm_90
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as the device would get it. `failure` says why there is none."""

    kernel: str
    detail: str
    seconds: float
    registers: int = 0
    shared_bytes: int = 0
    spill_bytes: int = 0
    matrix: str = ""  # instructions of the matrix products: wgmma (Hopper's), mma, or none
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.shared_bytes <= SHARED_LIMIT

    @property
    def result(self) -> str:
        shared = f"{self.shared_bytes / 1024:.1f} KiB shared"
        return f"{self.registers} registers, {shared}, {self.spill_bytes} B spilled, {self.matrix}"


@dataclass(frozen=True, slots=True)
class _Launch:
    fn: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def capability(name: str) -> int:
    """ "sm_90" -> 90. Raises ValueError for another form, and for a GPU that the kernels are not for."""
    found = re.fullmatch(r"sm_(\d{2,3})a?", name)
    if not found:
        raise ValueError(f"a GPU's architecture is written as sm_90, not {name!r}")
    if int(found[1]) < 10 * LEAST_CAPABILITY:
        raise ValueError(f"the Triton kernels need compute capability {LEAST_CAPABILITY}.0, not {name}")
    return int(found[1])


def compile_all(arch: int, *, quick: bool, kernel: str | None = None) -> Iterator[Compiled]:
    """Every kernel that the cases launch, each compiled once."""
    seen = set()
    for case in cases(QUICKLY_COMPILED if quick else COMPILED, quick=True):
        if kernel not in (None, case.kernel):
            continue
        for launch in record(lambda case=case: case.run(Kernels(), torch.device("cpu"))):
            if launch not in seen:
                seen.add(launch)
                yield compile_one(launch, case.detail, arch)


def record(call: Any) -> list[_Launch]:
    """The launches of `call`, none of which runs."""
    launches: list[_Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(self, args, kwargs))

    before = JITFunction.run
    JITFunction.run = run
    try:
        call()
    finally:
        JITFunction.run = before
    return launches


def _launch(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Launch:
    """As the launcher specialises it: what is 1 is a constant, multiples of 16 are known as such."""
    given = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = [], [], []
    for at, param in enumerate(fn.params):
        value, kind = given[param.name], "i32"
        if isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                aligned.append(at)
        elif param.is_constexpr or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            kind = "constexpr"
            constants.append((at, value))
        elif isinstance(value, float):
            kind = "fp32"
        elif value % 16 == 0 and not param.do_not_specialize:
            aligned.append(at)
        signature.append((param.name, kind))
    options = tuple((name, kwargs[name]) for name in OPTIONS if name in kwargs)
    return _Launch(fn, tuple(signature), tuple(constants), tuple(aligned), options)


def compile_one(launch: _Launch, detail: str, arch: int) -> Compiled:
    """The kernel of one launch for compute capability `arch` (90: Hopper)."""
    name, begin = launch.fn.__name__.removesuffix("_kernel"), perf_counter()
    sizes = {launch.fn.arg_names[at]: value for at, value in launch.constants}
    mode = "".join(f" {key.lower()}" for key in ("PARTS", "SINGLE", "ADDS", "HAS_WINDOW") if sizes.get(key))
    source = ASTSource(
        launch.fn,
        dict(launch.signature),
        {(at,): value for at, value in launch.constants},
        {(at,): [["tt.divisibility", 16]] for at in launch.aligned},
    )
    try:
        made = triton.compile(source, GPUTarget("cuda", arch, 32), dict(launch.options))
        registers, spills = _resources(made.asm["cubin"])
    except (TritonError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Compiled(name, detail + mode, perf_counter() - begin, failure=reason)
    seconds = perf_counter() - begin
    matrix = next((kind for kind in ("wgmma", "mma") if f"{kind}." in made.asm["ptx"]), "no matrix unit")
    return Compiled(name, detail + mode, seconds, registers, made.metadata.shared, spills, matrix)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes that it keeps in memory for want of them)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said.stdout)
    if not found:
        raise RuntimeError(f"cuobjdump said nothing of registers: {said.stdout[-200:]!r}")
    return int(found[1]), int(found[2]) + int(found[3])
