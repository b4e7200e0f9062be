"""Everything that can become of a request shows in timelines that an operator asks for by HTTP: two workers
with too little memory, one of them with a host tier, and clients until all of it has happened."""

from __future__ import annotations

import random
import threading
import time

import httpx
from support.router_server import MODEL, RouterServer
from support.small_worker import SmallWorker

PHASES = {"queued", "sent", "prefill", "first_token", "parked", "restored", "recomputed", "done"}
CLIENTS = 20
WAIT_S = 90.0


def test_every_phase_is_seen() -> None:
    stop, seen, orders = threading.Event(), set[str](), list[list[str]]()

    def load(url: str, number: int) -> None:
        draw, count = random.Random(number), 0
        with httpx.Client(base_url=url, timeout=120) as client:
            while not stop.is_set():
                name = f"{number}-{count}"
                count += 1
                body = {
                    "model": MODEL,
                    "prompt": draw.choices(range(4, 4000), k=draw.randrange(50, 300)),
                    "max_tokens": draw.randrange(60, 200),
                    "ignore_eos": True,
                }
                client.post("/v1/completions", json=body, headers={"x-request-id": name}).raise_for_status()
                (choice,) = client.get(f"/admin/requests/{name}").json()["choices"]
                order = [event["event"] for event in choice["events"]]
                times = [event["at_s"] for event in choice["events"]]
                assert times == sorted(times)
                orders.append(order)
                seen.update(order)

    workers = [SmallWorker(0, step_s=0.005), SmallWorker(1, num_host_blocks=0, step_s=0.005)]
    with RouterServer(workers) as server:
        threads = [threading.Thread(target=load, args=(server.url, number)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + WAIT_S
        while not seen >= PHASES and time.monotonic() < deadline and any(t.is_alive() for t in threads):
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join(60)
    assert PHASES - seen == set()
    for order in orders:
        assert order[:2] == ["queued", "sent"]
        assert order[-1] == "done"
        assert order.count("first_token") == 1
        assert order.count("parked") >= order.count("restored")
