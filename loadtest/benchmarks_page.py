"""Generate docs/benchmarks.md from the result files: no number on that page is typed by hand.

    python -m ellm.loadtest.benchmarks_page [--check]

The newest file of each benchmark is shown. What we lose stands first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from ellm.loadtest.result import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

This page is generated from `loadtest/results/*.json` by `python -m ellm.loadtest.benchmarks_page`; the raw
values of every run stand in those files. Each comparison ran both sides in turn in the same run, on the same
cores, with the same checkpoint and the same number of emitted tokens; a figure is the median, and a ratio is
the median of the ratios within one round. Machines are noisy: ratios hold, absolute figures do not.
"""


def newest_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The last file of each benchmark by date, sorted by name; each with its file's name in `file`."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        result["file"] = path.name
        newest[result["name"]] = result
    return [newest[name] for name in sorted(newest)]


def cell(value: Any) -> str:
    """A number in three or four significant digits, anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of flat dicts; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return lines


def losses(results: list[dict[str, Any]]) -> list[str]:
    """Every row whose ratio is under 1, the worst first."""
    rows: list[tuple[float, str]] = []
    for result in results:
        for row in result["rows"]:
            against = row.get("against", "the baseline")
            for key in ("ratio", *(key for key in row if key.startswith("ratio "))):
                ratio = row.get(key)
                if isinstance(ratio, float) and ratio < 1.0:
                    part = key.removeprefix("ratio").strip()
                    about = f"{part}, {what(row)}" if part else what(row)
                    rows.append((ratio, f"- {cell(ratio)}x {against}: {about} ({result['title']})"))
    if not rows:
        return []
    return ["", "## Where we lose", "", *[line for _, line in sorted(rows)]]


def what(row: dict[str, Any]) -> str:
    """The row's settings: its fields that are no measurement."""
    return ", ".join(
        f"{key} {value}"
        for key, value in row.items()
        if key != "against"
        and "MiB" not in key
        and (isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)))
    )


def strict_cost(rows: list[dict[str, Any]]) -> list[str]:
    """What bitwise reproducibility costs, from the columns whose name begins with STRICT / FAST."""
    lines = []
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("STRICT / FAST")):
        found = [(row[key], what(row)) for row in rows if key in row]
        worst, where = min(found)
        middle = statistics.median(share for share, _ in found)
        lines.append(f"- {key}: {cell(middle)} in the median of its rows, {cell(worst)} at worst ({where})")
    return lines


def section(result: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    lines = ["", f"## {result.get('title', result['name'])}", ""]
    if result.get("about"):
        lines += [result["about"], ""]
    lines += [f"`{result['command']}`", "", *table(result["rows"])]
    lines += ["", *strict_cost(result["rows"]), *[f"- {note}" for note in result.get("notes", [])]]
    lines += [
        f"- {result['date']}, commit {result['commit']}, seed {result['seed']}, {result['device']}; "
        f"{versions}; raw values in `loadtest/results/{result['file']}`"
    ]
    return lines


def render(results: list[dict[str, Any]]) -> str:
    lines = [HEAD.rstrip(), *losses(results)]
    for result in results:
        lines += section(result)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate docs/benchmarks.md from the result files.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when the page is stale")
    arguments = parser.parse_args()
    page = render(newest_results())
    if arguments.check:
        if not PAGE.exists() or PAGE.read_text() != page:
            print("docs/benchmarks.md is stale: run python -m ellm.loadtest.benchmarks_page", file=sys.stderr)
            return 1
        return 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    print(f"wrote docs/benchmarks.md from {len(newest_results())} results")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
