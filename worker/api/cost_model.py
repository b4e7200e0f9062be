"""How long a step takes: predicted from what is in it, learnt from steps that were measured.

    T = t0 + max(weights / bandwidth, linear work per row * rows / throughput)
        + KV bytes read / bandwidth + attention work of chunks / throughput + sampling

The maximum is written as hinges `max(0, rows - knee)`, so that T is linear in coefficients that are never
negative: convex in rows, as the maximum is. They are fitted by least squares of the *relative* error with
exponential forgetting, in information form (A = sum of outer products, solved by projected coordinate descent
from the last solution): the same estimate as recursive least squares, but it keeps the sign constraint, and a
coefficient that no recent step says anything about stays where it was. A step far off the typical error
counts less the farther it is (Huber), so that a hiccup moves nothing; a bias that persists is a drift, and
then the past is forgotten faster.

It does not know sequences, plans or devices.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import mul
from statistics import fmean, median
from typing import Any, Self

KNEES = (4, 16, 64, 96, 144, 216, 324)  # rows; between two of them a device turns compute-bound
_ROWS, _KV, _PAIRS = 64.0, 1e4, 1e5  # scales that bring every feature near 1
_WARM_UP = 16  # steps until the typical error means something
_WINDOW = 32  # steps over which hiccups and drift are told apart
_DRIFT = 0.1  # a median signed error beyond this is a drift
_SOLVE_EVERY = 4  # steps, once warm
_MIN_SCALE = 0.02  # an error below this is never an outlier


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What a step costs by."""

    rows: int  # tokens that run
    decode_rows: int  # of them, one for each decoding sequence
    kv_tokens: int  # context read, summed over entries
    attention_pairs: int  # (query, key) pairs of chunks
    logits_rows: int  # rows through the LM head

    @property
    def prefill_rows(self) -> int:
        return self.rows - self.decode_rows


class CostModel:
    """Predicts `elapsed_s` of a step. `forgetting` is the weight of the past per step. `chunk_term`: a step
    with a chunk may cost something for that alone, however small the chunk is, as on a CPU; else its rows
    bear it."""

    def __init__(
        self, *, knees: Iterable[int] = KNEES, forgetting: float = 0.995, chunk_term: bool = False
    ) -> None:
        assert 0.5 < forgetting <= 1.0
        self.knees = tuple(knees)
        self.forgetting = forgetting
        self.chunk_term = chunk_term
        self.num_steps = 0
        size = 6 + len(self.knees) + chunk_term
        self._theta = [0.0] * size
        self._a = [[0.0] * size for _ in range(size)]
        self._b = [0.0] * size
        self._residuals: deque[float] = deque(maxlen=_WINDOW)  # signed, relative to the prediction
        self._sizes: list[float] = []  # their absolute values, sorted
        self._errors: deque[float] = deque(maxlen=128)  # relative to the measurement
        self._since_drift = 0

    @classmethod
    def known(
        cls,
        *,
        overhead_s: float,
        row_s: float = 0.0,
        knee_rows: int = 0,
        kv_token_s: float = 0.0,
        pair_s: float = 0.0,
        logits_row_s: float = 0.0,
        every_row_s: float = 0.0,
    ) -> Self:
        """A model with given coefficients (seconds per unit): `overhead_s` up to `knee_rows`, then `row_s`
        more for each further row; `every_row_s` for those below the knee, too."""
        model = cls(knees=(knee_rows,))
        model._theta = [
            overhead_s,
            every_row_s * _ROWS,
            0.0,
            kv_token_s * _KV,
            pair_s * _PAIRS,
            logits_row_s * _ROWS,
            row_s * _ROWS,
        ]
        return model

    def predict(self, features: StepFeatures) -> float:
        """Seconds; 0 before the first measured step."""
        seconds: float = sum(map(mul, self._theta, self._vector(features)))
        return seconds

    def update(self, features: StepFeatures, elapsed_s: float) -> None:
        """Learn from one measured step. About 15 microseconds once warm, 100 before."""
        if elapsed_s <= 0.0:
            return
        vector = self._vector(features)
        predicted = sum(map(mul, self._theta, vector))
        weight = 1.0
        if self.num_steps:
            self._errors.append(abs(elapsed_s - predicted) / elapsed_s)
            weight = self._judge((elapsed_s - predicted) / max(predicted, 1e-9))
        self.num_steps += 1
        self._accumulate(vector, elapsed_s, max(elapsed_s, predicted), weight)
        if self.num_steps < 8 * _WARM_UP:
            self._solve(sweeps=8)
        elif self.num_steps % _SOLVE_EVERY == 0:
            self._solve(sweeps=2)

    @property
    def error_median(self) -> float:
        """Median relative error of the last 128 predictions, each made before its step was learnt."""
        return median(self._errors) if self._errors else 0.0

    @property
    def error_mean(self) -> float:
        """Mean of the same; a hiccup shows here and not in the median."""
        return fmean(self._errors) if self._errors else 0.0

    @property
    def coefficients(self) -> dict[str, float]:
        """Seconds per unit of each feature, by name."""
        t = self._theta
        names = {
            "overhead_s": t[0],
            "row_s": t[1] / _ROWS,
            "decode_row_s": t[2] / _ROWS,
            "kv_token_s": t[3] / _KV,
            "pair_s": t[4] / _PAIRS,
            "logits_row_s": t[5] / _ROWS,
        }
        hinges = t[6 : 6 + len(self.knees)]
        names |= {f"row_above_{k}_s": v / _ROWS for k, v in zip(self.knees, hinges, strict=True)}
        return names | ({"chunk_s": t[-1]} if self.chunk_term else {})

    def to_dict(self) -> dict[str, Any]:
        """Builtins only; `from_dict` goes on where this one stood."""
        return {
            "version": 1,
            "knees": list(self.knees),
            "forgetting": self.forgetting,
            "chunk_term": self.chunk_term,
            "num_steps": self.num_steps,
            "theta": list(self._theta),
            "a": [list(row) for row in self._a],
            "b": list(self._b),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError for a dict that `to_dict` of this version did not write."""
        if data.get("version") != 1:
            raise ValueError(f"cost model of version {data.get('version')!r}, this one reads 1")
        model = cls(
            knees=data["knees"], forgetting=data["forgetting"], chunk_term=data.get("chunk_term", False)
        )
        size = len(model._theta)
        if len(data["theta"]) != size or len(data["b"]) != size or any(len(row) != size for row in data["a"]):
            raise ValueError("cost model of another size")
        model.num_steps = data["num_steps"]
        model._theta, model._b = list(data["theta"]), list(data["b"])
        model._a = [list(row) for row in data["a"]]
        return model

    def _vector(self, f: StepFeatures) -> list[float]:
        rows = f.rows
        vector = [
            1.0,
            rows / _ROWS,
            f.decode_rows / _ROWS,
            f.kv_tokens / _KV,
            f.attention_pairs / _PAIRS,
            f.logits_rows / _ROWS,
            *[(rows - knee) / _ROWS if rows > knee else 0.0 for knee in self.knees],
        ]
        if self.chunk_term:
            vector.append(float(rows > f.decode_rows))
        return vector

    def _judge(self, residual: float) -> float:
        """How much a step with this residual counts; notices drift."""
        residuals, sizes = self._residuals, self._sizes
        if len(residuals) == _WINDOW:
            sizes.remove(abs(residuals[0]))
        residuals.append(residual)
        insort(sizes, abs(residual))
        if self.num_steps < _WARM_UP:
            return 1.0
        self._since_drift += 1
        if self._since_drift >= _WARM_UP and self.num_steps % _SOLVE_EVERY == 0:
            recent = median(list(residuals)[-_WARM_UP:])
            if abs(recent) > _DRIFT:
                self._since_drift = 0
                self._scale_past(0.1)
        limit = 3.0 * max(_MIN_SCALE, sizes[len(sizes) // 2])
        return min(1.0, limit / max(abs(residual), 1e-12))

    def _scale_past(self, factor: float) -> None:
        self._a = [[factor * x for x in row] for row in self._a]
        self._b = [factor * x for x in self._b]

    def _accumulate(self, vector: list[float], elapsed_s: float, norm: float, weight: float) -> None:
        """Add one equation `vector . theta = elapsed_s`, divided by `norm` so that errors are relative."""
        keep, scale = self.forgetting, weight / (norm * norm)
        for i, x in enumerate(vector):
            row, wx = self._a[i], scale * x
            if wx:
                self._a[i] = [keep * a + wx * y for a, y in zip(row, vector, strict=True)]
                self._b[i] = keep * self._b[i] + wx * elapsed_s
            else:
                self._a[i] = [keep * a for a in row]
                self._b[i] *= keep

    def _solve(self, sweeps: int) -> None:
        """Projected coordinate descent on the normal equations, from where theta stands."""
        theta, b = self._theta, self._b
        faintest = 1e-6 * self._a[0][0]  # below it the steps that spoke of a coefficient are long forgotten
        for _ in range(sweeps):
            for i, row in enumerate(self._a):
                diagonal = row[i]
                if diagonal > faintest:
                    gradient = b[i] - sum(map(mul, row, theta))
                    theta[i] = max(0.0, theta[i] + gradient / diagonal)
