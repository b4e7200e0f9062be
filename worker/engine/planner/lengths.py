"""How long outputs get: P(output > k), learnt from requests that ended and from those that still run.

Kaplan and Meier's estimator (1958) over bins of 32 tokens. A request counts in a bin once it has left the
bin, by passing on or by ending there; one that still runs has said all it can about the bins behind it. One
that was cut by its own max_tokens is censored: it counts half in its last bin (the actuarial rule) and ends
nowhere.

The prior is eight requests with exponential lengths of mean 2,000, thinned as eight such requests would be.
Eight are outweighed within seconds of traffic, yet they keep the first admissions from trusting two short
answers, and a mean above most traffic errs on the side of too little admitted. The past is forgotten by 0.998
per end, so about the last 500 count; the prior is not, so that it speaks again where nobody has been of late.
Past the last bin anyone has reached, it is all there is.

It does not know requests: who calls keeps how many bins of a request were counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp, expm1

BIN = 32  # tokens
# Tokens from now, whole bins; close enough that what peaks between two is within a few per cent of either.
HORIZONS = (0, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)

_PRIOR_MEAN = 2000.0  # tokens
_PRIOR_WEIGHT = 8.0  # requests
_FORGETTING = 0.998  # weight of the past per end
_RENORM = 1e9  # a scale at which the counters are divided through
_NEVER = 1e-3  # a chance below this is 0: nobody's memory is planned by it
_FLOOR = 1e-280  # survival never underflows, so that ratios stay defined
# News after which the next question rebuilds the table: ends, or bins passed. 256 running requests pass 256
# bins in 32 steps.
_REBUILD_ENDS = 4
_REBUILD_PASSED = 256


class OutputLengths:
    """The posterior of one engine. `passed` is O(1), `finished` O(bins it adds), a question O(1) once the
    table stands; the table is O(bins) and is built anew at most once in 4 ends or 256 bins passed."""

    def __init__(self, horizons: Sequence[int] = HORIZONS, *, forgetting: float = _FORGETTING) -> None:
        """`horizons` in tokens, ascending from 0, multiples of BIN."""
        assert 0.5 < forgetting <= 1.0
        assert all(h % BIN == 0 for h in horizons), "horizons are whole bins"
        assert list(horizons) == sorted(set(horizons)), "horizons ascend"
        self.horizons = tuple(horizons)
        self._ahead = [h // BIN for h in horizons]
        self._forgetting = forgetting
        self._scale = 1.0  # weight of an event now, in units of the counters
        self._exposed: list[float] = []  # by bin: requests that have left it
        self._ended: list[float] = []  # by bin: of these, those that ended there
        self._prior: list[float] = []  # by bin: the prior's requests that reach it
        self._num_ends = 0  # since the table was built
        self._num_passed = 0
        self._survival = [1.0]  # entry j: P(output > BIN * j)
        self._edges = [1.0]  # the same, as far beyond the table as anybody has asked
        self._sums = [0.0]  # entry j: sum of P(output > k) over k < BIN * j
        self._rows: dict[tuple[int, int], tuple[float, ...]] = {}  # by bin and max_tokens

    def passed(self, index: int) -> None:
        """A running request has put out all of bin `index`, tokens (BIN * index, BIN * (index + 1)], and goes
        on. To be called once per request and bin, in order."""
        self._reach(index)
        self._exposed[index] += self._scale
        self._num_passed += 1

    def finished(self, length: int, *, censored: bool, num_passed: int = 0) -> None:
        """A request ended after `length` tokens; its first `num_passed` bins were counted by `passed`.
        `censored`: it would have gone on, had its max_tokens let it."""
        if length <= 0:
            return
        last = (length - 1) // BIN
        assert num_passed <= last + 1, "more bins were passed than the output has"
        self._reach(last)
        exposed, scale = self._exposed, self._scale
        for index in range(num_passed, last):
            exposed[index] += scale
        if num_passed <= last:
            exposed[last] += 0.5 * scale if censored else scale
            if not censored:
                self._ended[last] += scale
        self._num_ends += 1
        self._scale = scale / self._forgetting
        if self._scale > _RENORM:
            self._renormalise()

    def survival(self, num_tokens: int) -> float:
        """P(output > num_tokens); linear within a bin."""
        self._refresh()
        return self._at(num_tokens)

    def expected_remaining(self, num_output: int, max_tokens: int) -> float:
        """E[min(output, max_tokens) - num_output | output > num_output]: at least 1 while below `max_tokens`,
        0 from there on."""
        room = max_tokens - num_output
        if room <= 0:
            return 0.0
        self._refresh()
        mean = (self._sum_below(max_tokens) - self._sum_below(num_output)) / self._at(num_output)
        return min(max(1.0, mean), float(room))

    def conditional(self, num_output: int, max_tokens: int) -> tuple[float, ...]:
        """P(output > g + h | output > g) for each horizon h, with g = `num_output` rounded down to a bin. A
        request that reaches `max_tokens` between two horizons counts as it is just before, at the later
        of the two, so that its peak is seen; 0 beyond. The tuple is shared, not copied."""
        self._refresh()
        index = num_output // BIN
        row = self._rows.get((index, max_tokens))
        if row is None:
            room = max_tokens - BIN * index if num_output < max_tokens else 0
            count = len(self.horizons) if room > self.horizons[-1] else bisect_left(self.horizons, room)
            edges = self._edges
            if index + self._ahead[-1] >= len(edges):
                self._extend(index + self._ahead[-1] + 1)
            alive = [edges[index + ahead] for ahead in self._ahead[:count]]
            if 0 < count < len(self.horizons):
                alive.append(self._at(max_tokens - 1))
            kept = [s / alive[0] for s in alive if s >= _NEVER * alive[0]]
            row = self._rows[index, max_tokens] = (*kept, *[0.0] * (len(self.horizons) - len(kept)))
        return row

    def _at(self, num_tokens: int) -> float:
        """`survival`, from a table that stands."""
        table = self._survival
        index, offset = divmod(num_tokens, BIN)
        if index + 1 < len(table):
            left = table[index]
            return left - (left - table[index + 1]) * offset / BIN
        return max(_FLOOR, table[-1] * exp(((len(table) - 1) * BIN - num_tokens) / _PRIOR_MEAN))

    def _extend(self, size: int) -> None:
        """Beyond the table there is the prior alone."""
        edges, factor = self._edges, exp(-BIN / _PRIOR_MEAN)
        while len(edges) < size:
            edges.append(max(_FLOOR, edges[-1] * factor))

    def _reach(self, index: int) -> None:
        while len(self._exposed) <= index:
            self._prior.append(_PRIOR_WEIGHT * exp(-BIN * len(self._exposed) / _PRIOR_MEAN))
            self._exposed.append(0.0)
            self._ended.append(0.0)

    def _renormalise(self) -> None:
        factor = 1.0 / self._scale
        self._exposed = [factor * x for x in self._exposed]
        self._ended = [factor * x for x in self._ended]
        self._scale = 1.0

    def _refresh(self) -> None:
        if self._num_ends >= _REBUILD_ENDS or self._num_passed >= _REBUILD_PASSED:
            self._rebuild()

    def _rebuild(self) -> None:
        """S(j + 1) = S(j) (1 - ended / exposed), the prior among both."""
        self._num_ends = self._num_passed = 0
        self._rows.clear()
        scale, share = (
            self._scale,
            -expm1(-BIN / _PRIOR_MEAN),
        )  # of the prior's requests in a bin, that end there
        alive, total = 1.0, 0.0
        survival, sums = [alive], [total]
        for exposed, ended, prior in zip(self._exposed, self._ended, self._prior, strict=True):
            weight = scale * prior
            after = max(_FLOOR, alive * (1.0 - (ended + weight * share) / (exposed + weight)))
            total += BIN * alive - (alive - after) * (BIN - 1) / 2
            alive = after
            survival.append(alive)
            sums.append(total)
        self._survival, self._edges, self._sums = survival, survival.copy(), sums

    def _sum_below(self, num_tokens: int) -> float:
        """Sum of P(output > k) over k < num_tokens."""
        table, sums = self._survival, self._sums
        index, count = divmod(num_tokens, BIN)
        if index + 1 < len(table):
            return (
                sums[index]
                + count * table[index]
                - ((table[index] - table[index + 1]) * count * (count - 1) / (2 * BIN))
            )
        beyond = num_tokens - BIN * (len(table) - 1)
        return sums[-1] + table[-1] * expm1(-beyond / _PRIOR_MEAN) / expm1(-1.0 / _PRIOR_MEAN)
