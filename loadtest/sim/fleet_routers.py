"""What a router's dispatcher and links keep of a fleet that comes and goes, without their tasks.

A worker is known from the first report that is heard of it. One that is silent for `suspect_s` is chosen only
where nothing else is; one whose connection broke, or that was silent for `fail_s`, is forgotten.
"""

from __future__ import annotations

from dataclasses import replace

from ellm.router.policies import Replica as View
from ellm.router.policies import RoutedRequest, RoutingPolicy
from ellm.router.policies.base import OUTPUT_TOKENS
from ellm.worker.api.report import WorkerReport

LENGTH_SMOOTHING = 0.02  # as the router's dispatcher does


class FleetRouter:
    def __init__(self, name: str, policy: RoutingPolicy) -> None:
        self.name = name
        self.views: dict[int, View] = {}  # by the worker's number
        self.suspects: set[int] = set()
        self.gate: dict[int, float] = {}  # requests for which no worker is up -> since when
        self._policy = policy
        self._output_tokens: float = OUTPUT_TOKENS
        self._seqs: dict[int, int] = {}
        self._numbers: dict[str, int] = {}

    def heard(self, number: int, report: WorkerReport, now: float) -> None:
        view = self.views.get(number)
        if view is None:
            view = self.views[number] = View(f"w{number}")
            self._numbers[view.replica_id] = number
            self._seqs[number] = 0
        view.heard(report, self.name, now)

    def forget(self, number: int) -> None:
        view = self.views.pop(number, None)
        if view is not None:
            del self._numbers[view.replica_id], self._seqs[number]
            self.suspects.discard(number)

    def route(self, prompt: tuple[int, ...], emitted: int, now: float) -> tuple[int, int] | None:
        """(worker, submission's number) for a request with `emitted` tokens of output; None: none is up."""
        ready = {number: view for number, view in self.views.items() if view.ready}
        well = [view for number, view in ready.items() if number not in self.suspects]
        request = replace(RoutedRequest(prompt), output_tokens=self._output_tokens)
        choice = self._policy.choose(request, well or list(ready.values()), now)
        if choice is None:
            return None
        number = self._numbers[choice.replica_id]
        tokens = len(prompt) + emitted
        rows = max(1, tokens - choice.cached_tokens)
        self._seqs[number] += 1
        view = self.views[number]
        view.place(1, rows, tokens)
        view.sent(self._seqs[number], 1, rows, tokens, now)
        return number, self._seqs[number]

    def ended(self, output_tokens: int) -> None:
        self._output_tokens += LENGTH_SMOOTHING * (output_tokens - self._output_tokens)
