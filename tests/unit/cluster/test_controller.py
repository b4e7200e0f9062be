"""The brain: what comes of reports that are well, ill, old, doubled, of the dead, and of clocks that jump."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from support.reports import INFO, WELL, Fleet

from ellm.cluster.api.actions import Action, Advise, Distrust, Resign, Scale
from ellm.cluster.api.config import ControllerConfig
from ellm.cluster.api.guidance import Guidance
from ellm.cluster.api.view import TenantUse, View, WorkerView
from ellm.cluster.controller import Controller

CONFIG = ControllerConfig(tick_s=0.5, silent_s=3.0, stall_s=10.0)


class Run:
    """A brain that ticks every half second."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.brain = Controller(CONFIG, term=7)
        self.now = 1000.0
        self.actions: list[Action] = []

    def ticks(self, count: int) -> Guidance:
        for _ in range(count):
            self.now += CONFIG.tick_s
            self.actions += self.brain.tick(self.fleet.view(), self.now)
        return next(a.guidance for a in reversed(self.actions) if isinstance(a, Advise))

    def weights(self, count: int = 1) -> list[float]:
        by_epoch = {word.epoch: word.weight for word in self.ticks(count).workers}
        return [by_epoch[epoch] for epoch in self.fleet.epochs]

    def faults(self) -> list[tuple[str, str]]:
        return [(a.worker_id, a.reason) for a in self.actions if isinstance(a, Distrust)]


def test_equal_workers_weigh_alike() -> None:
    assert Run(Fleet(4)).weights(3) == [1.0] * 4


def test_a_slow_or_indebted_or_full_worker_gets_less_and_only_by_and_by() -> None:
    for change in (
        {"prefill_rate_tok_s": 2500.0},
        {"step_time_s": 0.08},
        {"recompute_debt_s": 1.5},
        {"uncached_token_ratio": 0.6},
        {"headroom_tokens": 320},
        {"slo_attainment": 0.0},
    ):
        run = Run(Fleet(4))
        run.weights(4)
        run.fleet.change(2, **change)
        first, later = run.weights(1), run.weights(20)
        assert later[2] < first[2] < 1.0
        assert later[2] < 0.75
        assert all(weight > 1.0 for i, weight in enumerate(later) if i != 2)
        run.fleet.reports[2] = replace(WELL, seq=10_000)
        assert abs(run.weights(40)[2] - 1.0) < 0.02


def test_who_does_not_serve_weighs_nothing_at_once() -> None:
    run = Run(Fleet(5))
    run.weights(4)
    for index, state in enumerate(("loading", "draining", "failed")):
        run.fleet.change(index, state=state)
    guidance = run.ticks(1)
    assert [word.weight for word in guidance.workers] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert [word.state for word in guidance.workers] == ["loading", "draining", "failed", "ready", "ready"]
    assert [word.admit_tokens for word in guidance.workers[:3]] == [0, 0, 0]


def test_a_silent_worker_is_distrusted_and_trusted_again() -> None:
    run = Run(Fleet(3))
    run.ticks(4)
    run.fleet.silent.add(1)
    assert run.weights(5)[1] > 0.0  # 2.5 s
    assert run.weights(2)[1] == 0.0
    assert run.faults() == [("w1", "silent")]
    run.fleet.silent.clear()
    assert run.weights(1)[1] > 0.0
    run.ticks(20)
    assert run.faults() == [("w1", "silent")]


def test_work_without_a_step_is_noticed_whatever_the_worker_says() -> None:
    fleet = Fleet(2)
    run = Run(fleet)
    run.ticks(2)
    steps = fleet.reports[0].num_steps
    for _ in range(21):
        fleet.change(0, num_steps=steps - 1, since_last_step_s=0.0)  # `view` adds one
        run.ticks(1)
    assert run.faults() == [("w0", "no step finished although there is work")]
    idle = Run(Fleet(1, num_running=0))
    for _ in range(40):
        idle.fleet.change(0, num_steps=5)
        idle.ticks(1)
    assert idle.faults() == []


def test_older_and_doubled_reports_change_nothing() -> None:
    brain = Controller(CONFIG, 1)
    new, old = replace(WELL, seq=9), replace(WELL, seq=8, state="draining")
    for tick, report in enumerate((new, old, old, new)):
        (advise,) = brain.tick(View((WorkerView(INFO, report, tick),)), 10.0 + tick)
        assert isinstance(advise, Advise)
        assert advise.guidance.workers[0].state == "ready"


class Place:
    """Incarnations of one worker id; each tick says who is heard and who is only listed."""

    def __init__(self) -> None:
        self.brain = Controller(CONFIG, 1)
        self.now = 0.0
        self.heard: dict[str, int] = {}

    def tick(self, *speak: str, silent: tuple[str, ...] = (), count: int = 1) -> dict[str, tuple[str, bool]]:
        advise: Action | None = None
        for _ in range(count):
            self.now += CONFIG.tick_s
            for epoch in speak:
                self.heard[epoch] = self.heard.get(epoch, 0) + 1
            views = [
                WorkerView(replace(INFO, epoch=epoch), replace(WELL, num_running=0), self.heard[epoch])
                for epoch in (*speak, *silent)
            ]
            advise = self.brain.tick(View(tuple(views)), self.now)[0]
        assert isinstance(advise, Advise)
        return {word.epoch: (word.state, word.weight > 0.0) for word in advise.guidance.workers}


def test_two_that_serve_under_one_id_both_get_requests() -> None:
    """Serve has given the id away again while its former owner is well."""
    place, well = Place(), ("ready", True)
    assert place.tick("former", count=4) == {"former": well}
    for _ in range(40):
        assert place.tick("former", "later") == {"former": well, "later": well}
    assert place.tick("later", count=2) == {"later": well}  # its line breaks
    assert place.tick("later", "former") == {"former": well, "later": well}


def test_a_former_incarnation_that_is_not_heard_any_more_is_not_believed() -> None:
    place, well = Place(), ("ready", True)
    place.tick("former", count=4)
    assert place.tick(silent=("former",), count=3) == {"former": well}  # 1.5 s
    assert place.tick("later", silent=("former",)) == {"former": ("failed", False), "later": well}
    assert place.tick("later") == {"later": well}
    assert place.tick("later", "former") == {"later": well}  # it comes late, from the dead


def test_a_line_that_breaks_for_a_while_is_no_other_incarnation() -> None:
    run = Run(Fleet(2))
    run.ticks(2)
    run.brain.tick(View(), run.now)
    assert run.weights(1) == [1.0, 1.0]


def test_a_later_controller_ends_this_one() -> None:
    brain = Controller(CONFIG, 3)
    assert isinstance(brain.tick(Fleet(1).view(newest_term=3), 1.0)[0], Advise)
    assert brain.tick(Fleet(1).view(newest_term=4), 2.0) == [Resign(4)]


def test_prompts_that_killed_workers_reach_all_routers_until_their_time_is_up() -> None:
    fleet = Fleet(1)
    fleet.note("r0", held_back=(b"p1",))
    run = Run(fleet)
    assert run.ticks(1).held_back == (b"p1",)
    fleet.note("r0", held_back=(b"p1",))  # it says so as long as it lasts
    assert run.ticks(10).held_back == (b"p1",)
    fleet.note("r0")
    assert run.ticks(int(CONFIG.held_back_s / CONFIG.tick_s)).held_back == ()


def test_a_fresh_controller_says_nothing_of_whom_it_has_not_heard() -> None:
    fleet = Fleet(2)
    fleet.note("r0", TenantUse("k", 10.0, None, 5.0, 0.0))
    brain = Controller(CONFIG, 1)
    silent, budgets = WorkerView(replace(INFO, worker_id="w9", epoch="e9"), None, 0), []
    for tick in range(6):
        view = fleet.view()
        action = brain.tick(replace(view, workers=(*view.workers, silent)), tick * CONFIG.tick_s)[0]
        assert isinstance(action, Advise)
        assert [(word.epoch, word.of) for word in action.guidance.workers] == [("e0", 3), ("e1", 3)]
        budgets.append(set(action.budgets))
    assert budgets == [set()] * 4 + [{"r0"}] * 2  # before, another router could have its share


def test_routers_that_left_are_not_counted() -> None:
    fleet = Fleet(1)
    fleet.note("r0")
    fleet.note("r1")
    run = Run(fleet)
    assert [run.ticks(1).num_routers for _ in range(6)] == [0, 0, 0, 0, 2, 2]  # two periods of notes
    del fleet.notes["r1"]
    assert run.ticks(12).num_routers == 1


def test_a_clock_that_jumps_declares_nobody_dead_and_nothing_ends() -> None:
    run = Run(Fleet(3))
    run.ticks(4)
    for jump in (3600.0, -7200.0, 1e9):
        run.now += jump
        assert min(run.weights(1)) > 0.0
    run.fleet.silent.add(0)
    run.now += 3600.0
    assert run.weights(1)[0] > 0.0  # one tick's silence, whatever the clock says
    assert run.faults() == []
    assert not any(isinstance(action, Scale) for action in run.actions)


share = st.floats(0.0, 1.0)
reports = st.builds(
    lambda seq, state, room, ratio, debt, step, rate, steps, waiting: replace(
        WELL,
        seq=seq,
        state=state,
        headroom_tokens=int(room * 16_000),
        uncached_token_ratio=ratio,
        recompute_debt_s=debt,
        step_time_s=step,
        prefill_rate_tok_s=rate,
        num_steps=steps,
        waiting_tokens=waiting,
    ),
    st.integers(0, 50),
    st.sampled_from(["ready", "ready", "loading", "draining", "failed"]),
    share,
    share,
    st.floats(0, 1e6),
    st.floats(0, 1e3),
    st.floats(0, 1e7),
    st.integers(0, 9),
    st.integers(0, 10**7),
)
words = st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.none() | reports, st.integers(0, 50))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.lists(words, max_size=8), st.floats(-1e6, 1e6)), max_size=12))
def test_whatever_comes_in_whatever_order(rounds: list[tuple[list[tuple], float]]) -> None:  # type: ignore[type-arg]
    """Words of any incarnation, with any numbers, at any time: weights and budgets stay what they are."""
    brain = Controller(CONFIG, 1)
    newest = 0
    for said, now in rounds:
        workers = tuple(
            WorkerView(replace(INFO, worker_id=f"w{place}", epoch=f"{place}{life}"), report, heard)
            for place, life, report, heard in said
        )
        for action in brain.tick(View(workers), now):
            if not isinstance(action, Advise):
                continue
            assert action.guidance.seq > newest
            newest = action.guidance.seq
            serving = [word for word in action.guidance.workers if word.state == "ready"]
            for word in action.guidance.workers:
                assert (word.weight > 0.0) == (word.state == "ready")
                assert word.admit_tokens >= -1
            if serving:
                mean = sum(word.weight for word in serving) / len(serving)
                assert 0.99 < mean < 1.1  # the floor lifts it a little
