"""CUDA graphs of what lies between a step's calls of attention, for steps that are not decode rows alone.

A chain of graphs has a number of rows; a step takes the shortest that has room. Rows that are left over are
computed and never read: no operation between two calls mixes rows. Store and attention run as they always
did, on the step's own rows between two graphs, so chunks, rows of a hole and streamed blocks need no graph of
their own.

    embed .. qkv 0 | store, attention 0 | out 0 .. mlp 0 .. qkv 1 | store, attention 1 | ... | .. norm
         graph                                  graph                                         graph
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ellm.worker.model.computation import Attend, AttentionCall, Communicator, Computation, next_call
from ellm.worker.model.graphs import NotRecorded, Recorder, Replay
from ellm.worker.model.inputs import StepInputs
from ellm.worker.model.layers import CausalModel

log = logging.getLogger(__name__)

# Where weights are read whole for a few rows already, further rows cost little; from 128 on they do.
_ROWS = (16, 32, 64)
_STRIDE = 128


def piece_rows(most: int) -> tuple[int, ...]:
    """The rows for which there are chains, rising, the last with room for `most`; none for 0."""
    if most <= 0:
        return ()
    few = [n for n in _ROWS if n < most]
    many = list(range(_STRIDE, most, _STRIDE))
    return (*few, *many, most)


class _Walk:
    """One computation on fixed memory, piece by piece."""

    def __init__(self, fixed: _Memory, model: CausalModel, communicator: Communicator, rows: int) -> None:
        self._fixed, self._model, self._communicator = fixed, model, communicator
        self._rows = rows
        self._computation: Computation | None = None
        self._calls: dict[int, AttentionCall] = {}

    def piece(self, index: int) -> None:
        """Piece 0 begins anew; the others come in order, each when its attention lies in the fixed memory."""
        fixed, rows = self._fixed, self._rows
        attended: Tensor | None = None
        if index == 0:
            self._computation = self._model.forward(fixed.token_ids[:rows], fixed.positions[:rows], None)
        else:
            attended = fixed.attended(rows)
        assert self._computation is not None
        try:
            call = next_call(self._computation, attended, self._communicator)
        except StopIteration as end:
            self._computation = None
            fixed.keep_hidden(end.value)
            return
        self._calls[index] = fixed.keep_call(call)

    def call(self, index: int, rows: int) -> AttentionCall:
        """What piece `index` asks for, of the first `rows` rows."""
        call = self._calls[index]
        return AttentionCall(call.q[:rows], call.k[:rows], call.v[:rows], call.heads, call.scale, call.window)


class _Memory:
    """Where every chain finds its inputs and leaves its results; only one runs at a time."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._most = most
        self.token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.token_ids)
        self._named: dict[str, Tensor] = {}

    def attended(self, rows: int) -> Tensor:
        """[rows, H, D]: the attention that the next piece goes on from."""
        return self._named["attended"][:rows]

    def hidden(self, rows: int) -> Tensor:
        return self._named["hidden"][:rows]

    def keep_call(self, call: AttentionCall) -> AttentionCall:
        """Heads copied to where the attention between two pieces reads them."""
        self._like("attended", call.q)
        q, k, v = (self._keep(name, getattr(call, name)) for name in "qkv")
        return AttentionCall(q, k, v, call.heads, call.scale, call.window)

    def keep_hidden(self, hidden: Tensor) -> None:
        self._keep("hidden", hidden)

    def _keep(self, name: str, value: Tensor) -> Tensor:
        kept = self._like(name, value)[: value.shape[0]]
        kept.copy_(value)
        return kept

    def _like(self, name: str, value: Tensor) -> Tensor:
        """Made once, before anything is recorded, for as many rows as any chain has."""
        if name not in self._named:
            self._named[name] = value.new_zeros((self._most, *value.shape[1:]))
        return self._named[name]


@dataclass(frozen=True, slots=True)
class _Chain:
    walk: _Walk
    replays: list[Replay]


class PieceGraphs:
    """Of one model."""

    def __init__(
        self,
        model: CausalModel,
        num_layers: int,
        rows: tuple[int, ...],
        device: torch.device,
        communicator: Communicator,
        recorder: Recorder,
    ) -> None:
        """rows: as `piece_rows` gives them, at least one."""
        self._model, self._num_layers = model, num_layers
        self._rows = rows
        self._communicator, self._recorder = communicator, recorder
        self._fixed = _Memory(rows[-1], device)
        self._chains: dict[int, _Chain] = {}
        self._failed = False
        self.num_replays = 0

    @property
    def num_chains(self) -> int:
        return len(self._chains)

    @property
    def num_sizes(self) -> int:
        return len(self._rows)

    def record_all(self) -> None:
        """Record every number of rows."""
        self.record_largest(self.num_sizes)

    def record_largest(self, count: int) -> None:
        """Record so many numbers of rows, the largest first."""
        with torch.inference_mode():
            for rows in self._rows[::-1][:count]:
                if rows not in self._chains:
                    self._record(rows)

    def hidden(self, inputs: StepInputs, attend: Attend) -> Tensor | None:
        """Final hidden states [n, E] of the rows that keep the LM head, to be read before the next step; None
        where no chain has room or was recorded."""
        num_rows = inputs.token_ids.shape[0]
        chain = next((self._chains[n] for n in self._rows if n >= num_rows and n in self._chains), None)
        if chain is None:
            return None
        fixed = self._fixed
        fixed.token_ids[:num_rows].copy_(inputs.token_ids)
        fixed.positions[:num_rows].copy_(inputs.meta.positions)
        for index, replay in enumerate(chain.replays):
            if index:
                fixed.attended(num_rows).copy_(attend(chain.walk.call(index - 1, num_rows)))
            replay()
        self.num_replays += 1
        hidden = fixed.hidden(num_rows)
        return hidden if inputs.rows is None else hidden.index_select(0, inputs.rows)

    def _record(self, rows: int) -> None:
        if self._failed:
            return
        walk, count = _Walk(self._fixed, self._model, self._communicator, rows), self._num_layers + 1

        def whole() -> None:
            for index in range(count):
                walk.piece(index)

        def piece(index: int) -> Replay:
            return self._recorder.capture(lambda: walk.piece(index))

        try:
            self._recorder.warm(whole)
            self._chains[rows] = _Chain(walk, [piece(index) for index in range(count)])
        except NotRecorded as error:
            self._failed = True
            self._chains.clear()
            log.warning("a step cannot be recorded in pieces, mixed steps run without: %s", error)
