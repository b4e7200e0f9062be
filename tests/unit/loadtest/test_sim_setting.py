"""A load becomes a rate, and the requests of a seed are the same whatever else is set."""

from __future__ import annotations

from statistics import fmean

import pytest

from ellm.loadtest.sim.setting import Setting, offer


@pytest.mark.parametrize(("model", "load"), [("llama2-13b", 0.5), ("llama3-8b", 1.5)])
def test_a_load_is_what_comes_of_it(model: str, load: float) -> None:
    offered = offer(Setting(model=model, load=load, cv=1.0, num_requests=4_000), 1)
    assert offered.load == pytest.approx(load, rel=0.05)


def test_capacity_minds_the_places() -> None:
    """Llama-3-8B on an H200 has room for 700 requests: with 64 places it is these that run out."""
    roomy, tight = (
        offer(Setting(model="llama3-8b", gpu="h200", load=1.0, num_requests=500, max_num_seqs=n), 1)
        for n in (1024, 64)
    )
    assert roomy.bound_tok_s == tight.bound_tok_s
    rates = [
        sum(r.output_tokens for r in offered.requests) / offered.requests[-1].arrival_s
        for offered in (roomy, tight)
    ]
    assert rates[1] < 0.5 * rates[0]
    assert rates[1] / tight.load < 0.5 * tight.bound_tok_s


def test_a_rate_is_kept() -> None:
    offered = offer(Setting(rate=4.0, cv=1.0, num_requests=4_000), 1)
    assert len(offered.requests) / offered.requests[-1].arrival_s == pytest.approx(4.0, rel=0.05)
    output = fmean(r.output_tokens for r in offered.requests)
    assert offered.load == pytest.approx(4.0 * output / offered.bound_tok_s, rel=0.05)


def test_a_seed_gives_the_same_lengths_at_any_load() -> None:
    one, two = (offer(Setting(load=load, num_requests=50), 7).requests for load in (0.5, 1.5))
    assert [r.output_tokens for r in one] == [r.output_tokens for r in two]
