"""A soak offers the same in each third, and what it reads of a process's memory is there."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from ellm.loadtest.processes import process_memory
from ellm.loadtest.sim.traces import read_trace
from ellm.loadtest.soak_load import THIRDS, repeated, write_thirds

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MIB = 1 << 20


def test_each_third_is_the_first(tmp_path: Path) -> None:
    trace, target = tmp_path / "trace.csv", tmp_path / "thirds.csv"
    trace.write_text(
        HEAD + "".join(f"2023-11-16 18:15:{4 * i:02}.0000000,{100 + i},{10 + i}\n" for i in range(6))
    )
    own = read_trace(trace)
    write_thirds(repeated(own, 4, third_s=32.0), target)
    rows = read_trace(target)
    assert [row.arrival_s for row in rows] == [8.0 * i for i in range(THIRDS * 4)]
    assert [(row.prompt_tokens, row.output_tokens) for row in rows[4:8]] == [
        (row.prompt_tokens, row.output_tokens) for row in own[:4]
    ]
    together = repeated(own, 4, third_s=32.0, gather_s=16.0)
    assert [row.arrival_s for row in together[:6]] == [16.0, 16.0, 32.0, 32.0, 48.0, 48.0]


@pytest.mark.needs_platform("linux")
def test_memory_is_held_and_a_file_is_only_resident(tmp_path: Path) -> None:
    before = process_memory(os.getpid())
    assert 0 < before.held_bytes < before.resident_bytes
    own = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(own), mmap.PAGESIZE):
        own[at] = 1
    with_own = process_memory(os.getpid())
    assert with_own.held_bytes - before.held_bytes > 56 * MIB
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        assert not any(pages[at] for at in range(0, len(pages), mmap.PAGESIZE))
        with_file = process_memory(os.getpid())
    assert with_file.resident_bytes - with_own.resident_bytes > 56 * MIB
    assert with_file.held_bytes - with_own.held_bytes < 8 * MIB
    own.close()
    assert process_memory(2**30).resident_bytes == 0
