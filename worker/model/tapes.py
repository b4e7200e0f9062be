"""Tapes of decode steps on a CPU: the layers' launches recorded at the first step of so many rows, and played
by one call from then on. With few rows Python between the kernels takes as long as the kernels do.

Ids, positions, slots and tables lie at fixed addresses, as for CUDA graphs (graphs.py), so which sequences
take part, and what they have parked, changes no tape. The embedding is looked up before it, sampling is done
after it; steps with chunks, rows of a hole or streamed blocks run as they always did.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ellm.kernels import jit_play
from ellm.kernels.ops import AttentionMeta, Ops
from ellm.kernels.recording import Arena, Recording
from ellm.kernels.tape import Tape
from ellm.worker.engine.plan import BatchPlan
from ellm.worker.model.computation import Alone, run
from ellm.worker.model.inputs import StepInputs
from ellm.worker.model.kv_cache import KVCache
from ellm.worker.model.layers import CausalModel, PoolAttention

log = logging.getLogger(__name__)

MOST_ROWS = 64  # with more, Python is little beside the kernels


class DecodeTapes:
    """Of one model and its pool, on one rank."""

    def __init__(
        self, model: CausalModel, ops: Ops, cache: KVCache, max_rows: int, max_model_len: int
    ) -> None:
        """`ops`: the numba body."""
        self._model = model
        self._ops = ops
        self._cache = cache
        self._arena = Arena()
        self._tapes: dict[int, tuple[Tape, Tensor]] = {}
        self._failed = False
        self.num_replays = 0
        self._most = min(max_rows, MOST_ROWS)
        self._embedded: Tensor | None = None  # [most, E]
        self._positions = torch.zeros(self._most, dtype=torch.int64)
        self._slots = torch.zeros_like(self._positions)
        self._kv_lens = torch.ones(self._most, dtype=torch.int32)
        self._entries = torch.arange(self._most + 1, dtype=torch.int32)
        width = -(-max_model_len // cache.block_size)
        self._max_kv_len = width * cache.block_size
        self._tables = torch.zeros((self._most, width), dtype=torch.int32)
        jit_play.play.entry(0)  # compiled at start

    @property
    def num_tapes(self) -> int:
        return len(self._tapes)

    def hidden(self, plan: BatchPlan, inputs: StepInputs) -> Tensor | None:
        """Final hidden states [n, E] of the rows that keep the LM head, to be read before the next step; None
        where the step is not one of decode rows alone."""
        meta = inputs.meta
        rows = meta.num_decode
        if plan.streams or meta.num_recompute or rows != plan.num_rows:
            return None
        if self._failed or rows > self._most or meta.max_kv_len > self._max_kv_len:
            return None
        self._fill(meta, rows)
        out = self._run(inputs, rows)
        return out if inputs.rows is None else out.index_select(0, inputs.rows)

    def _fill(self, meta: AttentionMeta, rows: int) -> None:
        self._positions[:rows].copy_(meta.positions)
        self._slots[:rows].copy_(meta.slot_mapping)
        self._tables[:rows, : meta.block_tables.shape[1]].copy_(meta.block_tables)

    def _run(self, inputs: StepInputs, rows: int) -> Tensor:
        """The layers on the fixed inputs: [rows, E]."""
        computation = self._model.forward(inputs.token_ids, self._positions[:rows], None)
        first = next(computation)  # the embedding, a part of the first sum: all of it, on one rank
        assert isinstance(first, Tensor)
        if self._embedded is None:
            self._embedded = first.new_empty((self._most, first.shape[1]))
        embedded = self._embedded[:rows]
        embedded.copy_(first)
        taped = self._tapes.get(rows)
        if taped is not None and taped[0].num_threads == torch.get_num_threads():
            computation.close()
            taped[0].play()
            self.num_replays += 1
            return taped[1]
        recording, meta = Recording(self._arena), self._meta(rows)
        with recording:
            attend = PoolAttention(self._ops, [(meta, kv) for kv in self._cache.layers])
            out = run(computation, Alone(), attend, embedded)
        if recording.problem is None:
            self._tapes[rows] = Tape(recording), out
        else:
            self._failed = True
            self._tapes.clear()
            self._arena = Arena()
            log.info("decode steps run kernel by kernel: %s", recording.problem)
        return out

    def _meta(self, rows: int) -> AttentionMeta:
        """Of tensors that are not in any other tape."""
        return AttentionMeta(
            cu_seqlens_q=self._entries[: rows + 1],
            kv_lens=self._kv_lens[:rows],
            block_tables=self._tables[:rows],
            positions=self._positions[:rows],
            slot_mapping=self._slots[:rows],
            num_decode=rows,
            max_kv_len=self._max_kv_len,
            row_entry=self._entries[:rows],
        )
