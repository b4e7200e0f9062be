"""Plain tuples between router, worker and controller, with a schema version.

A message is `(version, kind, *fields)`. A reader of version N understands N - 1 and N + 1: fields are only
ever added at the end, and extra ones are ignored. Only builtins travel, so nothing of ours need be importable
on the other side, and only durations travel, never clock readings.

    router -> worker   HELLO   (v, "hello", router_id, secret)  first on a connection, where there is one
                       OPEN    (v, "open", router_id)           begin the stream of STEP messages
                       SUBMIT  (v, "submit", router_id, seq, [request, ...])
                       ABORT   (v, "abort", router_id, seq, [(request_id, attempt), ...])
    worker -> router   STEP    (v, "step", epoch, seq, [output, ...], report | None)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ellm.worker.api.output import SequenceOutput, TokenLogprobs
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.api.request import EngineRequest, SamplingParams

VERSION = 1
Message = tuple[Any, ...]


class WireError(ValueError):
    """A message that this version cannot read."""


def _values(obj: Any) -> tuple[Any, ...]:
    return tuple(getattr(obj, f.name) for f in fields(obj))


def _make(cls: type[Any], values: Sequence[Any]) -> Any:
    """Build `cls` from as many values as it has fields; missing ones take their defaults."""
    return cls(*values[: len(fields(cls))])


def pack_request(request: EngineRequest) -> Message:
    values = _values(request)
    return (*values[:2], _values(request.sampling), *values[3:])


def unpack_request(message: Sequence[Any]) -> EngineRequest:
    sampling = _make(SamplingParams, message[2])
    request: EngineRequest = _make(EngineRequest, (*message[:2], sampling, *message[3:]))
    return request


def pack_output(output: SequenceOutput) -> Message:
    """One sequence's step; the rare parts are left out of the usual message (one token, nothing else)."""
    usual = output.finish_reason is None and output.logprobs is None and not output.events
    if usual and output.output_index > 0:
        return (output.request_id, output.attempt, output.output_index, output.token_ids)
    return (
        output.request_id,
        output.attempt,
        output.output_index,
        output.token_ids,
        output.finish_reason,
        output.stop_token_id,
        None if output.logprobs is None else tuple(_values(x) for x in output.logprobs),
        None
        if output.prompt_logprobs is None
        else tuple(None if x is None else _values(x) for x in output.prompt_logprobs),
        output.num_cached_tokens,
        output.error,
        output.retry_after_s,
        output.queue_time_s,
        output.events,
    )


def unpack_output(message: Sequence[Any]) -> SequenceOutput:
    if len(message) == 4:
        return SequenceOutput(message[0], message[1], message[2], message[3])
    values = list(message)
    if len(values) > 6 and values[6] is not None:
        values[6] = tuple(_make(TokenLogprobs, x) for x in values[6])
    if len(values) > 7 and values[7] is not None:
        values[7] = tuple(None if x is None else _make(TokenLogprobs, x) for x in values[7])
    output: SequenceOutput = _make(SequenceOutput, values)
    return output


def pack_report(report: WorkerReport) -> Message:
    return _values(report)


def unpack_report(message: Sequence[Any]) -> WorkerReport:
    report: WorkerReport = _make(WorkerReport, message)
    return report


def pack_info(info: WorkerInfo) -> Message:
    return _values(info)


def unpack_info(message: Sequence[Any]) -> WorkerInfo:
    info: WorkerInfo = _make(WorkerInfo, message)
    return info


def hello(router_id: str, secret: bytes) -> Message:
    return (VERSION, "hello", router_id, secret)


def open_stream(router_id: str) -> Message:
    return (VERSION, "open", router_id)


def submit(router_id: str, seq: int, requests: Sequence[EngineRequest]) -> Message:
    return (VERSION, "submit", router_id, seq, [pack_request(r) for r in requests])


def abort(router_id: str, seq: int, ids: Sequence[tuple[str, int]]) -> Message:
    return (VERSION, "abort", router_id, seq, list(ids))


def step(
    epoch: str, seq: int, outputs: Sequence[SequenceOutput], report: WorkerReport | Message | None
) -> Message:
    """`report` may be packed already: the same goes to many."""
    return (
        VERSION,
        "step",
        epoch,
        seq,
        [pack_output(o) for o in outputs],
        pack_report(report) if isinstance(report, WorkerReport) else report,
    )


def check(message: Message, kind: str) -> Message:
    """Return the message's fields after version and kind, or raise WireError."""
    if not isinstance(message, tuple) or len(message) < 2:
        raise WireError("not a wire message")
    version = message[0]
    if not isinstance(version, int) or abs(version - VERSION) > 1:
        raise WireError(f"wire version {version!r}, this side speaks {VERSION}")
    if message[1] != kind:
        raise WireError(f"expected {kind!r}, got {message[1]!r}")
    return message[2:]
