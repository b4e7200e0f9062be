"""Plans as bytes: what rank 0 sends to the others once per step. Plain numbers; nothing in them is executed.

Of a block table only what it has gained since the sequence's last plan is sent: within a residence tables
only grow. So both ends keep what was sent, and every plan must pass through in order.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import fields
from typing import Any

from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import HOLE_WAYS, BatchPlan, BlockCopy, NewSequence, PlanEntry, StreamedBlock

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_SAMPLES, _PROMPT_LOGPROBS, _RECOMPUTE = 1, 2, 4
_HEAD, _ENTRY, _NEW = 9, 8, 4  # numbers


class PlanPacker:
    """Rank 0's end."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._sent: dict[int, int] = {}  # blocks, by seq_id

    def pack(self, plan: BatchPlan) -> bytes:
        """8 bytes of length of the numbers, the numbers (64 bit), the sampling parameters of new
        sequences."""
        for seq_id in plan.released:
            self._sent.pop(seq_id, None)
        for new in plan.new:
            self._sent[new.seq_id] = 0
        lengths = map(len, (plan.entries, plan.new, plan.released, plan.saves, plan.loads, plan.streams))
        way = -1 if plan.way is None else HOLE_WAYS.index(plan.way)
        numbers = array("q", (plan.step, int(plan.waits), way, *lengths))
        numbers.extend(plan.released)
        for copy in (*plan.saves, *plan.loads):
            numbers.extend((copy.copy_id, copy.block, copy.host_block))
        for stream in plan.streams:
            numbers.extend((stream.host_block, stream.transient_block))
        for new in plan.new:
            numbers.extend((new.seq_id, new.choice_index, len(new.prompt_ids), len(new.output_ids)))
            numbers.extend(new.prompt_ids)
            numbers.extend(new.output_ids)
        for entry in plan.entries:
            self._entry(numbers, entry)
        sampling = [[getattr(new.sampling, name) for name in _SAMPLING] for new in plan.new]
        text = json.dumps(sampling).encode() if sampling else b""
        return len(numbers).to_bytes(8, "little") + numbers.tobytes() + text

    def _entry(self, numbers: array[int], entry: PlanEntry) -> None:
        have = self._sent.get(entry.seq_id, 0)
        needed = max(have, -(-(entry.start + entry.num_tokens) // self._block_size))
        self._sent[entry.seq_id] = needed
        flags = (
            _SAMPLES * entry.samples | _PROMPT_LOGPROBS * entry.prompt_logprobs | _RECOMPUTE * entry.recompute
        )
        ids, blocks = entry.token_ids, entry.block_ids[have:needed]
        numbers.extend((entry.seq_id, entry.start, entry.num_tokens, flags, entry.output_index))
        numbers.extend((have, len(ids), len(blocks)))
        numbers.extend(ids)
        numbers.extend(blocks)


class PlanUnpacker:
    """The other ranks' end."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def unpack(self, data: bytes) -> BatchPlan:
        """The plan as it was packed, but for blocks behind what its entries need."""
        count = int.from_bytes(data[:8], "little")
        numbers = array("q")
        numbers.frombytes(data[8 : 8 + 8 * count])
        text = data[8 + 8 * count :]
        reader = _Reader(numbers)
        step, waits, way, *lengths = reader.take(_HEAD)
        num_entries, num_new, num_released, num_saves, num_loads, num_streams = lengths
        released = tuple(reader.take(num_released))
        copies = [BlockCopy(*reader.take(3)) for _ in range(num_saves + num_loads)]
        streams = tuple(StreamedBlock(*reader.take(2)) for _ in range(num_streams))
        for seq_id in released:
            self._tables.pop(seq_id, None)
        sampling = json.loads(text) if text else []
        assert len(sampling) == num_new
        new = tuple(self._new(reader, values) for values in sampling)
        entries = tuple(self._entry(reader) for _ in range(num_entries))
        assert reader.at_end
        return BatchPlan(
            step,
            entries,
            new,
            released,
            sum(entry.num_tokens for entry in entries),
            sum(entry.num_tokens == 1 and entry.samples for entry in entries),
            tuple(copies[:num_saves]),
            tuple(copies[num_saves:]),
            streams,
            bool(waits),
            None if way < 0 else HOLE_WAYS[way],
        )

    def _new(self, reader: _Reader, values: list[Any]) -> NewSequence:
        seq_id, choice_index, num_prompt, num_output = reader.take(_NEW)
        self._tables[seq_id] = []
        prompt_ids, output_ids = tuple(reader.take(num_prompt)), tuple(reader.take(num_output))
        sampling = SamplingParams(**dict(zip(_SAMPLING, map(_tuples, values), strict=True)))
        return NewSequence(seq_id, prompt_ids, output_ids, sampling, choice_index)

    def _entry(self, reader: _Reader) -> PlanEntry:
        seq_id, start, num_tokens, flags, output_index, have, num_ids, num_blocks = reader.take(_ENTRY)
        token_ids = tuple(reader.take(num_ids))
        table = self._tables.setdefault(seq_id, [])
        assert have == len(table), f"sequence {seq_id}: {len(table)} blocks are known, not {have}"
        table += reader.take(num_blocks)
        return PlanEntry(
            seq_id,
            start,
            num_tokens,
            token_ids,
            table,
            bool(flags & _SAMPLES),
            output_index,
            bool(flags & _PROMPT_LOGPROBS),
            bool(flags & _RECOMPUTE),
        )


class _Reader:
    """Numbers, in order."""

    def __init__(self, numbers: array[int]) -> None:
        self._numbers = numbers
        self._at = 0

    def take(self, count: int) -> list[int]:
        found = self._numbers[self._at : self._at + count]
        assert len(found) == count, "a plan is cut off"
        self._at += count
        return found.tolist()

    @property
    def at_end(self) -> bool:
        return self._at == len(self._numbers)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
