"""How long prompts and outputs are: distributions named on the command line.

256                 always the same
64-512              uniform, both ends included
normal:256,64       mean, standard deviation
lognormal:256,0.8   mean, sigma of the logarithm
exponential:256     mean
choice:64,512       one of these
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from ellm.worker.api.errors import ConfigError

FORMS = "N, LOW-HIGH, normal:MEAN,STD, lognormal:MEAN,SIGMA, exponential:MEAN or choice:N,N,..."
MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """One distribution; `draw` gives whole numbers from 1 on."""

    text: str
    sample: Callable[[random.Random], float]

    def draw(self, rng: random.Random) -> int:
        return min(MAX_TOKENS, max(1, round(self.sample(rng))))


def parse_lengths(text: str, flag: str) -> Lengths:
    """Raises ConfigError naming `flag`."""
    name, _, rest = text.partition(":")
    try:
        if not rest:
            low, dash, high = text.partition("-")
            lower, upper = int(low), int(high) if dash else int(low)
            if not 1 <= lower <= upper:
                raise ValueError
            return Lengths(text, lambda rng: rng.randint(lower, upper))
        numbers = [float(word) for word in rest.split(",")]
        sample = _named(name, numbers)
    except (ValueError, IndexError):
        raise ConfigError(f"{flag} {text!r} is none of {FORMS}") from None
    return Lengths(text, sample)


def _named(name: str, numbers: list[float]) -> Callable[[random.Random], float]:
    """Raises ValueError or IndexError for anything that is no distribution."""
    if min(numbers) < 0 or numbers[0] < 1:
        raise ValueError
    if name == "choice":
        return lambda rng: rng.choice(numbers)
    if name == "exponential" and len(numbers) == 1:
        return lambda rng: rng.expovariate(1.0 / numbers[0])
    mean, spread = numbers[0], numbers[1]
    if len(numbers) == 2 and name == "normal":
        return lambda rng: rng.gauss(mean, spread)
    if len(numbers) == 2 and name == "lognormal":
        middle = math.log(mean) - 0.5 * spread * spread
        return lambda rng: rng.lognormvariate(middle, spread)
    raise ValueError
