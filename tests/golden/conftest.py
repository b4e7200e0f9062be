"""The checkpoints that golden tests share: made once per run, by name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from support.checkpoints import write_checkpoint
from support.golden import CASES, RANK_CASES, Checkpoint
from support.ranks import RankPool


@pytest.fixture(scope="session", autouse=True)
def _cheap_collections() -> Iterator[None]:
    """Executors collect garbage as they come and go: what was imported by now need not be looked at again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """name of CASES or RANK_CASES -> (folder, what transformers reads from it, in float32)."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            family, overrides = (CASES | RANK_CASES)[name]
            write_checkpoint(folder, family, **overrides)
            shards = list(folder.glob("model-*.safetensors"))
            assert len(shards) > 2 or "max_shard_size" not in overrides
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            made[name] = folder, model.eval()
        return made[name]

    return get


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four ranks, three of them processes of their own."""
    pool = RankPool(4)
    yield pool
    pool.close()
