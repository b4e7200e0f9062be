"""What each API key has used at this router: sequences by how they ended, prompt and output tokens.

Counted when a sequence ends, which it does once, whatever workers it was on in between. Keys are few; their
labels are ids, never the keys themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ellm.router.metrics_declared import TENANT_OUTPUT, TENANT_PROMPT, TENANT_REQUESTS
from ellm.router.sequence import Sequence
from ellm.worker.api.metrics import Key
from ellm.worker.api.output import FinishReason


class Usage:
    def __init__(self) -> None:
        self._ended: Counter[tuple[str, str]] = Counter()
        self._prompt_tokens: Counter[str] = Counter()
        self._output_tokens: Counter[str] = Counter()

    def ended(self, sequence: Sequence, reason: FinishReason) -> None:
        tenant = sequence.tenant
        if not tenant:
            return
        self._ended[tenant, reason] += 1
        self._output_tokens[tenant] += len(sequence.output_ids)
        if sequence.choice_index == 0:  # choices share their prompt
            self._prompt_tokens[tenant] += len(sequence.prompt_ids)

    def series(self, model: str) -> Iterator[tuple[Key, float]]:
        for (tenant, reason), count in self._ended.items():
            yield (TENANT_REQUESTS.name, model, tenant, reason), count
        for tenant, count in self._prompt_tokens.items():
            yield (TENANT_PROMPT.name, model, tenant), count
        for tenant, count in self._output_tokens.items():
            yield (TENANT_OUTPUT.name, model, tenant), count
