"""From which ends a missing stretch is filled."""

from __future__ import annotations

import pytest

from ellm.worker.engine.planner.restore_path import RestorePath, restore_path


@pytest.mark.parametrize(
    ("computed_per_s", "loaded_per_s", "path"),
    [
        (1000.0, 1000.0, RestorePath.BOTH),
        (120.0, 1000.0, RestorePath.BOTH),
        (100.0, 1000.0, RestorePath.LOAD),
        (0.0, 1000.0, RestorePath.LOAD),
        (1000.0, 120.0, RestorePath.BOTH),
        (1000.0, 100.0, RestorePath.COMPUTE),
        (1000.0, 0.0, RestorePath.COMPUTE),
    ],
)
def test_an_end_that_gains_less_than_a_tenth_is_left_out(
    computed_per_s: float, loaded_per_s: float, path: RestorePath
) -> None:
    assert restore_path(computed_per_s, loaded_per_s) is path
