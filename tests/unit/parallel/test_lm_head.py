"""The likeliest token of a vocabulary that several ranks share is that of the whole, ties included."""

from __future__ import annotations

import pytest
import torch
from support.group_threads import ranks

from ellm.kernels.reference import TorchOps
from ellm.worker.model.layers import LmHead
from ellm.worker.parallel.communicator import make_communicator
from ellm.worker.parallel.group import Group

ROWS = {2: 5, 3: 4}  # of ten, padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_the_likeliest_token(size: int, dtype: torch.dtype) -> None:
    logits = torch.full((6, 10), -5.0)  # all below the padding's 0
    for row, ids in enumerate([(9,), (0,), (3, 4), (4, 9), (2, 8), (7,)]):
        logits[row, list(ids)] = -1.0
    weight = torch.zeros(ROWS[size] * size, 10, dtype=dtype)
    weight[:10] = torch.eye(10)

    def act(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        rows = ROWS[size]
        communicator = make_communicator(group, torch.device("cpu"), ordered=True)
        own = weight[group.rank * rows : (group.rank + 1) * rows]
        head = LmHead(TorchOps(), own, 10, communicator)
        return head.likeliest(logits.to(dtype)), head(logits.to(dtype))

    with ranks(size, act) as (group, others):
        results = [act(group), *(other.result(30) for other in others)]
    for ids, joined in results:
        assert ids.tolist() == [9, 0, 3, 4, 2, 7]
        assert torch.equal(joined, logits.to(dtype))
