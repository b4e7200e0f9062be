"""`full-chunked`: every running sequence keeps all its KV; prompts run in chunks beside decode rows.

First come first served, optimistic admission above a watermark, preemption by recompute of the latest: the
policy of vLLM V1, and the baseline of every other.
"""

from __future__ import annotations

from ellm.worker.engine.policies.base import Policy


class FullChunked(Policy):
    """Knows nothing of time, lengths to come or SLOs: the answers that `Policy` gives by itself."""
