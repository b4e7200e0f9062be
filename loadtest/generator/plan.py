"""All that will be sent, decided before the first request goes: a list of sessions in order of arrival.

The same options and seed give the same plan, at any rate and for any number of processes. Knows no server:
prompts are described (`Prompt`), not yet written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ellm.loadtest.generator.arrivals import arrival_times, stretched
from ellm.loadtest.generator.content import Prompt, Stretch
from ellm.loadtest.generator.dataset import Turn, read_dataset
from ellm.loadtest.generator.lengths import Lengths, parse_lengths
from ellm.loadtest.generator.options import Options
from ellm.loadtest.sim.traces import TraceRow, read_trace
from ellm.worker.api.errors import ConfigError

DEFAULT_OUTPUT = "128"


@dataclass(frozen=True, slots=True)
class PlannedTurn:
    """One request. `think_s` passes between the answer before and this turn; the first turn has none."""

    index: int  # in the whole plan, in order of sessions
    prompt: Prompt
    output_tokens: int
    think_s: float = 0.0
    cancel_after_s: float | None = None  # from the sending on


@dataclass(frozen=True, slots=True)
class PlannedSession:
    """Turns one after the other; each prompt goes behind all that was said before."""

    number: int
    due_s: float  # of the first turn, since the start
    turns: tuple[PlannedTurn, ...]
    warmup: bool = False  # sent, and left out of all figures


def make_plan(options: Options) -> list[PlannedSession]:
    """Sessions by arrival; `num_requests` of them, and `warmup` more that come before. Raises ConfigError."""
    options.check()
    rng = random.Random(options.seed)
    content = _content(options, rng)
    count = options.warmup + options.num_requests
    asked, own_times = [], []
    for said, at in content:
        asked.append(said)
        own_times.append(at)
        if len(asked) == count:
            break
    times = _times(options, own_times)
    return _sessions(options, asked, times, random.Random(f"{options.seed}:sessions"))


def _times(options: Options, own: list[float]) -> list[float]:
    if options.arrivals == "trace":
        return stretched([time - own[0] for time in own], options.rate)
    assert options.rate is not None
    rng = random.Random(f"{options.seed}:arrivals")
    return arrival_times(
        options.arrivals, options.rate, len(own), rng, cv=options.cv, size=options.burst_size
    )


def _content(options: Options, rng: random.Random) -> Iterator[tuple[list[Turn], float]]:
    """(turns, the source's own arrival) without end, or to the end of a trace whose times are kept."""
    fixed = parse_lengths(options.output_tokens, "--output-tokens") if options.output_tokens else None
    turns = parse_lengths(options.turns, "--turns")
    if options.trace is not None:
        return _from_trace(options, fixed)
    if options.dataset is not None:
        return _from_dataset(options, fixed, turns, rng)
    return _drawn(options, fixed or parse_lengths(DEFAULT_OUTPUT, "--output-tokens"), turns, rng)


def _drawn(
    options: Options, outputs: Lengths, turns: Lengths, rng: random.Random
) -> Iterator[tuple[list[Turn], float]]:
    inputs = parse_lengths(options.input_tokens, "--input-tokens")
    number = 0
    while True:
        said = []
        for turn in range(turns.draw(rng)):
            tokens = inputs.draw(rng)
            stretch = Stretch(f"{options.seed}:{number}:{turn}", tokens)
            said.append(Turn(Prompt(tokens, (stretch,)), outputs.draw(rng)))
        yield said, 0.0
        number += 1


def _from_trace(options: Options, fixed: Lengths | None) -> Iterator[tuple[list[Turn], float]]:
    assert options.trace is not None
    rows = read_trace(Path(options.trace))
    if len(rows) < options.num_requests + options.warmup:
        raise ConfigError(
            f"{options.trace} holds {len(rows):,} requests; "
            f"{options.num_requests + options.warmup:,} were asked for"
        )
    rng = random.Random(f"{options.seed}:outputs")
    for number, row in enumerate(rows):
        output = fixed.draw(rng) if fixed else max(1, round(row.output_tokens * options.trace_scale))
        yield [Turn(trace_prompt(row, number, options.trace_scale, options.seed), output)], row.arrival_s


def trace_prompt(row: TraceRow, number: int, scale: float, seed: int) -> Prompt:
    """A row's hash ids as stretches: two prompts share as many tokens as their rows share leading ids."""
    left = max(1, round(row.prompt_tokens * scale))
    tokens, size = left, max(1, round(row.stretch * scale))
    stretches = []
    for hash_id in row.hash_ids:
        taken = min(left, size)
        if taken:
            stretches.append(Stretch(f"{seed}:hash:{hash_id}", taken))
        left -= taken
    if left:
        stretches.append(Stretch(f"{seed}:row:{number}", left))
    return Prompt(tokens, tuple(stretches))


def _from_dataset(
    options: Options, fixed: Lengths | None, turns: Lengths, rng: random.Random
) -> Iterator[tuple[list[Turn], float]]:
    """In a random order; from the beginning again when all have been taken."""
    assert options.dataset is not None
    conversations = read_dataset(Path(options.dataset))
    rng.shuffle(conversations)
    while True:
        for conversation in conversations:
            said = conversation[: turns.draw(rng)]
            if fixed:
                said = [Turn(turn.prompt, fixed.draw(rng)) for turn in said]
            yield said, 0.0


def _sessions(
    options: Options, asked: list[list[Turn]], times: list[float], rng: random.Random
) -> list[PlannedSession]:
    sessions, index = [], 0
    for number, (said, due) in enumerate(zip(asked, times, strict=True)):
        system = _system(options, rng)
        turns = []
        for position, turn in enumerate(said):
            prompt = turn.prompt if position or system is None else _behind(system, turn.prompt)
            think = rng.expovariate(1.0 / options.think_s) if position and options.think_s else 0.0
            cancelled = rng.random() < options.cancel_share
            after = rng.expovariate(1.0 / options.cancel_after_s) if cancelled else None
            turns.append(PlannedTurn(index, prompt, turn.output_tokens, think, after))
            index += 1
        sessions.append(PlannedSession(number, due, tuple(turns), number < options.warmup))
    return sessions


def _system(options: Options, rng: random.Random) -> Stretch | None:
    if not options.shared_prompts:
        return None
    return Stretch(f"{options.seed}:system:{rng.randrange(options.shared_prompts)}", options.shared_tokens)


def _behind(system: Stretch, prompt: Prompt) -> Prompt:
    if prompt.text is not None:
        raise ConfigError("--shared-prompts goes with made prompts, not with --dataset")
    return Prompt(prompt.tokens + system.tokens, (system, *prompt.stretches), num_system=1)
