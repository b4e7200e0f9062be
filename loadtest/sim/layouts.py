"""The layouts that there are for a model, the one to choose, and what to try on it.

The most tokens per second and GPU wins, among those that hold the workload's requests and keep the SLO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.sizing import (
    Demand,
    Prices,
    Sizing,
    best_layout,
    first_token_s,
    literal_ratio,
    prices,
    size,
)
from ellm.loadtest.sim.workload import SimRequest, make_requests
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.planner.admission import TIMELY
from ellm.worker.engine.planner.slack import AIM

LOADS = (0.9, 1.2)  # of capacity, where nobody says what comes
_DRAWN = 2_000  # requests that the arithmetic goes by
_ROOMY = 1 << 30  # tokens: no request is cut
_FEW_TOO_LONG = 0.01
_HOST_GB = 64.0  # per GPU, at most, where nobody says how much there is
_TURNS = 8  # requests in a trial, as a multiple of what a step holds
_TOKENS = 1_500_000  # of output in a trial, at most, about


@dataclass(frozen=True, slots=True)
class Layout:
    """One number of GPUs. `sizing` None: it cannot be, and `reason` says why."""

    tp: int
    sizing: Sizing | None
    reason: str = ""
    share_too_long: float = 0.0  # of the requests: they alone would not fit into the KV pool

    @property
    def serves(self) -> bool:
        return self.sizing is not None and self.sizing.running > 0.0


@dataclass(frozen=True, slots=True)
class Sized:
    """What arithmetic has to say."""

    setting: Setting  # with the chosen tp; its rate and host_gb are still to be set
    demand: Demand
    layouts: list[Layout]
    chosen: Sizing
    share_too_long: float
    prices: Prices
    first_token_s: float  # of the mean prompt alone
    literal_ratio: float  # that the best plan leaves uncached and recomputes in each step
    literal_ratio_with_link: float  # the same where the link brings its part of it


def size_up(setting: Setting, tps: Sequence[int]) -> Sized:
    """All of `tps`, and the one to choose. Raises ConfigError, in one line, if none holds the model, or none
    keeps the SLO for even one request."""
    requests, _ = make_requests(setting.workload, _DRAWN, 0, _ROOMY)
    layouts = [_layout(replace(setting, tp=tp), requests) for tp in tps]
    able = [layout for layout in layouts if layout.serves]
    if not able:
        _refuse(setting, layouts)
    holding = [layout for layout in able if layout.share_too_long <= _FEW_TOO_LONG] or able
    chosen = best_layout([layout.sizing for layout in holding if layout.sizing is not None])
    setting = replace(setting, tp=chosen.tp)
    demand, device, slo_s = Demand.of(requests), setting.device, setting.tpot_slo_ms / 1000
    price = prices(device)
    return Sized(
        setting,
        demand,
        layouts,
        chosen,
        next(layout.share_too_long for layout in layouts if layout.tp == chosen.tp),
        price,
        first_token_s(device, demand),
        literal_ratio(device, demand, slo_s, setting.max_step_tokens),
        literal_ratio(device, demand, slo_s, setting.max_step_tokens, price.stream_share),
    )


def host_gb(sized: Sized) -> float:
    """A host tier that could pay: room for all that pausing may admit, at least a quarter of the pool, at
    most 64 GB per GPU."""
    chosen = sized.chosen
    wanted = max(sized.chosen.phi_tokens, 0.25 * chosen.capacity_tokens) * chosen.kv_token_bytes
    return float(min(ceil(wanted / 1e9), _HOST_GB * chosen.tp))


def num_requests(sized: Sized) -> int:
    """Enough that the memory fills and turns over a few times; fewer where outputs are long."""
    enough = max(200, ceil(_TURNS * sized.chosen.running))
    return min(enough, max(60, int(_TOKENS / sized.demand.output_tokens)))


def rates(sized: Sized, rate: float | None, load: float | None) -> list[float]:
    """Requests per second to try: what was asked for, else 0.9 and 1.2 of capacity."""
    if rate is not None:
        return [rate]
    return [share * sized.chosen.capacity_requests_s for share in ((load,) if load is not None else LOADS)]


def _layout(setting: Setting, requests: Sequence[SimRequest]) -> Layout:
    try:
        sizing = size(setting.device, requests, setting.tpot_slo_ms / 1000, setting.max_num_seqs)
    except ConfigError as error:
        return Layout(setting.tp, None, error.message)
    room = sizing.capacity_tokens
    long = sum(request.prompt_tokens + request.output_tokens > room for request in requests)
    reason = "" if sizing.running else f"a lone request takes {1e3 * sizing.step_s:.1f} ms per token"
    return Layout(setting.tp, sizing, reason, long / len(requests))


def _refuse(setting: Setting, layouts: Sequence[Layout]) -> None:
    sized = [layout for layout in layouts if layout.sizing is not None]
    if sized:
        best = min(layout.sizing.step_s for layout in sized if layout.sizing is not None)
        raise ConfigError(
            f"no request of {setting.model} keeps {setting.tpot_slo_ms:g} ms per token on {setting.gpu}: a "
            f"step with one takes {1e3 * best:.1f} ms at best, and plans aim at {TIMELY * AIM:.3f} of the SLO"
        )
    tps = ", ".join(str(layout.tp) for layout in layouts)
    raise ConfigError(f"{setting.model} cannot run on {setting.gpu} at TP {tps}: {layouts[-1].reason}")
