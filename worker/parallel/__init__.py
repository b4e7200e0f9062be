"""A tensor-parallel group: ranks that hold a part of one model each and compute every step together."""
