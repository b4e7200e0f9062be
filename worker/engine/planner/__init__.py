"""Building blocks of planning: plain numbers in, plain numbers out.

Times are seconds, lengths are tokens. Nothing here knows sequences, blocks or the engine, and nothing keeps
a clock: time is an argument.
"""
