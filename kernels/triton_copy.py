"""KV blocks from one array to another in one Triton launch: gather, scatter, to and from pinned memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ellm.kernels.triton_floats import OPTIONS

WORDS = 2048  # of 4 bytes: a program's share of one block of one layer


@triton.jit(do_not_specialize=["num_words"])
def kv_copy_kernel(
    source,
    target,
    pairs,  # [n, 2] int64: block of the source, block of the target
    source_layer,
    source_half,
    source_block,
    target_layer,
    target_half,
    target_block,
    num_words,
    WORDS: tl.constexpr,
):
    """Grid: (pairs, layers times 2, parts of a block). Strides are in words."""
    pair = tl.program_id(0)
    layer, half = (tl.program_id(1) // 2).to(tl.int64), (tl.program_id(1) % 2).to(tl.int64)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    mine = word < num_words
    block = tl.load(pairs + 2 * pair)
    at = source + layer * source_layer + half * source_half + block * source_block
    value = tl.load(at + word, mask=mine)
    block = tl.load(pairs + 2 * pair + 1)
    at = target + layer * target_layer + half * target_half + block * target_block
    tl.store(at + word, value, mask=mine)


def _as_words(*arrays: Tensor) -> list[Tensor]:
    """Arrays [L, 2, N, K, B, D] as [L, 2, N, words], the same memory: words of 4 bytes where all of them
    allow it, else of 2."""
    flat = [blocks.flatten(3) for blocks in arrays]
    units = [(x.storage_offset(), x.shape[3], *x.stride()[:3]) for x in flat]
    size = flat[0].element_size()
    wide = all(count * size % 4 == 0 for unit in units for count in unit)
    return [x.view(torch.int32 if wide else torch.int16) for x in flat]


def kv_copy(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """target[:, :, pairs[i, 1]] = source[:, :, pairs[i, 0]], bits as they are.

    Arrays [L, 2, *, K, B, D] whose last three dimensions lie together, on the device or in pinned memory;
    pairs [n, 2] int64.
    """
    assert source.dtype == target.dtype
    assert source.shape[:2] == target.shape[:2]
    assert source.shape[3:] == target.shape[3:]
    assert pairs.is_contiguous()
    if len(pairs) == 0 or source.numel() == 0:
        return
    source, target = _as_words(source, target)
    layers, num_words = source.shape[0], source.shape[3]
    kv_copy_kernel[(len(pairs), 2 * layers, triton.cdiv(num_words, WORDS))](
        source,
        target,
        pairs,
        *source.stride()[:3],
        *target.stride()[:3],
        num_words,
        WORDS=WORDS,
        **OPTIONS,
    )
