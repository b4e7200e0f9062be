"""One JSON line in, one out.

`{"prompts": [[ids]], "max_tokens": n}` -> `{"elapsed_s", "tokens": [[ids]], "peak_bytes": [each process]}`

Standard library only: peers run this file with their own interpreter, by path.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# The real standard output is kept for answers from the first moment: engines print while they are imported.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

Generate = Callable[[list[list[int]], int], list[list[int]]]


def peak_bytes() -> list[int]:
    """Peak resident memory of this process and each of its descendants, the largest first."""
    peaks, todo = [], [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
    return sorted(peaks, reverse=True)


def serve(generate: Generate, note: str = "") -> None:
    """Answer requests until standard input ends."""
    print(json.dumps({"ready": True, "note": note}), file=ANSWERS)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        tokens = generate(request["prompts"], request["max_tokens"])
        elapsed = time.perf_counter() - start
        assert all(len(ids) == request["max_tokens"] for ids in tokens), [len(ids) for ids in tokens]
        print(json.dumps({"elapsed_s": elapsed, "tokens": tokens, "peak_bytes": peak_bytes()}), file=ANSWERS)
