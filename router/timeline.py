"""What became of each request, event by event, for the last of them: `/admin/requests/{id}`, and one line of
the log each.

    queued      it came to this router
    sent        to a worker, which is named
    prefill     the worker has let it in and computes the prompt
    first_token, parked, resumed, restored, recomputed, preempted
    moved       to another worker, and why
    done        how it ended

A worker tells of its part with the outputs that it sends anyway (worker/api/output.py), and only of what is
not usual; times are of this router's clock, a worker's durations added to when the request went there.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from ellm.worker.api.json_log import FIELDS, REQUEST_ID

if TYPE_CHECKING:
    from ellm.router.generation import Generation
    from ellm.router.sequence import Sequence

log = logging.getLogger(__name__)

SIZE = 2048  # requests that are remembered
MAX_CHOICES = 16  # of one request that are kept


@dataclass(slots=True)
class Entry:
    """One request. While it lives its sequences are looked at; then what they were is kept."""

    request_id: str
    model: str
    tenant: str
    arrived_at: float
    arrived: float  # wall clock
    generation: Generation | None
    choices: list[dict[str, Any]] = field(default_factory=list)
    took_s: float = 0.0


class Timelines:
    """The last requests of one router, of all its models."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, size: int = SIZE) -> None:
        self._clock = clock
        self._size = size
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def begin(self, model: str, generation: Generation) -> Entry:
        """Follow a request; its id is that of the call that is being served."""
        now = self._clock()
        arrived_at = generation.arrived_at
        entry = Entry(
            REQUEST_ID.get(),
            model,
            generation.tenant,
            arrived_at,
            time.time() - (now - arrived_at),
            generation,
        )
        self._entries[entry.request_id] = entry
        self._entries.move_to_end(entry.request_id)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return entry

    def end(self, entry: Entry) -> None:
        """Its sequences have ended: let go of them, and say so."""
        if entry.generation is None:
            return
        entry.took_s = self._clock() - entry.arrived_at
        sequences = entry.generation.sequences
        entry.choices = [choice(sequence) for sequence in sequences[:MAX_CHOICES]]
        entry.generation = None
        if log.isEnabledFor(logging.INFO):
            _say(entry, sequences)

    def find(self, request_id: str) -> bytes | None:
        """As JSON; None where it is not known, or not any more."""
        entry = self._entries.get(request_id)
        return None if entry is None else orjson.dumps(self._shown(entry))

    def _shown(self, entry: Entry) -> dict[str, Any]:
        alive = entry.generation
        return {
            "request_id": entry.request_id,
            "model": entry.model,
            "tenant": entry.tenant,
            "arrived": datetime.fromtimestamp(entry.arrived, UTC).isoformat(timespec="milliseconds"),
            "state": "done" if alive is None else "running",
            "duration_s": round(entry.took_s if alive is None else self._clock() - entry.arrived_at, 6),
            "choices": entry.choices if alive is None else list(map(choice, alive.sequences[:MAX_CHOICES])),
        }

    def latest(self, count: int) -> list[dict[str, Any]]:
        """The newest first, without their events."""
        newest = map(self._shown, list(self._entries.values())[: -count - 1 : -1])
        return [{k: v for k, v in one.items() if k != "choices"} for one in newest]


def choice(sequence: Sequence) -> dict[str, Any]:
    """One sequence of a request."""
    begun = sequence.arrived_at
    worker = next((detail for _, what, detail in reversed(sequence.events) if what == "sent"), None)
    return {
        "index": sequence.index,
        "worker": worker,
        "num_prompt_tokens": len(sequence.prompt_ids),
        "num_cached_tokens": sequence.num_cached_tokens,
        "num_output_tokens": len(sequence.output_ids),
        "num_moves": sequence.num_moves,
        "finish_reason": sequence.finished,
        "first_token_s": round(sequence.first_token_at - begun, 6) if sequence.first_token_at else None,
        "events": [
            {"at_s": round(max(0.0, at - begun), 6), "event": what, "detail": detail}
            for at, what, detail in events(sequence)
        ],
    }


def events(sequence: Sequence) -> list[tuple[float, str, str]]:
    """In order of time, with those that are known without having been noted."""
    found = [(sequence.arrived_at, "queued", ""), *sequence.events]
    if first := sequence.first_token_at:
        sent = [at for at, what, _ in sequence.events if what == "sent" and at <= first]
        if sent:
            cached = sequence.num_cached_tokens
            detail = f"{cached} of {len(sequence.prompt_ids)} tokens cached" if cached else ""
            found.append((min(first, sent[-1] + sequence.queue_time_s), "prefill", detail))
        found.append((first, "first_token", ""))
    return sorted(found, key=lambda event: event[0])


def _say(entry: Entry, sequences: Seq[Sequence]) -> None:
    reasons = ",".join(sorted({str(sequence.finished) for sequence in sequences})) or "refused"
    first = [s.first_token_at - s.arrived_at for s in sequences if s.first_token_at]
    fields = {
        "request_id": entry.request_id,
        "model": entry.model,
        "tenant": entry.tenant,
        "finish_reason": reasons,
        "num_choices": len(sequences),
        "num_prompt_tokens": sum(len(s.prompt_ids) for s in sequences if s.choice_index == 0),
        "num_output_tokens": sum(len(s.output_ids) for s in sequences),
        "num_moves": sum(s.num_moves for s in sequences),
        "worker": next((one["worker"] for one in entry.choices), None),
        "first_token_s": round(min(first), 6) if first else None,
        "duration_s": round(entry.took_s, 6),
    }
    log.info("request %s: %s", entry.request_id, reasons, extra={FIELDS: fields})
