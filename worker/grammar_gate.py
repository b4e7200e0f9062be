"""Requests whose grammar is not compiled yet wait here, so that no step waits for one.

In a thread, one after the other; a request without a grammar passes by. An abort meanwhile leaves its
tombstone in the engine, which then does not take the request.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ellm.worker.api.errors import EllmError, InvalidRequest
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest
from ellm.worker.executor.base import GrammarCompiler

Ready = Callable[[EngineRequest, EllmError | None], None]


class GrammarGate:
    """Of one engine loop."""

    def __init__(self, grammars: GrammarCompiler | None, ready: Ready) -> None:
        """`ready` is told, from another thread, of each request that was held."""
        self._grammars = grammars
        self._ready = ready
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="ellm-grammar")  # starts with its first work

    def holds(self, request: EngineRequest) -> bool:
        """False: it may go on. True: `ready` follows."""
        grammar = request.sampling.grammar
        if grammar is None:
            return False
        self._threads.submit(self._compile, request, grammar)
        return True

    def _compile(self, request: EngineRequest, grammar: str) -> None:
        error: EllmError | None = None
        try:
            if self._grammars is None:
                raise InvalidRequest("this worker obeys no grammars", param="grammar")
            self._grammars.compile(grammar)
        except EllmError as raised:
            error = raised
        except Exception as raised:  # the edge: whatever the library does with a client's grammar
            error = InvalidRequest(f"the grammar does not compile: {type(raised).__name__}", param="grammar")
        self._ready(request, error)


def refusal(request: EngineRequest, error: EllmError) -> SequenceOutput:
    """The one output of a request that cannot run here."""
    return SequenceOutput(
        request.request_id,
        request.attempt,
        len(request.output_ids),
        (),
        "error",
        error=(error.code, error.message),
        retry_after_s=error.retry_after_s,
    )
