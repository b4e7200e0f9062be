"""What happens to a sequence besides its tokens goes out with its next token, and only then."""

from __future__ import annotations

from dataclasses import replace

from support.engine_driver import LIMITS, EngineDriver, plain, request

from ellm.worker.api import wire
from ellm.worker.api.output import SequenceOutput
from ellm.worker.engine.sequence import MAX_EVENTS, Sequence


def test_a_preempted_sequence_says_what_it_had_to_do_again() -> None:
    driver = EngineDriver(replace(LIMITS, num_blocks=10), scheduler=plain(), prefix_caching=False)
    for name in ("a", "b"):
        driver.add(request(name, 12, max_tokens=14, ignore_eos=True))
    driver.run()
    told = {name: [event for out in driver.outputs[name] for event in out.events] for name in "ab"}
    report = driver.core.report(driver.now)
    assert report.num_preemptions == 1
    assert told["a"] == []
    assert [what for what, _, _ in told["b"]] == ["preempted", "recomputed"]
    assert told["b"][0][1] <= told["b"][1][1] <= driver.now
    assert told["b"][1][2] == report.recomputed_tokens > 0
    carriers = [out for out in driver.outputs["b"] if out.events]
    assert len(carriers) <= 2  # one token may be under way when it is preempted


def test_events_wait_for_an_output_and_are_bounded() -> None:
    asked = request("r")
    seq = Sequence(asked, 0, frozenset())
    seq.arrived_at = 10.0
    assert seq.take_events() == ()
    for number in range(MAX_EVENTS + 5):
        seq.note("parked", 10.5, number)
    events = seq.take_events()
    assert len(events) == MAX_EVENTS
    assert events[0] == ("parked", 0.5, 0)
    assert seq.take_events() == ()


def test_only_an_output_with_events_is_longer_on_the_wire() -> None:
    usual = SequenceOutput("r", 0, 3, (7,))
    assert len(wire.pack_output(usual)) == 4
    told = SequenceOutput("r", 0, 3, (7,), events=(("restored", 1.5, 32),))
    assert wire.unpack_output(wire.pack_output(told)) == told
