"""The result as JSON: summary, every request, the timeline, and what was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.run import Run
from ellm.loadtest.generator.summary import summarise
from ellm.loadtest.generator.timeline import timeline
from ellm.worker.api.errors import ConfigError

FORMAT = 1
_DIGITS = 6  # microseconds


def result_of(run: Run) -> dict[str, Any]:
    """Everything, as plain data. Keys and headers stay out of it."""
    options = asdict(run.options)
    options.pop("api_key")
    options["headers"] = sorted(options["headers"])
    if options["rate"] is not None and math.isinf(options["rate"]):
        options["rate"] = "inf"  # JSON knows no infinity
    measured = [record for record in run.records if not record.warmup]
    return {
        "format": FORMAT,
        "summary": summarise(run.records, run.options.slo),
        "target": {
            "url": run.target.url,
            "endpoint": run.target.endpoint,
            "model": run.target.model,
            "server": run.target.server,
        },
        "options": options,
        "started_at": datetime.fromtimestamp(run.started_at, UTC).isoformat(timespec="milliseconds"),
        "processes": run.processes,
        "generator_cpu_s": run.cpu_s,
        "interrupted": run.interrupted,
        "timeline": timeline(run.records),
        "workers": run.workers,
        "requests": [request_row(record) for record in measured],
    }


def request_row(record: Record) -> dict[str, Any]:
    """One request. Times are seconds since the start of the run, durations count from `due_s`."""
    done = bool(record.chunk_times)
    first = record.first_s
    return {
        "index": record.index,
        "session": record.session,
        "turn": record.turn,
        "outcome": record.outcome,
        "error": record.error,
        "status": record.status,
        "finish_reason": record.finish_reason,
        "due_s": round(record.due_s, _DIGITS),
        "sent_s": round(record.sent_s, _DIGITS),
        "end_s": round(record.end_s, _DIGITS),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "planned_prompt_tokens": record.planned_prompt_tokens,
        "planned_output_tokens": record.planned_output_tokens,
        "ttft_s": round(record.ttft_s, _DIGITS) if done else None,
        "tpot_s": round(record.tpot_s, _DIGITS) if record.output_tokens > 1 and done else None,
        "e2e_s": round(record.e2e_s, _DIGITS),
        "chunk_offsets_s": [round(time - first, _DIGITS) for time in record.chunk_times],
        "chunk_tokens": list(record.chunk_tokens),
    }


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """Raises ConfigError."""
    try:
        Path(path).write_text(json.dumps(result, separators=(",", ":")) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: str) -> dict[str, Any]:
    """A result that `write_json` wrote. Raises ConfigError."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(result, dict) or "summary" not in result or "requests" not in result:
        raise ConfigError(f"{path} is no result of `ellm bench --json` (of one run)")
    return result
