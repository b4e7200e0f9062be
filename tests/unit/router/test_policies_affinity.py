"""Prefixes and sessions: who has them, and when that counts for less than load."""

from __future__ import annotations

from collections import Counter

import pytest

from ellm.router.policies import Replica, RoutedRequest, make_policy
from ellm.router.policies.prompt_keys import PromptKeys
from ellm.worker.api.block_hash import block_hashes, hash_on, root_hash
from ellm.worker.api.report import WorkerReport
from ellm.worker.cache.digest_maker import DigestMaker

PROMPT = list(range(1000))


def replica(name: str, prompt: list[int] | None = None, salt: str = "", **changes: object) -> Replica:
    """A worker that has `prompt` cached."""
    maker = DigestMaker()
    for depth, block_hash in enumerate(block_hashes(prompt or [], 16, salt), 1):
        maker.add(block_hash, depth)
    values: dict[str, object] = {
        "num_blocks": 4096,
        "headroom_tokens": 60_000,
        "prefill_rate_tok_s": 10_000.0,
        "decode_step_s": (0.02, 1e-5, 1e-7),
        "max_running": 256,
        "prefix_digest": maker.packed(0.0),
    }
    made = Replica(name)
    made.heard(WorkerReport(seq=1, **(values | changes)), "me", 0.0)  # type: ignore[arg-type]
    return made


def test_several_blocks_at_once_hash_as_one_by_one() -> None:
    hashes = block_hashes(PROMPT, 16, "salt")
    for begin, end in ((0, 1), (0, 62), (3, 3), (5, 20)):
        parent = hashes[begin - 1] if begin else root_hash("salt")
        last = hashes[end - 1] if end > begin else parent
        assert hash_on(parent, PROMPT[16 * begin : 16 * end], 16) == last


@pytest.mark.parametrize("name", ["headroom", "prefix-affinity"])
def test_the_worker_that_has_the_prefix_is_chosen(name: str) -> None:
    policy = make_policy(name, 1)
    there = [replica("a"), replica("b", PROMPT[:640]), replica("c", PROMPT[:320])]
    choice = policy.choose(RoutedRequest([*PROMPT, 7]), there, 0.05)
    assert choice is not None
    assert (choice.replica_id, choice.cached_tokens) == ("b", 640)
    foreign = policy.choose(RoutedRequest(PROMPT, salt="tenant"), there, 0.05)
    assert foreign is not None
    assert foreign.cached_tokens == 0


@pytest.mark.parametrize("name", ["headroom", "prefix-affinity"])
def test_a_prefix_is_not_worth_every_queue(name: str) -> None:
    policy = make_policy(name, 1)
    crowd = {"num_running": 100, "num_waiting": 40, "waiting_tokens": 60_000}
    there = [replica("a"), replica("b", PROMPT, **crowd), replica("c")]
    chosen = {policy.choose(RoutedRequest(PROMPT), there, 0.05) for _ in range(20)}
    assert "b" not in {choice.replica_id for choice in chosen if choice}


@pytest.mark.parametrize("name", ["headroom", "prefix-affinity"])
def test_what_was_just_sent_is_expected_there(name: str) -> None:
    """A burst of one prompt goes together before any report says so; with 10 s it is forgotten."""
    policy = make_policy(name, 1)
    there = [replica("a"), replica("b"), replica("c")]
    first = policy.choose(RoutedRequest(PROMPT), there, 0.05)
    second = policy.choose(RoutedRequest(PROMPT[:600] + [5] * 400), there, 0.06)
    assert first is not None
    assert second is not None
    assert (second.replica_id, second.cached_tokens) == (first.replica_id, 512)  # of 37 blocks 32 are kept
    for r in there:
        r.heard(r.report, "me", 20.0)
    late = policy.choose(RoutedRequest(PROMPT), there, 20.0)
    assert late is not None
    assert late.cached_tokens == 0


def test_a_prompt_is_hashed_only_as_deep_as_somebody_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PromptKeys] = []
    init = PromptKeys.__init__

    def spy(self: PromptKeys, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(PromptKeys, "__init__", spy)
    there = [replica(f"w{n}") for n in range(20)] + [replica("b", PROMPT[:64])]
    make_policy("headroom", 1).choose(RoutedRequest(PROMPT), there, 0.05)
    assert [len(keys.keys) for keys in made] == [5]  # four blocks are there, the fifth is not


def test_the_last_token_always_runs() -> None:
    keys = PromptKeys(PROMPT[:32], 16, "")
    assert [keys.key(0) is None, keys.key(1) is None, keys.key(2) is None] == [False, False, True]
    assert [keys.tokens(n) for n in (0, 1, 2)] == [0, 16, 31]


def test_a_session_stays_where_it_is() -> None:
    names = [f"w{n}" for n in range(8)]
    there = [replica(name, num_running=10) for name in names]
    homes = {}
    for session in range(400):
        request = RoutedRequest(PROMPT, session_id=f"s{session}")
        choices = [make_policy("session", seed).choose(request, there, 0.05) for seed in (1, 2)]
        assert choices[0] == choices[1]  # any router
        assert choices[0] is not None
        homes[session] = choices[0].replica_id
    counts = Counter(homes.values())
    assert set(counts) == set(names)
    assert max(counts.values()) < 90
    # One worker less moves its own sessions alone.
    fewer = there[1:]
    for session, home in homes.items():
        choice = make_policy("session").choose(RoutedRequest(PROMPT, session_id=f"s{session}"), fewer, 0.05)
        assert choice is not None
        assert home == "w0" or choice.replica_id == home


def test_a_session_leaves_a_worker_that_is_too_busy() -> None:
    there = [replica(f"w{n}", num_running=10) for n in range(4)]
    request = RoutedRequest(PROMPT, session_id="mine")
    policy = make_policy("session", 1)
    home = policy.choose(request, there, 0.05)
    assert home is not None
    crowded = [
        replica(r.replica_id, num_running=60 if r.replica_id == home.replica_id else 10) for r in there
    ]
    away = policy.choose(request, crowded, 0.05)
    assert away is not None
    assert away.replica_id != home.replica_id
    assert away.reason == "session-busy"


def test_of_many_workers_the_busiest_is_worth_it_for_a_long_prefix() -> None:
    policy = make_policy("headroom", 1)
    there = [replica(f"w{n}", prefill_tokens=1000 + 10 * n) for n in range(39)]
    there.append(replica("has", PROMPT * 4, prefill_tokens=2000))
    choice = policy.choose(RoutedRequest([*PROMPT * 4, 7]), there, 0.05)
    assert choice is not None
    assert choice.replica_id == "has"


def test_of_many_workers_some_are_drawn_and_the_best_of_them_is_taken() -> None:
    policy = make_policy("headroom", 1)
    there = [replica(f"w{n:02d}", prefill_tokens=1000 * n) for n in range(40)]
    counts = Counter(
        choice.replica_id
        for n in range(400)
        if (choice := policy.choose(RoutedRequest([n] * 40), there, 0.05))
    )
    assert counts.most_common(1)[0][0] == "w00"
    assert len(counts) > 8  # not the same few again and again
    assert max(counts) < "w30"


def test_of_many_workers_with_the_same_beginning_the_one_with_most_of_it_is_found() -> None:
    """A system prompt that everybody has; one has the conversation, too."""
    policy = make_policy("headroom", 1)
    there = [replica(f"w{n:02d}", PROMPT, prefill_tokens=1000) for n in range(39)]
    there.append(replica("deep", PROMPT * 4, prefill_tokens=1100))
    for _ in range(20):
        choice = policy.choose(RoutedRequest([*PROMPT * 4, 7]), there, 0.05)
        assert choice is not None
        assert choice.replica_id == "deep"


def test_where_none_of_those_drawn_can_be_had_all_are_asked() -> None:
    policy = make_policy("headroom", 1)
    there = [replica(f"w{n:02d}", state="draining") for n in range(39)]
    there.append(replica("ready"))
    for _ in range(20):
        choice = policy.choose(RoutedRequest([9] * 40), there, 0.05)
        assert choice is not None
        assert (choice.replica_id, choice.reason) == ("ready", "headroom")
