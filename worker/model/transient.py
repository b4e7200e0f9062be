"""Steps with transient blocks: what each layer's kernels are handed, and streamed blocks loaded in time.

A transient block has one id, and a place per bank. Kernels know nothing of this: per layer they get a view
of the pool that begins with the layer's own blocks, and tables whose transient ids are moved to its bank.

    layer        0          1          2          3
    bank         0          1          0          1
    load begins  with the step         with 1     with 2

The load of layer l + 2 begins when layer l + 1 does: layer l has then read the bank that it overwrites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from ellm.kernels.ops import AttentionMeta
from ellm.worker.engine.plan import StreamedBlock
from ellm.worker.model.host_pool import HostPool
from ellm.worker.model.kv_cache import NUM_BANKS, KVCache
from ellm.worker.model.layers import LayerStep


class LayerLoads(Protocol):
    """The streamed blocks of one step, loaded layer by layer beside the computation."""

    def begin(self, streams: Sequence[StreamedBlock]) -> None:
        """Start with the first layers. All that was computed before has been asked for."""
        ...

    def ready(self, layer: int) -> None:
        """The computation of `layer` is about to be asked for, that of the layer before has been: see to it
        that its blocks are there first, and go on with a later layer's."""
        ...

    def close(self) -> None:
        """No call may follow."""
        ...


class ThreadLoads:
    """By a thread of its own, on a CPU."""

    def __init__(self, host: HostPool, num_layers: int) -> None:
        self._host = host
        self._num_layers = num_layers
        self._thread = ThreadPoolExecutor(1, "kv-stream")
        self._streams: Sequence[StreamedBlock] = ()
        self._loads: list[Future[None]] = []

    def begin(self, streams: Sequence[StreamedBlock]) -> None:
        self._streams = streams
        self._loads.clear()
        for _ in range(NUM_BANKS):
            self._load_next()

    def ready(self, layer: int) -> None:
        if layer:
            self._load_next()
        if self._streams:
            self._loads[layer].result()

    def close(self) -> None:
        self._thread.shutdown()

    def _load_next(self) -> None:
        layer = len(self._loads)
        if self._streams and layer < self._num_layers:
            self._loads.append(self._thread.submit(self._host.stream, self._streams, layer))


def layer_steps(cache: KVCache, meta: AttentionMeta, loads: LayerLoads | None) -> Iterator[LayerStep]:
    """What each layer works on in a step whose block ids may be transient, in order. Each is used before the
    next is asked for."""
    limit, size = cache.num_blocks, cache.block_size
    moved_tables = (meta.block_tables >= limit).to(torch.int32)
    moved_slots = (meta.slot_mapping >= limit * size).to(torch.int64)
    for layer in range(cache.num_layers):
        if loads is not None:
            loads.ready(layer)
        shift = cache.transient_shift(layer)
        tables = torch.add(meta.block_tables, moved_tables, alpha=shift)
        slots = torch.add(meta.slot_mapping, moved_slots, alpha=shift * size)
        yield dataclasses.replace(meta, block_tables=tables, slot_mapping=slots), cache.from_layer(layer)
