"""What a run is asked to do: one frozen dataclass, checked once. Knows neither the server nor the clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ellm.worker.api.errors import ConfigError

Arrivals = Literal["poisson", "gamma", "constant", "bursts", "trace"]
Endpoint = Literal["completions", "chat", "grpc"]
ARRIVALS = ("poisson", "gamma", "constant", "bursts", "trace")


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request is measured against, seconds; None: not looked at."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))

    def named(self) -> dict[str, float]:
        """The limits that are set, by the field of a record they bound."""
        limits = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class Options:
    """One run. Rates are requests (first turns of sessions) per second, shares lie between 0 and 1."""

    url: str
    rate: float | None = None  # None: a trace's own arrivals; infinite: all at once
    num_requests: int = 100
    model: str | None = None
    api_key: str | None = None
    chat: bool = False
    arrivals: Arrivals = "poisson"
    cv: float = 1.0  # of the gaps, for gamma
    burst_size: int = 8
    input_tokens: str = "256"  # see lengths.Lengths
    output_tokens: str | None = None
    trace: str | None = None
    trace_scale: float = 1.0  # factor on a trace's lengths
    dataset: str | None = None
    tokenizer: str | None = None
    prompt_ids: bool = False
    shared_prompts: int = 0  # how many different ones
    shared_tokens: int = 0  # tokens of each
    turns: str = "1"
    think_s: float = 0.0  # mean of an exponential distribution
    cancel_share: float = 0.0
    cancel_after_s: float = 1.0  # mean of an exponential distribution, from the sending on
    warmup: int = 0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    processes: int = 0  # 0: as many as the rate needs
    seed: int = 0
    slo: Slo = Slo()

    def check(self) -> None:
        """Raises ConfigError for what cannot be run."""
        for wrong, message in (
            (self.rate is not None and not self.rate > 0.0, f"--rate must be above 0, not {self.rate}"),
            (self.num_requests < 1, "--num-requests must be at least 1"),
            (self.warmup < 0, "--warmup cannot be negative"),
            (not self.cv > 0.0, "--cv must be above 0 (--arrivals constant has no variation)"),
            (self.burst_size < 1, "--burst-size must be at least 1"),
            (not 0.0 <= self.cancel_share <= 1.0, "--cancel is a share between 0 and 1"),
            (self.cancel_after_s <= 0.0, "--cancel-after-s must be above 0"),
            (self.think_s < 0.0, "--think-s cannot be negative"),
            (self.timeout_s <= 0.0, "--timeout-s must be above 0"),
            (self.processes < 0, "--processes cannot be negative"),
            (self.trace_scale <= 0.0, "--trace-scale must be above 0"),
            (any(limit <= 0.0 for limit in self.slo.named().values()), "an SLO must be above 0"),
            (self.shared_prompts > 0 and self.shared_tokens < 1, "--shared-prompts needs --shared-tokens N"),
            *self._contradictions(),
        ):
            if wrong:
                raise ConfigError(message)

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        """What cannot be had together."""
        own_times = self.arrivals == "trace"
        return (
            (self.arrivals not in ARRIVALS, f"--arrivals is one of {', '.join(ARRIVALS)}"),
            (own_times and self.trace is None, "--arrivals trace needs --trace FILE"),
            (not own_times and self.rate is None, f"--arrivals {self.arrivals} needs --rate R"),
            (self.trace is not None and self.dataset is not None, "--trace or --dataset, not both"),
            (self.prompt_ids and self.chat, "--prompt-ids goes with completions and gRPC, not with --chat"),
            (self.prompt_ids and self.dataset is not None, "--prompt-ids or --dataset, not both"),
            (self.prompt_ids and self.turns != "1", "--prompt-ids cannot carry answers of earlier turns"),
            (self.prompt_ids and self.tokenizer is not None, "--prompt-ids needs no --tokenizer"),
        )

    def endpoint(self) -> Endpoint:
        if self.url.startswith(("grpc://", "grpcs://")):
            return "grpc"
        return "chat" if self.chat else "completions"
