"""Requests that an OpenAPI document allows, and some that it forbids, made by schemathesis; and whether what
comes back is described.

Cases are made before any is sent: the same seed makes the same ones, whatever the server does. Of a body
with fifty fields most are dropped in most cases, since fields that contradict each other are refused and
would hide all else.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

GENERATION = ("/v1/completions", "/v1/chat/completions")
SHARES = dict.fromkeys(GENERATION, 0.42)  # of all cases; the other endpoints share the rest
FORBIDDEN = 0.15  # of the cases of an endpoint that takes a body
KEPT = (0, 1, 2, 3, 5, 100)  # so many fields of a body that need not be there
KEPT_HEADERS = 0.2
TIMEOUT_S = 120.0
CHECKS = (
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
)


@dataclass(slots=True)
class Verdict:
    """Of all cases."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path
    faults: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.statuses.total()

    @property
    def reached(self) -> float:
        """Share of all cases that generated."""
        return sum(self.statuses[path, 200] for path in GENERATION) / max(1, self.cases)

    def add(self, other: Verdict) -> None:
        self.statuses += other.statuses
        self.faults += other.faults

    def by_status(self) -> dict[int, int]:
        found: Counter[int] = Counter()
        for (_, status), count in self.statuses.items():
            found[status] += count
        return dict(sorted(found.items()))


def make_cases(document: dict[str, Any], count: int, number: int) -> list[Case]:
    """About `count` cases, shuffled; `number` is the seed."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    others = [operation for operation in operations if operation.path not in SHARES]
    rest = (1 - sum(SHARES.values())) / max(1, len(others))
    rng = random.Random(number)
    cases: list[Case] = []
    for operation in operations:
        share = max(2, round(count * SHARES.get(operation.path, rest)))
        forbidden = round(share * FORBIDDEN) if operation.body else 0
        cases += _drawn(operation, GenerationMode.NEGATIVE, forbidden, number)
        allowed = _drawn(operation, GenerationMode.POSITIVE, share - forbidden, number)
        for case in allowed:
            _thin(case, document, rng)
        cases += allowed
    rng.shuffle(cases)
    return cases


def _drawn(operation: Any, mode: GenerationMode, count: int, number: int) -> list[Case]:
    """Hypothesis stops early where there is no more to try: then they come again."""
    drawn: list[Case] = []
    if not count:
        return drawn

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    return [drawn[i % len(drawn)] for i in range(count)]


def _thin(case: Case, document: dict[str, Any], rng: random.Random) -> None:
    """Keep few headers, some of a body's fields, and those that must be there."""
    if case.headers:
        case.headers = {name: value for name, value in case.headers.items() if rng.random() < KEPT_HEADERS}
    body = case.body
    name = {"/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest"}.get(case.path)
    if name is None or not isinstance(body, dict):
        return
    needed = set(document["components"]["schemas"][name]["required"])
    others = [field for field, value in body.items() if field not in needed and value is not None]
    kept = set(rng.sample(others, min(len(others), rng.choice(KEPT)))) | needed
    case.body = {key: value for key, value in body.items() if key in kept}


def judge(document: dict[str, Any], url: str, count: int, number: int, threads: int) -> Verdict:
    """Make cases and send them."""
    return send(make_cases(document, count, number), url, threads=threads)


def _server_error(status: int) -> str:
    """503 says that nothing can serve this now; any other is a fault."""
    return "a server error" if status >= 500 and status != 503 else ""


def send(cases: Sequence[Case], url: str, key: str | None = None, threads: int = 4) -> Verdict:
    """Send all; each answer is judged by the document."""
    verdict, lock = Verdict(), threading.Lock()
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def one(case: Case) -> None:
        try:
            answer = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S)
        except Exception as error:  # whatever it is, the server did not answer
            with lock:
                verdict.faults.append(f"{case.method} {case.path}: {type(error).__name__}: {error}"[:400])
            return
        try:
            case.validate_response(answer, checks=list(CHECKS), headers=headers)
            fault = _server_error(answer.status_code)
        except BaseExceptionGroup as group:
            fault = " | ".join(map(str, group.exceptions))
        with lock:
            verdict.statuses[case.path, answer.status_code] += 1
            if fault:
                shown = f"{case.method} {case.path} {str(case.body)[:300]}: {answer.status_code} {fault}"
                verdict.faults.append(" ".join(shown.split())[:900])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, cases))
    return verdict
