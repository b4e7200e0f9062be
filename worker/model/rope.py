"""Rotary position embedding as a checkpoint's config describes it: frequencies and nothing else.

Only scalings whose frequencies do not depend on the sequence's length are known: a row's result may
depend on its own position alone, or prefix reuse and chunking would change tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ellm.worker.api.errors import ConfigError

SUPPORTED_SCALINGS = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta and scaling of one model. `rotary_dim` of a head's dimensions rotate, the rest pass."""

    rotary_dim: int
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    # llama3 alone
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    @staticmethod
    def from_hf(raw: dict[str, Any], head_dim: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Raises ConfigError naming a scaling that is not supported or a parameter that is missing.
        """
        params: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
        params |= raw.get("rope_scaling") or {}
        params |= raw.get("rope_parameters") or {}
        kind = params.get("rope_type") or params.get("type") or "default"
        if kind not in SUPPORTED_SCALINGS or any(isinstance(v, dict) for v in params.values()):
            raise ConfigError(
                f"config.json: rope scaling {kind!r} is not supported; "
                f"supported are {', '.join(SUPPORTED_SCALINGS)}",
                param="rope_parameters",
            )
        partial = params.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
        rotary_dim = int(head_dim * partial)
        theta = float(params.get("rope_theta") or 10000.0)
        if kind == "default":
            return RopeConfig(rotary_dim, theta)
        needed: tuple[str, ...] = ("factor",)
        if kind == "llama3":
            needed += ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [key for key in needed if not isinstance(params.get(key), int | float)]
        if missing:
            raise ConfigError(
                f"config.json: rope scaling {kind!r} lacks {', '.join(missing)}", param="rope_parameters"
            )
        if kind == "linear":
            return RopeConfig(rotary_dim, theta, kind, float(params["factor"]))
        return RopeConfig(
            rotary_dim,
            theta,
            kind,
            float(params["factor"]),
            float(params["low_freq_factor"]),
            float(params["high_freq_factor"]),
            int(params["original_max_position_embeddings"]),
        )

    def max_positions(self, configured: int) -> int:
        """Context length. A linear scaling stretches what is written; llama3 configs write the result."""
        return int(configured * self.factor) if self.scaling == "linear" else configured

    def inverse_frequencies(self) -> list[float]:
        """[rotary_dim / 2] angles per position. llama3 is `apply_scaling` of the Llama 3.1 release: low
        frequencies are divided by `factor`, high ones kept, those between the two wavelengths blended."""
        half = self.rotary_dim // 2
        plain = [1.0 / self.theta ** (2 * i / self.rotary_dim) for i in range(half)]
        if self.scaling == "linear":
            return [f / self.factor for f in plain]
        if self.scaling == "llama3":
            return [self._llama3(f) for f in plain]
        return plain

    def _llama3(self, frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        low, high = self.low_freq_factor, self.high_freq_factor
        if wavelength < self.original_max_positions / high:
            return frequency
        if wavelength > self.original_max_positions / low:
            return frequency / self.factor
        smooth = (self.original_max_positions / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / self.factor + smooth * frequency
