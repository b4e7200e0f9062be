"""A worker's memory does not grow with every number of rows that it meets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ellm.worker.primitive_cache import VARIABLES

PROGRAM = """
from ellm.worker.primitive_cache import bound_primitive_caches
if {bound}:
    bound_primitive_caches()
import psutil, torch
from ellm.kernels.packed_linear import PackedLinear
layers = [PackedLinear(torch.randn(512, 256 + 16 * i), None) for i in range(4)]
for layer in layers:
    layer(torch.ones(300, layer.in_features))
before = psutil.Process().memory_info().rss
for rows in range(2, 202):
    for layer in layers:
        layer(torch.ones(rows, layer.in_features))
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


@pytest.mark.needs_platform("linux")
def test_routines_of_old_shapes_go() -> None:
    grown_mib = {}
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    for bound in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(bound=bound)],
            capture_output=True, text=True, timeout=120, check=True, env=env,
        )  # fmt: skip
        grown_mib[bound] = float(done.stdout)
    assert grown_mib[True] < 0.6 * grown_mib[False], grown_mib
