"""What the results of a GPU say of the aims: one line for each, and one JSON file.

    python -m ellm.loadtest.gpu.summary FOLDER

Files that should be there and are not are said, too. The exit code is 0 unless there is no result at all:
what a figure falls short of is a finding, what is wrong has failed its own script.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

EXPECTED = (
    *("attention", "fusion", "kernels", "graphs", "host_copies", "steps", "ablation"),
    *("strict", "strict-model", "strict-switches", "starved", "starved-sweep"),
    *("engine-qwen3-0.6b", "engine-llama-3-8b"),
)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> what its file holds."""
    return {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in EXPECTED
        if (folder / f"{name}.json").exists()
    }


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    said = []
    for name, result in results.items():
        for one in result.get("aims", ()):
            word = "met   " if one["met"] else "MISSED"
            said.append(f"{word} {name}: {one['what']}: {one['figure']:.4g}, at least {one['least']:.4g}")
        said += [f"note   {name}: {note}" for note in result.get("notes", ()) if note]
    return said + [f"absent {name}" for name in EXPECTED if name not in results]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    results = read(folder)
    said = lines(results)
    print("\n".join(said))
    if not results:
        return 1
    about = ("device", "torch", "triton", "cuda", "date", "commit")
    first = next(iter(results.values()))
    summary = {key: first.get(key) for key in about} | {"lines": said}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
