"""The sides of the engine benchmark, each in a process of its own that speaks `protocol.py` on its pipes.

Each file runs by path with the interpreter of its own environment, so it imports nothing of the project that
another environment may lack.
"""
