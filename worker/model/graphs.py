"""CUDA graphs of decode steps: the layers' launches recorded once per size, and replayed by one call.

A graph has a number of rows and a longest context, both rounded up; a step takes the smallest that has room.
Rows that are left over have no slot and no context: they store nothing and read nothing. Ids, positions,
slots, lengths and tables lie at fixed addresses, so which sequences take part, and what they have parked,
changes no graph. Steps with chunks, rows of a hole or streamed blocks run in recorded pieces (pieces.py) or
as they always did; so does sampling.

Ranks of a group record the same sizes in one order, the sums that they make together included; they record
all, or none of them does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, Ops
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.model.computation import Communicator, run
from ellm.worker.model.inputs import StepInputs
from ellm.worker.model.kv_cache import KVCache
from ellm.worker.model.layers import CausalModel, PoolAttention

log = logging.getLogger(__name__)

LEAST_CONTEXT = 512  # tokens: one part of a decode row's keys
Replay = Callable[[], None]
_T = TypeVar("_T")


class NotRecorded(Exception):
    """Why a call cannot be replayed."""


class Recorder(Protocol):
    """Turns calls into something that can be replayed on the same memory."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """(what runs it again, the tensor that holds the result each time); `call` may run at once, too.
        Raises NotRecorded."""
        ...

    def warm(self, call: Callable[[], object]) -> None:
        """Run it, so that what is made on the first call of a size is not made while recording."""
        ...

    def capture(self, call: Callable[[], object]) -> Replay:
        """Record a call that has been warmed; its results lie where it puts them. Raises NotRecorded."""
        ...

    def agree(self, problem: str | None) -> None:
        """Raises NotRecorded where there is a problem, here or on another rank."""
        ...


class CudaRecorder:
    """Graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.warm(call)
        out: list[Tensor] = []
        replay = self.capture(lambda: out.append(call()))
        return replay, out[0]

    def warm(self, call: Callable[[], object]) -> None:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream(self._device).wait_stream(side)

    def capture(self, call: Callable[[], object]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads ask a device for meanwhile (NCCL's looks after its work) does no harm.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotRecorded(reason) from error
        self._pool = self._pool or graph.pool()
        return graph.replay

    def agree(self, problem: str | None) -> None:
        if problem is not None:
            raise NotRecorded(problem)


class RanksRecorder:
    """One rank's recorder in a group: what one rank cannot record, no rank replays. All make the same calls
    in the same order; recording itself moves nothing between ranks, but warming does: what fails there has
    failed on the device, and ends the group."""

    def __init__(self, own: Recorder, agree: Callable[[bool], bool]) -> None:
        """`agree`: whether it is so on all ranks."""
        self._own, self._agree = own, agree

    def record(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        return self._together(lambda: self._own.record(call))

    def warm(self, call: Callable[[], object]) -> None:
        self._own.warm(call)

    def capture(self, call: Callable[[], object]) -> Replay:
        return self._together(lambda: self._own.capture(call))

    def agree(self, problem: str | None) -> None:
        if not self._agree(problem is None):
            raise NotRecorded(problem or "another rank cannot")

    def _together(self, make: Callable[[], _T]) -> _T:
        try:
            made = make()
        except NotRecorded as error:
            self.agree(str(error))
            raise
        self.agree(None)
        return made


@dataclass(frozen=True, slots=True)
class DecodeSizes:
    """The rows and contexts for which there are graphs."""

    rows: tuple[int, ...]  # rising
    contexts: tuple[int, ...]  # tokens, rising

    @staticmethod
    def up_to(max_rows: int, max_context: int) -> DecodeSizes:
        """Powers of two, and the limits themselves."""
        return DecodeSizes(_doubled(1, max_rows), _doubled(LEAST_CONTEXT, max_context))


def _doubled(least: int, most: int) -> tuple[int, ...]:
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], most) if sizes[-1] > most > least else tuple(sizes)


def graph_problem(ops: Ops, device: torch.device) -> str | None:
    """Why decode steps cannot be recorded here, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, not {device.type}"
    if ops.name != "triton":
        return "CUDA graphs need the Triton kernels: torch's operations store rows that have no slot"
    return None


class DecodeGraphs:
    """Of one model and its pool."""

    def __init__(
        self,
        model: CausalModel,
        ops: Ops,
        cache: KVCache,
        sizes: DecodeSizes,
        communicator: Communicator,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._ops = ops
        self._cache = cache
        self._sizes = sizes
        self._communicator = communicator
        self._recorder = recorder
        self._graphs: dict[tuple[int, int], tuple[Replay, Tensor]] = {}
        self._failed = False
        self.num_replays = 0
        most, device = sizes.rows[-1], cache.device
        self._token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._token_ids)
        self._slots = torch.full_like(self._token_ids, -1)
        self._kv_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self._entries = torch.arange(most + 1, dtype=torch.int32, device=device)
        width = -(-sizes.contexts[-1] // cache.block_size)
        self._tables = torch.zeros((most, width), dtype=torch.int32, device=device)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def num_sizes(self) -> int:
        return len(self._sizes.rows) * len(self._sizes.contexts)

    def record_all(self) -> None:
        """Record every size."""
        self.record_largest(self.num_sizes)

    def record_largest(self, count: int) -> None:
        """Record so many sizes, the largest first: what the others need of memory is there then."""
        rows, contexts = reversed(self._sizes.rows), tuple(reversed(self._sizes.contexts))
        with torch.inference_mode():
            for size in islice(product(rows, contexts), count):
                self._record(*size)

    def hidden(self, plan: BatchPlan, inputs: StepInputs) -> Tensor | None:
        """Final hidden states [n, E] of the rows that keep the LM head, to be read before the next step; None
        where the step is none that has been recorded."""
        meta = inputs.meta
        num_rows = meta.num_decode
        if plan.streams or meta.num_recompute or num_rows != plan.num_rows:
            return None
        if num_rows > self._sizes.rows[-1] or meta.max_kv_len > self._sizes.contexts[-1]:
            return None
        rows = next(n for n in self._sizes.rows if n >= num_rows)
        context = next(n for n in self._sizes.contexts if n >= meta.max_kv_len)
        graph = self._graphs.get((rows, context))
        if graph is None:
            return None
        self._fill(inputs, rows)
        replay, out = graph
        replay()
        self.num_replays += 1
        hidden = out[:num_rows]
        return hidden if inputs.rows is None else hidden.index_select(0, inputs.rows)

    def _record(self, rows: int, context: int) -> None:
        if self._failed or (rows, context) in self._graphs:
            return
        self._clear(0, rows)
        try:
            self._recorder.agree(self._problem())
            found = self._recorder.record(lambda: self._run(rows, context))
            self._recorder.agree(self._problem())  # found out on the way
        except NotRecorded as error:
            self._failed = True
            self._graphs.clear()
            log.warning("a decode step cannot be recorded as a CUDA graph, steps run without: %s", error)
            return
        self._graphs[(rows, context)] = found

    def _problem(self) -> str | None:
        """Where torch's operations stand in for kernels, rows without a slot would be stored. What breaks
        later is in no graph."""
        broken = sorted(getattr(self._ops, "broken", ()))
        return f"torch's operations stand in for {', '.join(broken)}" if broken else None

    def _run(self, rows: int, context: int) -> Tensor:
        """The layers on the fixed inputs: [rows, E]."""
        meta = AttentionMeta(
            cu_seqlens_q=self._entries[: rows + 1],
            kv_lens=self._kv_lens[:rows],
            block_tables=self._tables[:rows],
            positions=self._positions[:rows],
            slot_mapping=self._slots[:rows],
            num_decode=rows,
            max_kv_len=context,
            row_entry=self._entries[:rows],
        )
        steps = [(meta, kv) for kv in self._cache.layers]
        computation = self._model.forward(self._token_ids[:rows], meta.positions, None)
        return run(computation, self._communicator, PoolAttention(self._ops, steps))

    def _fill(self, inputs: StepInputs, rows: int) -> None:
        meta = inputs.meta
        count, width = meta.block_tables.shape
        self._token_ids[:count].copy_(inputs.token_ids)
        self._positions[:count].copy_(meta.positions)
        self._slots[:count].copy_(meta.slot_mapping)
        self._kv_lens[:count].copy_(meta.kv_lens)
        self._tables[:count, :width].copy_(meta.block_tables)
        if count < rows:
            self._clear(count, rows)

    def _clear(self, first: int, end: int) -> None:
        """Rows that are not there."""
        self._token_ids[first:end].zero_()
        self._positions[first:end].zero_()
        self._slots[first:end].fill_(-1)
        self._kv_lens[first:end].zero_()
