"""The content of two simulated memories under copies: a digest per slot, and a complaint for every misuse.

A block that is being saved must not change before the copy ends; one that is being loaded holds nothing until
then.
"""

from __future__ import annotations

from collections.abc import Sequence

from ellm.worker.engine.plan import BatchPlan, BlockCopy, ModelLimits


class PlanViolation(AssertionError):
    """A plan that hardware would have carried out wrongly."""


class CopiedSlots:
    """`slots` are those of the device: written here when a load begins and when it ends."""

    def __init__(self, limits: ModelLimits, slots: list[int | None]) -> None:
        self._limits = limits
        self._slots = slots
        self._host: dict[int, list[int | None]] = {}
        self._before: dict[int, list[int | None]] = {}  # copy id -> what it copies

    def start(self, plan: BatchPlan) -> None:
        limits = self._limits
        for copy in (*plan.saves, *plan.loads):
            if not 0 <= copy.block < limits.num_blocks or not 0 <= copy.host_block < limits.num_host_blocks:
                raise PlanViolation(f"copy {copy.copy_id} names a block outside its pool")
        for copy in plan.saves:
            content = self._content(copy.block)
            if None in content:
                raise PlanViolation(f"copy {copy.copy_id} saves a block that is not full")
            self._before[copy.copy_id] = content
            self._host.pop(copy.host_block, None)
        for copy in plan.loads:
            if copy.host_block not in self._host:
                raise PlanViolation(f"copy {copy.copy_id} loads a block that the host does not have")
            self._before[copy.copy_id] = self._host[copy.host_block]
            self._write(copy.block, [None] * limits.block_size)

    def stream(self, plan: BatchPlan) -> None:
        """Transient blocks hold what the host has, for this step."""
        for block in plan.streams:
            if block.host_block not in self._host:
                raise PlanViolation(f"block {block.host_block} is streamed and the host does not have it")
            self._write(block.transient_block, self._host[block.host_block])

    def end(self, saves: Sequence[BlockCopy], loads: Sequence[BlockCopy], failed: Sequence[int]) -> None:
        for copy in saves:
            content = self._before.pop(copy.copy_id)
            if self._content(copy.block) != content:
                raise PlanViolation(f"block {copy.block} changed while it was saved")
            if copy.copy_id not in failed:
                self._host[copy.host_block] = content
        for copy in loads:
            content = self._before.pop(copy.copy_id)
            if self._host.get(copy.host_block) is not content:
                raise PlanViolation(f"host block {copy.host_block} changed while it was loaded")
            if any(slot is not None for slot in self._content(copy.block)):
                raise PlanViolation(f"block {copy.block} was written while it was loaded")
            if copy.copy_id not in failed:
                self._write(copy.block, content)

    def _content(self, block: int) -> list[int | None]:
        size = self._limits.block_size
        return self._slots[block * size : (block + 1) * size]

    def _write(self, block: int, content: Sequence[int | None]) -> None:
        size = self._limits.block_size
        self._slots[block * size : (block + 1) * size] = content
