"""What a chaos run comes to: what was lost and corrupted, how long clients waited, whether that is enough.

Knows no cluster: it is given the answers that came and the faults that were applied.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ellm.loadtest.chaos_client import Answer, OpenLoop, Template
from ellm.loadtest.chaos_faults import Fault
from ellm.loadtest.result import Row

ROUTER_S = 3.0  # within which a broken connection is put down to a router that was killed
ROUTER_SLACK = 4  # requests that reached it between the count of its streams and its death
# How the death of a router looks to its clients: a broken line, or the ingress's own word (the product's
# errors are JSON) where no head had come yet.
BY_ROUTER = ("connection", "500: Internal Server Error")
PAUSE_S = 5.0  # the longest pause of a stream that a fault may cost: noticed at once, and moved
LONGER_PAUSE_S = {  # where time has to tell, after `fail_s` or `stall_s`
    "silent_node": 8.0, "kill_raylet": 8.0, "stop_rank": 12.0,
}  # fmt: skip


def judge(loop: OpenLoop, templates: list[Template], faults: Sequence[Fault]) -> dict[str, Any]:
    """What was lost, and how much of it."""
    failed = [a for a in loop.answers if a.error]
    excused = _of_routers(failed, [fault for fault in faults if fault.kind == "kill_router"])
    lost = [a for a in failed if id(a) not in excused]
    corrupted = [a for a in loop.answers if not templates[a.template].fits(a)]
    pauses = sorted(a.longest_pause_s for a in loop.answers)
    return {
        "requests": len(loop.answers),
        "lost": len(lost),
        "lost with their router": len(failed) - len(lost),
        "corrupted": len(corrupted),
        "longest pause s": round(pauses[-1], 3),
        "pause p99 s": round(pauses[int(0.99 * (len(pauses) - 1))], 3),
        "errors": sorted({a.error for a in failed}),
        "lost at": [(round(a.ended_at, 2), a.error) for a in lost],
        "corrupted texts": [(a.texts, templates[a.template].texts) for a in corrupted[:5]],
    }


def _of_routers(failed: Sequence[Answer], killed: Sequence[Fault]) -> set[int]:
    """Ids of the answers that broke off with a router that was killed: no more than it had streams."""
    left = [fault.streams + ROUTER_SLACK for fault in killed]
    found = set()
    for answer in sorted(failed, key=lambda a: a.ended_at):
        for place, fault in enumerate(killed):
            near = fault.at - 0.5 <= answer.ended_at <= fault.at + ROUTER_S
            if near and left[place] and answer.error.startswith(BY_ROUTER):
                left[place] -= 1
                found.add(id(answer))
                break
    return found


def by_kind(loop: OpenLoop, faults: list[Fault]) -> list[Row]:
    """One row for each kind of fault: recovery, and the longest pause that ended near one."""
    rows = []
    for kind in dict.fromkeys(fault.kind for fault in faults):
        mine = [fault for fault in faults if fault.kind == kind]
        recovered = [fault.recovered_s for fault in mine if fault.recovered_s is not None]
        near = [
            a.longest_pause_s
            for a in loop.answers
            for fault in mine
            if fault.at <= a.pause_at <= fault.at + (fault.recovered_s or 60.0)
        ]
        rows.append(
            {
                "fault": kind,
                "times": len(mine),
                "streams past their first token, least": min(fault.streams for fault in mine),
                "longest pause s": max(near, default=0.0),
                "whole again after s, median": statistics.median(recovered) if recovered else None,
                "worst s": max(recovered, default=None),
                "never": len(mine) - len(recovered),
            }
        )
    return rows


def against_plan(rows: Sequence[Row], faults: Sequence[Fault], asked: dict[str, int]) -> dict[str, Any]:
    """Which kinds were not applied as often as `asked`, and which cost a longer pause than they may."""
    applied = Counter(fault.kind for fault in faults)
    return {
        "not applied": {kind: n - applied[kind] for kind, n in asked.items() if applied[kind] != n},
        "pauses too long": {
            row["fault"]: row["longest pause s"]
            for row in rows
            if row["longest pause s"] > LONGER_PAUSE_S.get(row["fault"], PAUSE_S)
        },
    }


def passed(verdict: dict[str, Any]) -> bool:
    """Nothing was lost, nothing is left behind, everything came back, and all that was asked for was done."""
    none = (
        "lost", "corrupted", "leaked blocks", "live sequences", "leaked ranks", "leaked processes",
        "not applied", "pauses too long",
    )  # fmt: skip
    whole = verdict["workers at the end"] == verdict["workers at the start"]
    return not any(verdict[name] for name in none) and bool(verdict["recovered"]) and whole


def notes_of(verdict: dict[str, Any], tokens: int) -> list[str]:
    """What a reader has to know first. `tokens`: that a request puts out at least."""
    left = f"leaked blocks {verdict['leaked blocks']}, leaked processes {len(verdict['leaked processes'])}"
    words = [
        f"{verdict['requests']} requests of at least {tokens} output tokens, client retries 0: lost "
        f"{verdict['lost']}, corrupted {verdict['corrupted']}, {left}; {verdict['lost with their router']} "
        "connections broke with a router that was killed.",
        f"Longest pause of any stream {verdict['longest pause s']} s, 99th percentile "
        f"{verdict['pause p99 s']} s.",
    ]
    if load := verdict.get("load average"):
        words.append(f"Load average before and after: {', '.join(f'{one:.0f}' for one in load)}.")
    words += [
        f"{kind}: a pause of {pause_s:.1f} s, longer than a fault of this kind is to cost."
        for kind, pause_s in verdict["pauses too long"].items()
    ]
    return words + [f"{kind} was applied {n} times too few." for kind, n in verdict["not applied"].items()]
