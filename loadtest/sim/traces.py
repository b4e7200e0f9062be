"""Public request traces, told apart by their columns.

Azure LLM inference   CSV    TIMESTAMP, ContextTokens, GeneratedTokens
BurstGPT              CSV    Timestamp (seconds), ..., Request tokens, Response tokens, ...
Mooncake              JSONL  timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from ellm.worker.api.errors import ConfigError

MOONCAKE_STRETCH = 512  # tokens that one hash id stands for

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST = ("Timestamp", "Request tokens", "Response tokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """A request that somebody sent once."""

    arrival_s: float  # since the first row
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    stretch: int = 0  # tokens per hash id


def read_trace(path: Path) -> list[TraceRow]:
    """All rows that have a prompt and an output, by arrival. Raises ConfigError for any other file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = list(_read_json(file) if first.lstrip().startswith("{") else _read_csv(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="workload") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not a row of a known trace: {error!r}", param="workload") from error
    rows = sorted((r for r in rows if r.prompt_tokens > 0 and r.output_tokens > 0), key=lambda r: r.arrival_s)
    if not rows:
        raise ConfigError(f"{path} holds no request with a prompt and an output", param="workload")
    start = rows[0].arrival_s
    return [
        TraceRow(r.arrival_s - start, r.prompt_tokens, r.output_tokens, r.hash_ids, r.stretch) for r in rows
    ]


def _read_csv(file: TextIO) -> Iterator[TraceRow]:
    reader = csv.DictReader(file)
    columns = set(reader.fieldnames or ())
    if columns.issuperset(_AZURE):
        for row in reader:
            time = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield TraceRow(time, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    elif columns.issuperset(_BURST):
        for row in reader:
            yield TraceRow(
                float(row["Timestamp"]), int(float(row["Request tokens"])), int(float(row["Response tokens"]))
            )
    else:
        names = " or ".join(str(columns) for columns in (_AZURE, _BURST))
        raise ValueError(f"the columns {sorted(columns)} are neither of {names}")


def _read_json(file: TextIO) -> Iterator[TraceRow]:
    for line in file:
        if line.strip():
            row = json.loads(line)
            time, prompt, output = (row[key] for key in _MOONCAKE)
            hash_ids = tuple(row.get("hash_ids", ()))
            yield TraceRow(time / 1000, int(prompt), int(output), hash_ids, MOONCAKE_STRETCH)
