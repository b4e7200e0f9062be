"""Random scripts for the engine: arrivals, aborts, priorities, shared prefixes, in a pool of any size."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from support.engine_driver import EOS, EngineDriver, plain

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.request import EngineRequest, SamplingParams
from ellm.worker.engine.plan import ModelLimits, NewSequence

VOCAB = 40
COMMON = tuple(1 + (i * i) % 39 for i in range(40))  # the prefix that prompts share


@dataclass(frozen=True)
class Arrival:
    """A request, the turn in which it comes, and the turn in which it is aborted, if any."""

    turn: int
    request: EngineRequest
    abort_turn: int | None


@dataclass(frozen=True)
class Setting:
    """One engine."""

    limits: ModelLimits
    scheduler: SchedulerConfig
    prefix_caching: bool
    late: bool

    @property
    def max_total(self) -> int:
        return min(self.limits.max_model_len, self.limits.num_blocks * self.limits.block_size)


def output_length(new: NewSequence) -> int | None:
    """Some sequences end by themselves, after 1 to 30 tokens."""
    x = (sum(new.prompt_ids) + new.sampling.seed) % 50
    return x + 1 if x < 30 else None


def make_setting(rng: Random, room: float) -> Setting:
    """`room`: the pool's size in longest requests."""
    block_size, max_len = rng.choice([1, 2, 4, 16]), rng.randint(24, 64)
    num_blocks = -(-int(room * max_len) // block_size)
    scheduler = plain(
        max_num_seqs=rng.choice([1, 2, 4, 8, 8]),
        max_step_tokens=rng.choice([rng.randint(1, 8), rng.randint(8, 80), 80]),
        watermark=rng.choice([0.0, 0.01, 0.2]),
        pipeline_depth=rng.choice([1, 2, 2]),
    )
    limits = ModelLimits(num_blocks, block_size, max_len, VOCAB, (EOS,))
    return Setting(limits, scheduler, rng.random() < 0.7, rng.random() < 0.5)


def make_request(rng: Random, name: str, max_total: int) -> EngineRequest:
    own = tuple(rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 10)))
    prompt = COMMON[: rng.choice([0, rng.randint(0, max_total - 1 - len(own))])] + own
    most = max_total - len(prompt)
    max_tokens = rng.choice([most, rng.randint(1, most)])
    prompt_logprobs = rng.choice([None, None, None, None, 1])
    if prompt_logprobs is not None and rng.random() < 0.4:
        max_tokens = 0
    sampling = SamplingParams(
        seed=rng.randrange(4),
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, rng.randint(0, max_tokens)]),
        stop_token_ids=rng.choice([(), (), (5, 17)]),
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice([None, None, 0, 2]),
        prompt_logprobs=prompt_logprobs,
    )
    return EngineRequest(
        name,
        prompt,
        sampling,
        choice_index=rng.randrange(2),
        salt=rng.choice(["", "", "", "tenant"]),
        priority=rng.choice([0, 0, 1, 2]),
    )


def make_script(rng: Random, num_requests: int, max_total: int) -> list[Arrival]:
    turn, script = 0, []
    for i in range(num_requests):
        turn += rng.choice([0, 0, 1, rng.randint(0, 20)])
        abort_turn = turn + rng.randint(0, 60) if rng.random() < 0.2 else None
        script.append(Arrival(turn, make_request(rng, f"r{i}", max_total), abort_turn))
    return script


def play(setting: Setting, script: list[Arrival], *, patience: int = 3, **options: object) -> EngineDriver:
    """Run a script to its end. The front of the order takes part in every second step at least, so there is a
    bound on the turns that everything can take; `patience` is for policies that pause it. `options` are those
    of EngineDriver."""
    driver = EngineDriver(
        setting.limits,
        scheduler=setting.scheduler,
        prefix_caching=setting.prefix_caching,
        output_length=output_length,
        late=setting.late,
        **options,  # type: ignore[arg-type]
    )
    last = max(max(a.turn, a.abort_turn or 0) for a in script)
    work = sum(len(a.request.prompt_ids) + a.request.sampling.max_tokens + 2 for a in script)
    turn = 0
    while turn <= last or driver.core.has_work:
        assert turn <= last + patience * work, "no end in sight"
        for arrival in script:
            if arrival.turn == turn:
                assert driver.add(arrival.request)
            if arrival.abort_turn == turn:
                driver.abort(arrival.request.request_id)
        if driver.core.has_work:
            driver.turn()
        turn += 1
    return driver
