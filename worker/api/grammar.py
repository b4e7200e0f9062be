"""What a grammar may cost, for the router that checks it and the worker that obeys it.

A grammar travels as text that llguidance reads: a JSON schema, a regular expression or a Lark grammar in its
own envelope. Work is bounded by fuel, not by a clock, so that both sides refuse the same grammars.
"""

from __future__ import annotations

MAX_GRAMMAR_BYTES = 256 * 1024  # as sent to the worker
# Fields of llguidance's LLParserLimits.
PARSER_LIMITS: dict[str, int] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 500_000,  # about 50,000 per ms
    "step_lexer_fuel": 200_000,  # about 14,000 per ms
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # of one sequence; 0.5 to 2 kB each
    "max_grammar_size": 100_000,  # symbols
}
