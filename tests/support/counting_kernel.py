"""A kernel that counts how often each unit was run, and by which thread. Needs numba."""

from __future__ import annotations

from typing import Any

from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_memory import fetch_add, word


def _count(variant: int) -> Any:
    def count(block):  # type: ignore[no-untyped-def]
        """words: units, address of [units] int64, address of [threads] int64"""
        kind = variant & 3
        slot = fetch_add(block + 8, 1)
        unit = fetch_add(block, 1)
        while unit < word(block, 0):
            fetch_add(word(block, 1) + 8 * unit, 1 + kind)
            fetch_add(word(block, 2) + 8 * slot, 1)
            unit = fetch_add(block, 1)

    return count


COUNT = Kernel(_count)
