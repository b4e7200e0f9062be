"""Choosing tokens in plain torch: bias, penalties, cutoffs and Gumbel-max, a whole batch at once.

Order and ties, which every body keeps:
  1. logits in float32; bias is added; then penalties: repetition (divide a positive logit, multiply another),
     then output_count * frequency and, where the count is not 0, presence are taken off; then tokens that a
     row's mask does not allow go to -inf;
  2. a row of temperature 0 takes the largest logit, the lowest id of equals;
  3. others: z = (logit - largest) / temperature; tokens in order of (z falling, id rising); top-k keeps the
     first k; top-p keeps a token while the mass of those before it, of what top-k kept, is below top_p (so at
     least one stays); min-p keeps exp(z) >= min_p, relative to the most likely token;
  4. of what is kept, the largest z + gumbel(seed, choice, output index, token id), the lowest id of equals.
A token at -inf is never chosen while another is finite. NaN in the logits is the model's failure: that row is
undefined, others are not touched.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ellm.kernels import noise
from ellm.kernels.ops import SamplingBatch

NEG_INF = float("-inf")
NOISE_CHUNK = 1 << 21  # logits whose noise is made at once: float64 temporaries stay small


def adjust_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Bias, penalties and masks: logits [S, V] -> [S, V], a float32 copy where there are any."""
    if batch.bias is None and batch.penalty_ids is None and batch.masks is None:
        return logits
    out = logits.float()
    if out is logits:
        out = out.clone()
    if batch.bias is not None:
        assert batch.bias_row is not None
        assert batch.bias_ids is not None
        out.index_put_((batch.bias_row, batch.bias_ids), batch.bias, accumulate=True)
    if batch.penalty_ids is not None:
        _penalise(out, batch)
    if batch.masks is not None:
        assert batch.mask_row is not None
        banned = ~unpack(batch.masks, out.shape[1])
        if len(banned) == len(out):  # all rows, in their order
            out.masked_fill_(banned, NEG_INF)
        else:
            out[batch.mask_row] = out[batch.mask_row].masked_fill_(banned, NEG_INF)
    return out


def unpack(masks: Tensor, vocab_size: int) -> Tensor:
    """Bits of masks [M, ceil(V / 32)] int32 -> bool [M, V]."""
    if masks.device.type == "cpu":
        octets = masks.numpy().view(np.uint8)
        return torch.from_numpy(
            np.unpackbits(octets, axis=1, count=vocab_size, bitorder="little").view(np.bool_)
        )
    shifts = torch.arange(32, dtype=torch.int32, device=masks.device)
    bits = (masks.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :vocab_size].bool()


def _penalise(logits: Tensor, batch: SamplingBatch) -> None:
    cu, ids, counts = batch.penalty_cu, batch.penalty_ids, batch.penalty_output_counts
    assert cu is not None
    assert ids is not None
    assert counts is not None
    rows = torch.arange(len(cu) - 1, device=ids.device)
    rows = torch.repeat_interleave(rows, cu[1:] - cu[:-1], output_size=len(ids))
    values = logits[rows, ids]
    if batch.repetition is not None:
        factor = batch.repetition[rows]
        values = torch.where(values > 0, values / factor, values * factor)
    if batch.frequency is not None:
        values = values - batch.frequency[rows] * counts
    if batch.presence is not None:
        values = values - batch.presence[rows] * (counts > 0)
    logits[rows, ids] = values


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """logits [S, V] -> token ids [S] int64."""
    logits = adjust_logits(logits, batch).float()
    greedy = torch.argmax(logits, dim=-1)
    if batch.temperature is None or len(greedy) == 0:
        return greedy
    drawn = batch.temperature > 0
    peak = logits.amax(-1, keepdim=True)
    temperature = torch.where(drawn, batch.temperature, 1.0).unsqueeze(1)
    scaled = (logits - peak) / temperature
    scaled = torch.where(logits == NEG_INF, NEG_INF, scaled)  # -inf - -inf is NaN
    scaled = _cut(scaled, batch)
    return torch.where(drawn, _gumbel_argmax(scaled, batch), greedy)


def _cut(scaled: Tensor, batch: SamplingBatch) -> Tensor:
    """Put -inf where top-k, top-p or min-p drop a token of scaled [S, V] (row maximum 0)."""
    if batch.top_k is not None or batch.top_p is not None:
        ordered, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if batch.top_k is not None:
            limit = torch.where(batch.top_k > 0, batch.top_k, scaled.shape[1]).unsqueeze(1)
            keep = torch.arange(scaled.shape[1], device=scaled.device) < limit
        if batch.top_p is not None:
            mass = torch.where(keep, ordered.double().exp(), 0.0)
            before = mass.cumsum(-1) - mass
            top_p = batch.top_p.double().unsqueeze(1)
            within = (before < top_p * mass.sum(-1, keepdim=True)) | (top_p >= 1)
            within[:, 0] = True
            keep = keep & within
        scaled = scaled.masked_fill(~torch.empty_like(keep).scatter_(1, ids, keep), NEG_INF)
    if batch.min_p is not None:
        scaled = scaled.masked_fill(scaled.exp() < batch.min_p.unsqueeze(1), NEG_INF)
    return scaled


def _gumbel_argmax(scaled: Tensor, batch: SamplingBatch) -> Tensor:
    assert batch.seeds is not None
    assert batch.choice_index is not None
    assert batch.output_index is not None
    keys = noise.row_keys(batch.seeds, batch.choice_index, batch.output_index).unsqueeze(1)
    token_ids = torch.arange(scaled.shape[1], device=scaled.device)
    rows = max(1, NOISE_CHUNK // scaled.shape[1])
    picks = [
        torch.argmax(scaled[i : i + rows].double() + noise.gumbel(keys[i : i + rows], token_ids), dim=-1)
        for i in range(0, scaled.shape[0], rows)
    ]
    return torch.cat(picks)


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """Log-probabilities of logits [S, V]: of token_ids [S], their ranks [S], and the top ids and values."""
    logits = logits.float()
    norm = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    ids = torch.arange(logits.shape[1], device=logits.device)
    above = (logits > chosen) | ((logits == chosen) & (ids < token_ids.unsqueeze(1)))
    tops = top_ids(logits, min(num_top, logits.shape[1]))
    top = logits.gather(1, tops) - norm.unsqueeze(1)
    return chosen.squeeze(1) - norm, above.sum(-1) + 1, tops, top


def top_ids(logits: Tensor, num_top: int) -> Tensor:
    """[S, V] float32 -> ids [S, num_top] in order of (value falling, id rising)."""
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0: the two zeros are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the floats
    ids = torch.arange(logits.shape[1], device=logits.device)
    key = (ordered << 32) | (0xFFFFFFFF - ids)
    return 0xFFFFFFFF - (torch.topk(key, num_top, dim=-1).values & 0xFFFFFFFF)
