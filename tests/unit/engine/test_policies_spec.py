"""A policy and its parameters in one setting: what is understood, and what each mistake is told."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.policies import POLICIES, make_policy, resolve_config
from ellm.worker.engine.policies.base import Policy
from ellm.worker.engine.policies.spec import PolicySpec, bind, override, parse_spec, split_specs


class Literal(Policy):
    """Parameters of each kind."""

    def __init__(self, r: float, steps: int = 4, *, solver: str = "grid", adapt: bool = False) -> None:
        self.given = (r, steps, solver, adapt)


def bound(text: str) -> dict[str, object]:
    spec = parse_spec(text)
    return dict(bind(Literal, spec, override(SchedulerConfig(), spec)[1]))


def test_it_is_taken_apart() -> None:
    assert parse_spec("full-chunked") == parse_spec(" full-chunked () ") == PolicySpec("full-chunked")
    assert parse_spec("literal(0.2)") == PolicySpec("literal", (0.2,))
    text = "x(1, 1e-3, a=-2, b=slsqp, c=True, d=none, e = 1_000 )"
    named = {"a": -2, "b": "slsqp", "c": True, "d": None, "e": 1000}
    assert parse_spec(text) == PolicySpec("x", (1, 0.001), named)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "NAME"),
        ("a b", "NAME"),
        ("a(b=1", "NAME"),
        ("a(b=1) c", "NAME"),
        ("(b=1)", "NAME"),
        ("a(b=1, b=2)", "b is given twice"),
        ("a(b=1, 2)", "without a name after one with a name"),
        ("a(b=)", "a: b: ''"),
        ("a(b=1,)", "without a name"),
        ("a(,)", "''"),
        ("a(b=1; c=2)", "'1; c=2'"),
        ("a(b=nan)", "'nan'"),
        ("a(b=1e999)", "'1e999'"),
        ("a(2b=1)", "'2b'"),
        ("a(b=f(1))", re.escape("'f(1)'")),
    ],
)
def test_what_is_no_policy_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_spec(text)
    assert caught.value.param == "scheduler.policy"


def test_limits_of_the_scheduler_are_replaced() -> None:
    text = "full-recompute(max_num_seqs=40, watermark=0, max_step_tokens=512, tpot_slo_ms=50)"
    before = SchedulerConfig(policy=text, max_waiting=7)
    config, name, arguments = resolve_config(before)
    assert (name, arguments) == ("full-recompute", {})
    assert config == SchedulerConfig(
        policy=text, max_waiting=7, max_num_seqs=40, watermark=0.0, max_step_tokens=512, tpot_slo_ms=50.0
    )
    assert type(config.watermark) is float
    assert resolve_config(config) == (config, name, arguments)
    assert resolve_config(SchedulerConfig(policy="full-recompute(tpot_slo_ms=none)"))[0].tpot_slo_ms is None


def test_the_rest_goes_to_the_constructor() -> None:
    assert bound("literal(0.2)") == {"r": 0.2}
    assert bound("literal(0, 3, solver=slsqp, adapt=true, max_num_seqs=4)") == {
        "r": 0.0,
        "steps": 3,
        "solver": "slsqp",
        "adapt": True,
    }
    assert Literal(**bound("literal(steps=3, r=1)")).given == (1.0, 3, "grid", False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("literal", "literal needs r"),
        ("literal(a)", "r must be a number, not 'a'"),
        ("literal(true)", "r must be a number, not True"),
        ("literal(0.1, 0.5)", "steps must be a whole number, not 0.5"),
        ("literal(0.1, r=0.2)", "r is given twice"),
        ("literal(0.1, adapt=1)", "adapt must be true or false, not 1"),
        ("literal(0.1, 2, x)", "takes 2 values without a name, not 3"),
        ("literal(0.1, rho=2)", "no parameter 'rho'; it has: r, steps, solver, adapt"),
        ("literal(0.1, policy=x)", "no parameter 'policy'"),
        ("literal(0.1, max_num_seqs=4.5)", "max_num_seqs must be a whole number, not 4.5"),
        ("literal(0.1, watermark=high)", "watermark must be a number, not 'high'"),
        ("literal(0.1, tpot_slo_ms=fast)", "tpot_slo_ms must be a number or none, not 'fast'"),
    ],
)
def test_a_wrong_parameter_is_named(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        bound(text)
    assert caught.value.param == "scheduler.policy"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_takes_limits_and_refuses_what_it_does_not_know(name: str) -> None:
    if name == "literal":
        name = "literal(0.1)"
    assert isinstance(make_policy(SchedulerConfig(policy=name)), Policy)
    name, _, rest = name.partition("(")
    inside = rest.rstrip(")") + (", " if rest else "")
    assert resolve_config(SchedulerConfig(policy=f"{name}({inside}max_num_seqs=3)"))[0].max_num_seqs == 3
    with pytest.raises(ConfigError, match=f"{name} has no parameter 'nonsense'"):
        make_policy(SchedulerConfig(policy=f"{name}({inside}nonsense=3)"))


def test_an_unknown_policy_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown policy 'fastest'; known: .*full-recompute"):
        resolve_config(SchedulerConfig(policy="fastest(3)"))


def test_a_list_is_split_outside_parentheses() -> None:
    assert split_specs("a, b(x=1, y=2),c") == ["a", "b(x=1, y=2)", "c"]
    assert split_specs("a") == ["a"]


names = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda s: s not in ("true", "false", "none", "inf", "nan")
)
numbers = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.booleans()


@given(names, st.lists(numbers, max_size=3), st.dictionaries(names, numbers | names, max_size=4))
def test_what_is_written_out_is_read_back(
    name: str, positional: list[float], named: dict[str, float | str]
) -> None:
    inside = [repr(value) for value in positional]
    inside += [f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in named.items()]
    text = f"{name}({', '.join(inside)})"
    spec = parse_spec(text)
    assert spec == PolicySpec(name, tuple(positional), named)
    assert split_specs(f"{text},{text}") == [text, text]
