"""Grammars of one model's tokens: compiled once, and each constrained sequence's place in its own.

A sequence's place follows from its output tokens alone, so it is built anew wherever the sequence goes on:
after a preemption, on another worker, on every rank alike. A mask is asked for when the token before is
known, which is always so once a step is executed: plans come one after the other. Compiling happens in
threads of its own; llguidance lets go of the interpreter meanwhile, and its work is bounded by fuel
(worker/api/grammar.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ellm.worker.api.errors import ConfigError, InvalidRequest
from ellm.worker.api.grammar import MAX_GRAMMAR_BYTES, PARSER_LIMITS

MAX_KEPT = 64  # compiled grammars
TOO_COMPLEX = "the grammar has become too complex for this output"
Masks = npt.NDArray[np.int32]


class GrammarState:
    """One sequence's place in its grammar. Built in a thread; `fill` waits for that."""

    __slots__ = ("_ended", "_eos", "_future", "_matcher", "error")

    def __init__(self, matcher: Future[Any], eos_token_ids: frozenset[int]) -> None:
        self._future: Future[Any] | None = matcher
        self._matcher: Any = None
        self._eos = eos_token_ids
        self._ended = False
        self.error: str | None = None  # why it cannot go on; final

    def fill(self, row: Masks) -> bool:
        """Write the tokens that may come next to `row` [ceil(V / 32)], a bit each. False: nothing is asked of
        this row, since the sequence has ended (a plan made before that was known) or has failed."""
        matcher = self._built()
        if matcher is None or self._ended:
            return False
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error() or not row.any():
            self.error = TOO_COMPLEX
            return False
        return True

    def add(self, token: int) -> None:
        """The token that was chosen within the mask."""
        if self.error is not None or self._ended:
            return
        self._ended = token in self._eos
        if not self._ended and not self._matcher.consume_token(token):
            self.error = TOO_COMPLEX

    def _built(self) -> Any:
        if self._future is not None:
            future, self._future = self._future, None
            try:
                self._matcher = future.result()
            except (InvalidRequest, ConfigError) as error:
                self.error = error.message
        return None if self.error is not None else self._matcher


class Grammars:
    """Those of one model; any thread may ask."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`folder`: of the checkpoint; its tokenizer is read when the first grammar comes."""
        self._file = folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="ellm-grammar")

    @property
    def available(self) -> bool:
        """llguidance is installed, and the checkpoint has what it reads."""
        return bool(self._eos) and self._file.is_file() and find_spec("llguidance") is not None

    def compile(self, grammar: str) -> Any:
        """A matcher at its start, not to be moved. Takes up to tens of milliseconds, once. Raises
        InvalidRequest for a grammar that cannot be obeyed, ConfigError where none can."""
        if not self.available:
            raise ConfigError("grammars need llguidance, and a tokenizer.json in the checkpoint")
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found
        matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def begin(self, grammar: str, output_ids: Sequence[int]) -> GrammarState:
        """A sequence's place behind what it has said so far. Does not wait."""
        return GrammarState(self._threads.submit(self._begin, grammar, output_ids), frozenset(self._eos))

    def _begin(self, grammar: str, output_ids: Sequence[int]) -> Any:
        matcher = self.compile(grammar).deep_copy()
        if not matcher.consume_tokens(list(output_ids)):
            raise InvalidRequest("the output so far is not of the grammar", param="output_ids")
        return matcher

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        if len(grammar) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"grammar: at most {MAX_GRAMMAR_BYTES} bytes", param="grammar")
        limits = LLParserLimits(verbose_errors=False, **PARSER_LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(self._tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(f"grammar: {matcher.get_error()[:500]}", param="grammar")
        return matcher

    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokens is None:
                tokenizer = Tokenizer.from_file(str(self._file))
                known = set(tokenizer.get_vocab(with_added_tokens=True).values())
                eos = [token for token in self._eos if token in known]  # a config may name more
                try:
                    text, size = tokenizer.to_str(), self._vocab_size
                    self._tokens = LLTokenizer(text, n_vocab=size, eos_token=eos)
                except ValueError as error:
                    raise ConfigError(f"this tokenizer obeys no grammar: {error}") from None
            return self._tokens
