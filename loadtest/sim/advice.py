"""What to do with a model on a GPU: which layout, and whether partial caching, a host tier or neither pays.

Arithmetic (`sizing`) proposes, short simulations (`trials`) decide: a way that arithmetic rules out is named
with the numbers that do so, one that it allows counts as paying only if the simulated engine gains by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from ellm.loadtest.sim.layouts import Sized
from ellm.loadtest.sim.table import in_bytes
from ellm.loadtest.sim.trials import BASELINE, OURS, Partial, Trial, run_trials

PAYS, PAYS_NOT = "pays", "does not pay"
GAIN = 1.02  # in goodput: less is noise
_QUICKER, _QUICKER_S = 0.9, 0.05  # TTFT counts as lower below this share of the other, and by this much
_COMFORTABLE = 0.9  # of capacity
_FILLING = 4  # times the requests that run at once: fewer say little


@dataclass(frozen=True, slots=True)
class Advice:
    """One sentence or two on one question."""

    topic: str  # "layout", "warning", "what pays here", "partial caching", "host tier", "adaptive policy"
    verdict: str  # in a few words
    text: str


def advise(
    sized: Sized,
    at: Sequence[float],
    host: float,
    *,
    rate: float | None = None,
    jobs: int = 1,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[list[Trial], list[Advice]]:
    """Simulate at the rates `at`, with and without `host` GB, and say what pays. `rate` is what will come, if
    somebody knows."""
    partial = _partial(sized, host)
    trials = run_trials(
        sized.setting,
        at,
        sized.chosen.capacity_requests_s,
        host,
        partial,
        jobs=jobs,
        on_progress=on_progress,
    )
    ways = [_on_partial_caching(sized, trials, partial), _on_host(sized, trials, host), _on_pausing(trials)]
    paying = [one.topic for one in ways if one.verdict == PAYS]
    short = any(trial.preemptions for trial in trials if trial.policy == BASELINE)
    if paying:
        text = "The figures below say how much, and why."
    elif short:
        text = f"{BASELINE} does as well here."
    else:
        text = f"Memory never ran short: {BASELINE} preempted nobody."
    summary = Advice("what pays here", " and ".join(paying) or "neither", text)
    return trials, [_on_layout(sized, rate), *_warnings(sized), *_small_trials(sized), summary, *ways]


def arithmetic(sized: Sized, host: float, *, rate: float | None = None) -> list[Advice]:
    """What is known without a simulation: what is ruled out, and what only trials could tell."""
    partial = _partial(sized, host)
    verdict = _ruled_out(sized, partial) if partial is None else "may pay"
    tried = "" if partial is None else f" By the cost model {partial.policy} would be best."
    return [
        _on_layout(sized, rate),
        *_warnings(sized),
        Advice("partial caching", verdict, _partial_text(sized, partial) + tried),
        Advice("host tier", "not tried", f"{_host_text(sized)}."),
    ]


def as_result(sized: Sized, trials: Sequence[Trial], advice: Sequence[Advice]) -> dict[str, Any]:
    """The content of the file that `ellm plan --json` writes."""
    return {
        "version": 1,
        "setting": asdict(sized.setting),
        "model": asdict(sized.setting.device.model),
        "gpu": asdict(sized.setting.device.gpu),
        "workload": asdict(sized.demand),
        "layouts": [asdict(layout) for layout in sized.layouts],
        "chosen": asdict(sized.chosen),
        "share_too_long": sized.share_too_long,
        "prices": asdict(sized.prices),
        "literal_ratio": sized.literal_ratio,
        "literal_ratio_with_link": sized.literal_ratio_with_link,
        "first_token_s": sized.first_token_s,
        "trials": [asdict(trial) for trial in trials],
        "advice": [asdict(one) for one in advice],
    }


def gains(ours: Trial, other: Trial) -> bool:
    """More goodput; or as much, and first tokens that come sooner by a tenth and 50 ms."""
    if ours.goodput_tok_s > GAIN * other.goodput_tok_s:
        return True
    sooner = other.ttft_mean_s - ours.ttft_mean_s
    quicker = ours.ttft_mean_s < _QUICKER * other.ttft_mean_s and sooner > _QUICKER_S
    return quicker and ours.goodput_tok_s * GAIN > other.goodput_tok_s


def _partial(sized: Sized, host: float) -> Partial | None:
    """What to simulate if a share of every request may better be left out."""
    stream, ratio = sized.prices.stream_share, sized.literal_ratio_with_link
    if not host or ratio < sized.literal_ratio:
        stream, ratio = 0.0, sized.literal_ratio
    if not ratio:
        return None
    blocks = sized.chosen.capacity_tokens / sized.setting.block_size * ratio / (1.0 - ratio)
    policy = f"literal({ratio:.2f}, stream={stream:.2f})" if stream else f"literal({ratio:.2f})"
    return Partial(policy, ceil(1.1 * blocks) + 4, stream > 0.0)


def _on_layout(sized: Sized, rate: float | None) -> Advice:
    chosen = sized.chosen
    others = [
        f"TP {layout.tp} {layout.sizing.capacity_tok_s_per_gpu:.0f}"
        for layout in sized.layouts
        if layout.sizing is not None and layout.tp != chosen.tp and layout.serves
    ]
    text = f"{chosen.capacity_tok_s_per_gpu:.0f} tok/s per GPU at capacity"
    if others:
        text += f", against {', '.join(others)}"
    text += (
        f". Weights take {in_bytes(chosen.weight_bytes)} and leave {in_bytes(chosen.pool_bytes)}: M/w "
        f"{chosen.pool_over_weights:.2f}, so no trick with KV memory alone could gain more than "
        f"{chosen.capacity_gain_limit:.2f}x."
    )
    if rate is not None:
        count = ceil(rate / (_COMFORTABLE * chosen.capacity_requests_s))
        text += (
            f" {rate:g} requests per second are {rate / chosen.capacity_requests_s:.2f} of its capacity: "
            f"{count} replica{'s' if count > 1 else ''} at a load of {_COMFORTABLE} or less."
        )
    return Advice("layout", f"TP {chosen.tp}", text)


def _warnings(sized: Sized) -> list[Advice]:
    chosen, setting = sized.chosen, sized.setting
    found = []
    if sized.share_too_long:
        found.append(
            f"{100 * sized.share_too_long:.1f} % of the requests alone are longer than the KV pool of "
            f"{chosen.capacity_tokens:,} tokens: they would be refused, and the trials cut or leave them out"
        )
    if setting.ttft_slo_ms is not None and sized.first_token_s > setting.ttft_slo_ms / 1000:
        found.append(
            f"the mean prompt alone takes {1e3 * sized.first_token_s:.0f} ms to its first token: a TTFT of "
            f"{setting.ttft_slo_ms:g} ms is out of reach for it"
        )
    if chosen.limited_by == "max_num_seqs":
        found.append(
            f"max_num_seqs {setting.max_num_seqs} is what limits a step, not memory, which holds "
            f"{chosen.requests_held:.0f} requests: nothing that saves memory can gain"
        )
    if chosen.limited_by == "slo":
        found.append(
            f"the SLO is what limits a step, at {chosen.running:.0f} requests, not memory, which holds "
            f"{chosen.requests_held:.0f}"
        )
    return [Advice("warning", "note", text[0].upper() + text[1:] + ".") for text in found]


def _small_trials(sized: Sized) -> list[Advice]:
    count, running = sized.setting.num_requests, sized.chosen.running
    if count >= _FILLING * running:
        return []
    text = (
        f"Trials of {count} requests hardly fill a memory in which {running:.0f} run: --num-requests "
        f"{ceil(2 * _FILLING * running)} would."
    )
    return [Advice("warning", "note", text)]


def _partial_text(sized: Sized, partial: Partial | None) -> str:
    """How many tokens could be recomputed in a step, and how many there are."""
    chosen, price = sized.chosen, sized.prices
    count, step_ms = chosen.capacity_tokens, 1e3 * chosen.full_step_s
    alone, both = price.literal_limit_tokens, price.literal_limit_with_link_tokens
    text = (
        f"Recomputing the {count:,} tokens of memory in a step takes "
        f"{1e3 * count * price.recompute_s:,.1f} ms, the step itself {step_ms:.1f} ms; it pays below "
        f"{alone:,.0f} tokens, with the host link beside it below {both:,.0f}."
    )
    if partial is None and price.literal_with_link_may_pay and not sized.literal_ratio_with_link:
        text += " Yet by the cost model no share of the context beats none by 2 %."
    return text


def _ruled_out(sized: Sized, partial: Partial | None) -> str:
    """What to say where partial caching does not pay as it was tried."""
    needs_link = sized.literal_ratio_with_link > sized.literal_ratio
    return "not without a host tier" if needs_link and (partial is None or not partial.streams) else PAYS_NOT


def _on_partial_caching(sized: Sized, trials: Sequence[Trial], partial: Partial | None) -> Advice:
    text, no = _partial_text(sized, partial), _ruled_out(sized, partial)
    if partial is None:
        return Advice("partial caching", no, text)
    pairs = _pairs(trials, partial.policy, None, BASELINE, 0.0)
    won = any(gains(ours, other) for ours, other in pairs)
    text += (
        f" By the cost model, spare rows of a step included, {partial.policy} would be best. Simulated, "
        f"against {BASELINE}: {_compare(pairs)}."
    )
    return Advice("partial caching", PAYS if won else no, text)


def _host_text(sized: Sized) -> str:
    """Who could pause, and what it costs to come back."""
    chosen, price = sized.chosen, sized.prices
    useful = chosen.phi_tokens * chosen.kv_token_bytes
    if chosen.phi > 1.0:
        why = f"steps are short enough for {chosen.phi:.2f}x the requests to take turns (phi); " + (
            f"the paused ones would hold {in_bytes(useful)} more than the pool"
            if useful
            else "the pool has room for all of them"
        )
    else:
        why = (
            f"SLO/T is {chosen.slo_over_full_step:.2f}, less pausing costs: nobody can pause (phi 1), so the "
            "host only takes what is preempted"
        )
    why += (
        f". A token comes back in {1e6 * price.link_s:.3g} us by the link, {1e6 * price.recompute_s:.3g} us "
        "by computing"
    )
    return why[0].upper() + why[1:]


def _on_host(sized: Sized, trials: Sequence[Trial], host: float) -> Advice:
    why = _host_text(sized)
    if not host:
        return Advice("host tier", "not tried", f"{why}. --host-gb is 0.")
    pairs = _pairs(trials, OURS, host, OURS, 0.0)
    won = any(gains(ours, other) for ours, other in pairs)
    text = f"{why}. {host:g} GB: {_compare(pairs)}."
    return Advice("host tier", PAYS if won else PAYS_NOT, text)


def _on_pausing(trials: Sequence[Trial]) -> Advice:
    pairs = _pairs(trials, OURS, 0.0, BASELINE, 0.0)
    won = any(gains(ours, other) for ours, other in pairs)
    lost = any(gains(other, ours) for ours, other in pairs)
    verdict = "mixed" if won and lost else PAYS if won else PAYS_NOT
    return Advice("adaptive policy", verdict, f"Against {BASELINE}, without a host tier: {_compare(pairs)}.")


def _pairs(
    trials: Sequence[Trial], policy: str, host: float | None, other: str, other_host: float
) -> list[tuple[Trial, Trial]]:
    """The two at each rate; `host` None: whatever it has."""
    mine = [t for t in trials if t.policy == policy and host in (None, t.host_gb)]
    theirs = {t.rate: t for t in trials if t.policy == other and t.host_gb == other_host}
    return [(t, theirs[t.rate]) for t in mine]


def _compare(pairs: Sequence[tuple[Trial, Trial]]) -> str:
    """At each load, the second of a pair and then the first."""
    return "; ".join(
        f"at load {a.load:.2f} goodput {b.goodput_tok_s:.0f} -> {a.goodput_tok_s:.0f} tok/s, SLO "
        f"{b.slo_attainment:.2f} -> {a.slo_attainment:.2f}, mean TTFT {b.ttft_mean_s:.3g} -> "
        f"{a.ttft_mean_s:.3g} s"
        for a, b in pairs
    )
