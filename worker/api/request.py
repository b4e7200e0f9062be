"""What a worker is asked to do: one sequence to continue, and how to sample it."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token. Limits are checked at the router's edge and again in `validate`.

    `seed` is always a number here: the router draws one where the client gave none, so that a request
    that moves to another worker continues as it would have. Noise is f(seed, choice index, output
    index, token id) and depends on nothing else.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bit
    logprobs: int | None = None  # None: off; 0: the chosen token's alone; n: top n beside it
    prompt_logprobs: int | None = None  # the same for prompt tokens (`echo` with `logprobs`)
    min_tokens: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # What the output must be, as llguidance reads it (worker/api/grammar.py); the end-of-text token is then
    # allowed just where the grammar accepts.
    grammar: str | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence for one worker. `n > 1` is n of these that share a prompt.

    `output_ids` is non-empty when the request resumes after a failover: penalties, min/max tokens and
    output indices count from the original prompt, so the two are never joined.
    """

    request_id: str  # unique per sequence; the router appends the choice index
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    attempt: int = 0  # raised at each failover; output of an older attempt is dropped
    choice_index: int = 0
    output_ids: tuple[int, ...] = ()
    salt: str = ""  # of the tenant: prefixes are shared within one salt only
    priority: int = 0  # lower runs first
    tpot_slo_s: float | None = None
    ttft_slo_s: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)
