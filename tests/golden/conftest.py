"""The checkpoints that golden tests share: made once per run, by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.checkpoints import write_checkpoint
from support.golden import CASES, Checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """name of CASES -> (folder, the float32 model that was written to it)."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            family, overrides = CASES[name]
            made[name] = folder, write_checkpoint(folder, family, **overrides)
        return made[name]

    return get
