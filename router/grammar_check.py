"""Whether a grammar can be obeyed, found out before a request goes to a worker, off the event loop.

Compiles it for the model's own tokens within the limits that workers keep, and asks for the first mask: what
no token can begin is refused, too. The last verdicts are kept, so that a schema that comes with every request
costs nothing. Knows grammars, not fields of requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import InvalidRequest, QueueFull
from ellm.worker.api.grammar import MAX_GRAMMAR_BYTES, PARSER_LIMITS

COMPILE_S = 5.0  # the costliest grammars within the limits take a third of a second
MAX_PENDING = 64  # grammars that wait for a thread
MAX_VERDICTS = 1024
MAX_REASON_CHARS = 300
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="ellm-grammar")


class GrammarCheck:
    """Of one model's tokens. Belongs to one event loop, but for what runs in threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # why a grammar is refused; "": it is not
        self._pending = 0

    async def check(self, grammar: str, field: str) -> None:
        """Raises InvalidRequest that names `field`; QueueFull while too many wait."""
        if len(grammar) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(f"{field}: more than {MAX_GRAMMAR_BYTES} bytes", param=field)
        key = blake2b(grammar.encode(), digest_size=16).digest()
        reason = self._verdicts.get(key)
        if reason is None:
            reason = await self._find_out(grammar, field)
            self._verdicts[key] = reason
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        else:
            self._verdicts.move_to_end(key)
        if reason:
            raise InvalidRequest(f"{field}: {reason}", param=field)

    async def _find_out(self, grammar: str, field: str) -> str:
        if self._pending >= MAX_PENDING:
            raise QueueFull("too many grammars wait to be compiled", retry_after_s=1.0)
        self._pending += 1
        work = asyncio.get_running_loop().run_in_executor(_THREADS, self._verdict, grammar)
        work.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.shield(work), COMPILE_S)
        except TimeoutError:
            # A thread cannot be stopped; the library's own limits end its work.
            raise InvalidRequest(
                f"{field}: takes longer than {COMPILE_S:g} s to compile", param=field
            ) from None

    def _done(self, work: asyncio.Future[str]) -> None:
        self._pending -= 1
        if not work.cancelled():
            work.exception()  # read: whoever waited may have left

    def _verdict(self, grammar: str) -> str:
        """In a thread."""
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        with self._lock:
            if self._tokens is None:
                tokens = LLTokenizer(self._tokenizer.definition(), n_vocab=self._tokenizer.vocab_size)
                self._tokens = tokens
        limits = LLParserLimits(verbose_errors=False, **PARSER_LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        first = _first(mask)
        if first is not None:
            # What is forced behind it is found out, too: a grammar that has no end fails here.
            matcher.consume_token(first)
        if matcher.is_error():
            return _plain(matcher.get_error())
        return "no token of this model can begin it" if first is None else ""


def _first(mask: bytes) -> int | None:
    """The lowest token of a mask."""
    for i, byte in enumerate(mask):
        if byte:
            return 8 * i + (byte & -byte).bit_length() - 1
    return None


def _plain(message: str) -> str:
    """The library's words, without its marks."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:MAX_REASON_CHARS]
