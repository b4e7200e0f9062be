"""Scheduling policies of the engine, chosen by one setting (`policy: ...`)."""
