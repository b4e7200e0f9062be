"""What each API key has used at this router: sequences by how they ended, prompt and output tokens.

Counted when a sequence ends, which it does once, whatever workers it was on in between. Keys are few; their
labels are ids, never the keys themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from ellm.router.sequence import Sequence
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

    def families(self, model: str) -> Iterator[Metric]:
        labels = ["model_name", "tenant"]
        ended = CounterMetricFamily(
            "ellm_tenant_requests", "Sequences of an API key.", labels=[*labels, "finished_reason"]
        )
        for (tenant, reason), count in sorted(self._ended.items()):
            ended.add_metric([model, tenant, reason], count)
        yield ended
        for name, text, counts in (
            ("ellm_tenant_prompt_tokens", "Prompt tokens of an API key.", self._prompt_tokens),
            ("ellm_tenant_generation_tokens", "Output tokens of an API key.", self._output_tokens),
        ):
            family = CounterMetricFamily(name, text, labels=labels)
            for tenant, count in sorted(counts.items()):
                family.add_metric([model, tenant], count)
            yield family
