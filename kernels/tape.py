"""Kernel launches that were recorded once and are played by one call: what calls them one by one takes as
long as the kernels of a step of few rows do."""

from __future__ import annotations

import ctypes
from itertools import accumulate

import numpy as np
import torch

from ellm.kernels import jit_play
from ellm.kernels.jit_launch import gomp_parallel
from ellm.kernels.jit_memory import HEADER
from ellm.kernels.recording import Recording


class Tape:
    """The launches of a recording, on the memory that it had. Whoever plays it has put the inputs where they
    were, and reads the results before it, or another tape of the same arena, is played again."""

    def __init__(self, recording: Recording) -> None:
        """`recording`: ended, without a problem."""
        assert recording.problem is None
        self.num_threads = torch.get_num_threads()
        self._checks = tuple(recording.checks.values())
        self._kept = (recording.arena, *recording.kept)
        launches = recording.launches
        lengths = [HEADER + len(words) for _, _, words in launches]
        self._blocks = np.zeros(sum(lengths), dtype=np.int64)
        parallel = gomp_parallel() if self.num_threads > 1 else None
        address = 0 if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
        listed = [len(launches), address, self.num_threads]
        for (function, units, words), start in zip(launches, accumulate(lengths, initial=0), strict=False):
            self._blocks[start + HEADER : start + HEADER + len(words)] = words
            listed += [function, self._blocks.ctypes.data + 8 * start, units]
        self._listed = np.array(listed, dtype=np.int64)
        self._address = self._listed.ctypes.data
        self._play = jit_play.play.entry(0)

    def play(self) -> None:
        """Raises AssertionError, before anything runs, where an id leads out of the memory it names."""
        for check in self._checks:
            check()
        assert torch.get_num_threads() == self.num_threads
        self._play(self._address)
