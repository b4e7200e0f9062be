"""What holds for every policy, whatever the reports say: who is never chosen, and that nothing breaks."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ellm.router.policies import POLICIES, Choice, Replica, RoutedRequest, make_policy
from ellm.router.policies.candidates import MAX_AGE_S, SPENT, STALE, UNWEIGHTED
from ellm.worker.api.report import WorkerReport, WorkerState

REPORT = WorkerReport(
    seq=1,
    num_blocks=4096,
    headroom_tokens=60_000,
    prefill_rate_tok_s=10_000.0,
    decode_step_s=(0.02, 1e-5, 1e-7),
    max_running=256,
    last_submit_seq=(("me", 0), ("other", 0)),
)
PROMPT = tuple(range(200))
REQUEST = RoutedRequest(PROMPT)
policies = pytest.mark.parametrize("name", sorted(POLICIES))
numbers = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-300, 1e300, inf, -inf, nan]), st.floats(0.0, 1e9), st.integers(0, 10**9)
)


def heard(name: str, at: float = 0.0, **changes: object) -> Replica:
    made = Replica(name)
    made.heard(replace(REPORT, **changes), "me", at)  # type: ignore[arg-type]
    return made


@st.composite
def wild_reports(draw: st.DrawFn) -> WorkerReport:
    """Any numbers at all in everything that a prediction reads."""
    names = (
        "num_running", "num_waiting", "num_parked", "num_blocks", "headroom_tokens", "running_tokens",
        "waiting_tokens", "host_tokens", "dropped_now_tokens", "recompute_debt_s", "step_time_s",
        "prefill_rate_tok_s", "max_running", "prefill_tokens", "prefix_hits", "prefix_queries",
    )  # fmt: skip
    state: WorkerState = draw(st.sampled_from(["loading", "ready", "draining", "failed"]))
    return WorkerReport(
        seq=1,
        state=state,
        decode_step_s=(draw(numbers), draw(numbers), draw(numbers)),
        last_submit_seq=(("other", draw(st.integers(0, 10**6))),),
        prefix_digest=draw(st.binary(max_size=40)),
        **{name: draw(numbers) for name in names},  # type: ignore[arg-type]
    )


@policies
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_no_report_and_no_clock_breaks_a_choice(name: str, data: st.DataObject) -> None:
    """Infinities, ages below 0, reports without anything in them: a worker that is ready is chosen, and none
    that is not."""
    replicas = []
    for number in range(data.draw(st.integers(0, 5))):
        made = Replica(f"w{number}")
        for _ in range(data.draw(st.integers(0, 2))):
            made.heard(data.draw(wild_reports()), "me", data.draw(st.floats(-10.0, 10.0)))
        made.weight = data.draw(st.sampled_from([1.0, 0.0, -1.0, 1e-9, inf, nan]))
        made.admit_tokens = data.draw(st.sampled_from([inf, 0.0, -5.0, 1e4]))
        made.place(data.draw(st.integers(0, 9)), 900, 1000)
        replicas.append(made)
    session = data.draw(st.sampled_from([None, "s"]))
    request = RoutedRequest(PROMPT, data.draw(st.integers(1, 4)), session_id=session)
    choice = make_policy(name, 1).choose(request, replicas, data.draw(st.floats(-20.0, 20.0)))
    ready = {r.replica_id for r in replicas if r.report.state == "ready" and r.reported_at > -inf}
    assert (choice is None) == (not ready)
    if choice is not None:
        assert choice.replica_id in ready
        assert 0 <= choice.cached_tokens < len(PROMPT)


@policies
def test_who_drains_or_failed_is_never_chosen(name: str) -> None:
    policy = make_policy(name, 1)
    busy = heard("busy", num_running=200, num_waiting=50, waiting_tokens=50_000, headroom_tokens=0)
    others = [heard(state, state=state) for state in ("draining", "failed", "loading")]
    for number in range(50):
        request = RoutedRequest(PROMPT, session_id=f"s{number}")
        choice = policy.choose(request, [*others, busy], 0.1)
        assert choice is not None
        assert choice.replica_id == "busy"
    assert policy.choose(REQUEST, others, 0.1) is None
    assert policy.choose(REQUEST, [Replica("silent")], 0.1) is None


@policies
def test_old_reports_fall_back_and_say_so(name: str) -> None:
    policy = make_policy(name, 1)
    old = [heard("a", num_running=9), heard("b")]
    now = MAX_AGE_S + 0.1
    choices = [policy.choose(REQUEST, old, now) for _ in range(40)]
    assert {choice.reason for choice in choices if choice} == {STALE}
    young = heard("c", at=now, num_running=99, waiting_tokens=9_000)
    choice = policy.choose(REQUEST, [*old, young], now)
    assert choice is not None
    assert (choice.replica_id, choice.reason != STALE) == ("c", True)


@policies
def test_advice_is_followed_while_it_leaves_a_choice(name: str) -> None:
    policy = make_policy(name, 1)
    replicas = [heard("off"), heard("spent"), heard("on", num_running=50)]
    replicas[0].weight = 0.0
    replicas[1].admit_tokens = 150.0
    replicas[1].place(1, 200, 200)  # spends what it was lent
    chosen = {policy.choose(RoutedRequest(PROMPT, session_id=f"s{n}"), replicas, 0.1) for n in range(30)}
    assert {choice.replica_id for choice in chosen if choice} == {"on"}


@policies
@pytest.mark.parametrize("now", [0.1, MAX_AGE_S + 1.0])
def test_a_distrusted_worker_is_the_last_resort(name: str, now: float) -> None:
    """Spent budgets, and reports that no longer come, are no reason to go by weight 0."""
    policy = make_policy(name, 1)
    replicas = [heard("off"), heard("spent", num_running=50), heard("spent too", num_running=60)]
    replicas[0].weight = 0.0
    for replica in replicas[1:]:
        replica.admit_tokens = 0.0

    def choices() -> list[Choice]:
        made = [policy.choose(RoutedRequest(PROMPT, session_id=f"s{n}"), replicas, now) for n in range(40)]
        return [choice for choice in made if choice is not None]

    chosen = choices()
    assert len(chosen) == 40
    assert "off" not in {choice.replica_id for choice in chosen}
    assert {choice.reason for choice in chosen} == {SPENT if now < MAX_AGE_S else STALE}
    for replica in replicas:
        replica.weight = 0.0
    chosen = choices()
    assert len(chosen) == 40
    assert {choice.reason for choice in chosen} == {UNWEIGHTED if now < MAX_AGE_S else STALE}


@pytest.mark.parametrize(("weight", "share"), [(0.25, 0.5), (2.0, 0.5), (0.05, 0.0)])
def test_headroom_weighs_once_what_the_controller_weighs_too(weight: float, share: float) -> None:
    """Ordinary weights say what is predicted anyway; one far below the mean is followed."""
    policy = make_policy("headroom", 1)
    replicas = [heard("a", last_submit_seq=()), heard("b", last_submit_seq=())]
    replicas[1].weight = weight
    counts: Counter[str] = Counter()
    for _ in range(200):
        choice = policy.choose(RoutedRequest((1, 2, 3)), replicas, 0.1)  # too short to be remembered
        assert choice is not None
        counts[choice.replica_id] += 1
    assert abs(counts["b"] / 200 - share) < 0.12


@policies
def test_the_same_seed_makes_the_same_choices(name: str) -> None:
    def choices(seed: int) -> list[str]:
        policy, replicas = make_policy(name, seed), [heard(f"w{n}", last_submit_seq=()) for n in range(6)]
        found = []
        for number in range(60):
            choice = policy.choose(RoutedRequest(PROMPT, session_id=None), replicas, 0.001 * number)
            assert choice is not None
            found.append(choice.replica_id)
            next(r for r in replicas if r.replica_id == choice.replica_id).place(1, 200, 200)
        return found

    assert choices(3) == choices(3)
    if name != "least-requests":  # without ties it knows no chance
        assert choices(3) != choices(4)


LOADS = ("headroom", "least-requests", "power-of-two", "prefix-affinity")


@pytest.mark.parametrize("name", LOADS)
def test_more_load_never_attracts(name: str) -> None:
    """Of two workers that differ in load alone, the busier one gets no more than its half."""
    heavier: dict[str, dict[str, object]] = {
        "running": {"num_running": 40, "running_tokens": 30_000, "headroom_tokens": 30_000},
        "waiting": {"num_waiting": 8, "waiting_tokens": 9_000},
    }
    if name == "headroom":
        heavier |= {
            "prompts under way": {"prefill_tokens": 20_000},
            "memory": {"headroom_tokens": 100},
            "debt": {"recompute_debt_s": 1.5},
            "to come back": {"host_tokens": 58_000},
            "slow prompts": {"prefill_rate_tok_s": 2_000.0},
            "slow steps": {"decode_step_s": (0.2, 1e-4, 1e-6)},
        }
    for what, changes in heavier.items():
        policy = make_policy(name, 5)
        pair = [heard("busy", **changes), heard("idle")]
        counts = Counter(c.replica_id for _ in range(200) if (c := policy.choose(REQUEST, pair, 0.05)))
        assert counts["busy"] <= counts["idle"], what
        assert counts["idle"] == 200 or name == "prefix-affinity", what


def most_sent(name: str) -> int:
    """Ten routers see one idle worker among ten busy ones in the same reports, 0.5 s old, and each sends ten
    requests. Its own are known to each router; of the others' it must think itself. Returns what the idle
    one gets; 15 of them would make all alike."""
    sent: Counter[str] = Counter()
    for number in range(10):
        policy = make_policy(name, number)
        replicas = [busy_for(f"w{n}", 6 if n else 0) for n in range(11)]
        chance = random.Random(number)
        for _ in range(10):
            prompt = tuple(chance.randrange(1000) for _ in range(300))
            choice = policy.choose(RoutedRequest(prompt), replicas, 3.5)
            assert choice is not None
            sent[choice.replica_id] += 1
            next(r for r in replicas if r.replica_id == choice.replica_id).place(1, 300, 300)
    assert max(sent.values()) == sent["w0"]
    return sent["w0"]


def test_routers_with_the_same_old_reports_do_not_herd() -> None:
    most = {name: most_sent(name) for name in LOADS}
    assert most["headroom"] <= 40
    assert most["least-requests"] >= 60  # what it is like without a thought of the others


def busy_for(name: str, requests: int) -> Replica:
    """With `requests` of 300 tokens waiting; others have sent it about ten per second for three seconds."""
    made = Replica(name)
    for tick in range(31):
        report = replace(
            REPORT,
            num_waiting=requests,
            waiting_tokens=300 * requests,
            last_submit_seq=(("me", 0), ("others", tick)),
        )
        made.heard(report, "me", 0.1 * tick)
    return made
