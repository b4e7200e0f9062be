"""Executors: carry out a BatchPlan and say which tokens came out and how long it took."""
