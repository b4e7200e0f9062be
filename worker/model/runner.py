"""Carries out plans on one model: inputs, layers, LM head where it is needed, sampling, sampler state.

Decides nothing about what runs; knows nothing of requests beyond the sequences a plan names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, Ops
from ellm.worker.engine.plan import BatchPlan, HoleWay
from ellm.worker.model.ahead import lanes_of, run_ahead, sides
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.begun import BegunStep, PromptScores, StepOutput
from ellm.worker.model.computation import Computation, TensorParallel, run, run_halves
from ellm.worker.model.grammar import Grammars
from ellm.worker.model.halves import Half, Ints, split
from ellm.worker.model.inputs import InputBuilder, StepInputs
from ellm.worker.model.kv_cache import KVCache
from ellm.worker.model.layers import CausalModel, LayerStep, PoolAttention
from ellm.worker.model.pieces import PieceGraphs
from ellm.worker.model.sampler import Sampler
from ellm.worker.model.sequences import ResidentSequences
from ellm.worker.model.staging import ToHost
from ellm.worker.model.transient import LayerLoads, layer_steps


class Replays(Protocol):
    """Decode steps that were recorded: CUDA graphs, or tapes of a CPU's kernels."""

    num_replays: int

    def hidden(self, plan: BatchPlan, inputs: StepInputs) -> Tensor | None:
        """Final hidden states [n, E] of the rows that keep the LM head, to be read before the next step; None
        where the step is none that can be replayed."""
        ...


class ModelRunner:
    """One model, its pool and the sequences resident in it."""

    def __init__(
        self,
        model: CausalModel,
        ops: Ops,
        arch: Architecture,
        cache: KVCache,
        max_model_len: int,
        loads: LayerLoads | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        """`loads`: what streams blocks of the host tier, where there is one. `parallel`: the other ranks."""
        self._model = model
        self._ops = ops
        self._cache = cache
        self._hole_way: HoleWay = "apart"
        self._loads = loads
        parallel = parallel or TensorParallel()
        self._communicator, self._overlap_rows = parallel.communicator, parallel.overlap_rows
        device = cache.device
        max_blocks = -(-max_model_len // cache.block_size)
        self._sequences = ResidentSequences(arch.eos_token_ids, arch.vocab_size, max_blocks)
        self._inputs = InputBuilder(self._sequences, cache.block_size, device)
        self._sampler = Sampler(ops, arch.vocab_size, device)
        self._graphs: Replays | None = None
        self._pieces: PieceGraphs | None = None
        self._lanes = lanes_of(device)

    def obey(self, grammars: Grammars) -> None:
        """Sequences may come with a grammar from now on."""
        self._sequences.grammars = grammars

    def fill_holes(self, way: HoleWay) -> None:
        """So run rows of holes from now on, where a plan does not say."""
        self._hole_way = way

    def replay(self, graphs: Replays) -> None:
        """Decode steps are replayed from now on, where they have been recorded."""
        self._graphs = graphs

    def replay_pieces(self, pieces: PieceGraphs) -> None:
        """Other steps are replayed between their calls of attention, where that has been recorded."""
        self._pieces = pieces

    @property
    def cache(self) -> KVCache:
        return self._cache

    @property
    def ops(self) -> Ops:
        return self._ops

    @property
    def model(self) -> CausalModel:
        return self._model

    @property
    def num_replays(self) -> tuple[int, int]:
        """Steps so far that were replayed whole, and in pieces."""
        graphs, pieces = self._graphs, self._pieces
        return (0 if graphs is None else graphs.num_replays, 0 if pieces is None else pieces.num_replays)

    @property
    def num_resident(self) -> int:
        return len(self._sequences)

    def execute(self, plan: BatchPlan) -> StepOutput:
        """Run one step: all rows' keys and values are in the pool and its tokens are known on return."""
        return self.begin(plan).read()

    def begin(self, plan: BatchPlan) -> BegunStep:
        """Ask the device for one step. It waits for the device only where prompts are scored; steps may be
        begun before the one before has been read, unless that feeds back."""
        for seq_id in plan.released:
            self._sequences.release(seq_id)
        for new in plan.new:
            self._sequences.add(new)
        if not plan.entries:
            return BegunStep([])
        with torch.inference_mode():
            if plan.streams:
                assert self._loads is not None
                self._loads.begin(plan.streams)
            inputs = self._inputs.build(plan, may_fuse=(plan.way or self._hole_way) == "fused")
            hidden = self._hidden(plan, inputs)
            prompt_logprobs = self._score_prompts(plan, inputs, hidden)
            return self._sample(plan, inputs, hidden, prompt_logprobs)

    def _hidden(self, plan: BatchPlan, inputs: StepInputs) -> Tensor:
        """Final hidden states of the rows that keep the LM head: [n, E]."""
        if self._graphs is not None:
            hidden = self._graphs.hidden(plan, inputs)
            if hidden is not None:
                return hidden
        if plan.entries[-1].recompute and (plan.way or self._hole_way) == "ahead":
            chosen = sides(plan, self._cache.num_blocks, self._cache.block_size)
            if chosen is not None:
                return self._hidden_ahead(plan, inputs, chosen)
        if self._overlap_rows is not None and plan.num_rows >= self._overlap_rows:
            chosen = split(plan.entries)
            if chosen is not None:
                return self._hidden_of_halves(plan, inputs, chosen)
        attend = self._attention(plan, inputs.meta, self._loads_of(plan))
        if self._pieces is not None:
            hidden = self._pieces.hidden(inputs, attend)
            if hidden is not None:
                return hidden
        computation = self._model.forward(inputs.token_ids, inputs.meta.positions, inputs.rows)
        return run(computation, self._communicator, attend)

    def _hidden_of_halves(self, plan: BatchPlan, inputs: StepInputs, chosen: Ints) -> Tensor:
        (first, second), order = self._inputs.halves(plan, inputs, chosen)
        # The first is ahead by one sum: it asks for a layer's streams when both have computed the one before.
        attends = (
            self._attention(plan, first.meta, self._loads_of(plan)),
            self._attention(plan, second.meta, None),
        )
        halves = self._computation(first), self._computation(second)
        both = run_halves(halves, self._communicator, attends)
        return torch.cat(both).index_select(0, order)

    def _hidden_ahead(self, plan: BatchPlan, inputs: StepInputs, chosen: Ints) -> Tensor:
        """No row of a hole keeps the LM head: the others' results are all, in their order."""
        (others, again), _ = self._inputs.halves(plan, inputs, chosen)
        return run_ahead(
            (self._computation(others), self._attention(plan, others.meta, self._loads_of(plan))),
            (self._computation(again), self._attention(plan, again.meta, None)),
            self._cache.num_layers,
            self._lanes,
            self._communicator,
        )

    def _loads_of(self, plan: BatchPlan) -> LayerLoads | None:
        return self._loads if plan.streams else None

    def _computation(self, half: Half) -> Computation:
        return self._model.forward(half.token_ids, half.meta.positions, half.rows)

    def _attention(self, plan: BatchPlan, meta: AttentionMeta, loads: LayerLoads | None) -> PoolAttention:
        return PoolAttention(self._ops, self._layer_steps(plan, meta, loads))

    def _layer_steps(
        self, plan: BatchPlan, meta: AttentionMeta, loads: LayerLoads | None
    ) -> Iterable[LayerStep]:
        """A plan names transient blocks only where something fills them."""
        if plan.streams or plan.entries[-1].recompute:
            return layer_steps(self._cache, meta, loads)
        return [(meta, kv) for kv in self._cache.layers]

    def _sample(
        self, plan: BatchPlan, inputs: StepInputs, hidden: Tensor, prompt_logprobs: PromptScores | None
    ) -> BegunStep:
        sampling = [(e, s) for e, s in zip(plan.entries, inputs.states, strict=True) if e.samples]
        if not sampling:
            return BegunStep(sampling, ToHost((), hidden.device), None, prompt_logprobs)
        if inputs.sample_rows is not None:
            hidden = hidden.index_select(0, inputs.sample_rows)
        states = [state for _, state in sampling]
        scores = None
        if all(state.plain for state in states):
            tokens = self._model.likeliest(hidden)
        else:
            logits = self._model.logits(hidden)
            tokens = self._sampler.sample(logits, states, [entry.output_index for entry, _ in sampling])
            scores = self._sampler.logprobs(logits, tokens, states)
        self._inputs.remember(states, tokens)
        return BegunStep(sampling, ToHost((tokens,), tokens.device), scores, prompt_logprobs)

    def _score_prompts(self, plan: BatchPlan, inputs: StepInputs, hidden: Tensor) -> PromptScores | None:
        """Row i of a chunk scores the prompt token at position start + i + 1, where there is one."""
        if not inputs.scored:
            return None
        scores = {}
        for index, first, count in inputs.scored:
            entry, state = plan.entries[index], inputs.states[index]
            next_ids = state.prompt_ids[entry.start + 1 : entry.start + 1 + count]
            num_top = state.sampling.prompt_logprobs or 0
            rows = hidden[first : first + len(next_ids)]
            scores[entry.seq_id] = self._sampler.score_prompt(self._model, rows, next_ids, num_top)
        return scores
