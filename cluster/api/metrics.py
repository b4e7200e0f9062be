"""The controller's metrics, declared as in worker/api/metrics.py: what should be, beside what is."""

from __future__ import annotations

from ellm.worker.api.metrics import gauge

WANTED = gauge("workers_wanted", "Workers that a model should have.", "model_name")
TERM = gauge("controller_term", "Which controller since the cluster's start it is that advises.")

DECLARED = (WANTED, TERM)
