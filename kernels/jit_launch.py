"""Compiling kernels and running them on torch's own threads.

A kernel is a C function of one argument: the address of a block of 64-bit words, of which the first two are
counters that start at 0 (units given out, threads arrived) and the rest its arguments. Its threads fetch
units of work until none is left, so which thread runs a unit is chance and no result may depend on it.

A thread pool beside torch's would fight it for the cores: an OpenMP pool spins for a while after its work
is done. So kernels run on torch's pool, by the entry point that compilers use (GOMP_parallel). Where that is
not found they run on the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numba import cfunc
from numba.core import types

from ellm.kernels.recording import current

log = logging.getLogger(__name__)

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_size_t)


def _fingerprint() -> int:
    """A number that changes when any source of the kernels does: numba's cache looks at one file only."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(__file__).parent.glob("jit_*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


FINGERPRINT = _fingerprint()


@functools.cache
def gomp_parallel() -> Any:
    """torch's GOMP_parallel(function, argument, num_threads, flags), or None."""
    candidates = [str(p) for p in (Path(torch.__file__).parent / "lib").glob("lib*omp*")]
    try:
        maps = Path("/proc/self/maps").read_text()
        candidates = [line.split()[-1] for line in maps.splitlines() if "omp" in line] or candidates
    except OSError:
        pass
    for name in dict.fromkeys(candidates):
        try:
            entry = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    log.warning("torch's OpenMP pool was not found: the JIT kernels run on one thread")
    return None


class Kernel:
    """One kernel, compiled for each element kind at first use and kept in numba's cache.

    `build(variant)` returns the Python function to compile; the element kind is variant & 3. The rest of
    `variant` is the sources' fingerprint, which makes numba's cache key follow all of them.
    """

    def __init__(self, build: Callable[[int], Any]) -> None:
        self._build = build
        self._compiled: dict[int, tuple[Any, int]] = {}
        self._functions: list[Any] = []  # keeps the machine code alive
        self._lock = threading.Lock()

    def __call__(self, kind: int, units: int, words: tuple[int, ...]) -> None:
        """Run it; `words` are its arguments after the header. One unit of work stays on this thread."""
        compiled = self._compiled.get(kind)
        if compiled is None:
            compiled = self._compile(kind)
        recording = current()
        if recording is not None:
            recording.launch(compiled[1], units, words)
        block = array("q", (0, 0, *words))
        address = block.buffer_info()[0]
        threads = torch.get_num_threads()
        parallel = gomp_parallel() if units > 1 and threads > 1 else None
        if parallel is None:
            compiled[0](address)
        else:
            # Always the whole pool: asking for fewer makes OpenMP take its team apart.
            parallel(compiled[1], address, threads, 0)

    def entry(self, kind: int) -> Any:
        """The C function of an element kind, to be called with the address of a block."""
        return (self._compiled.get(kind) or self._compile(kind))[0]

    def _compile(self, kind: int) -> tuple[Any, int]:
        with self._lock:
            if kind not in self._compiled:
                function = _compile_cached(self._build(FINGERPRINT * 4 + kind))
                self._functions.append(function)
                self._compiled[kind] = (_Entry(function.address), function.address)
            return self._compiled[kind]


def _compile_cached(function: Any) -> Any:
    try:
        return cfunc(types.void(types.intp), cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        log.info("no folder to cache compiled kernels in (set NUMBA_CACHE_DIR): compiling at each start")
        return cfunc(types.void(types.intp), error_model="numpy")(function)
