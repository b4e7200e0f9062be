"""Requests that nobody means, made from the server's own description: each answer is as described, and
afterwards all is as before. `python -m ellm.loadtest.api_fuzz` does it at length on a whole cluster."""

from __future__ import annotations

import pytest
from support.router_server import EchoWorker, RouterServer, router_config, wait_until

from ellm.router.config import LimitsConfig

LIMITS = LimitsConfig(
    max_n=3, max_prompts=3, max_stop=4, max_stop_chars=64, max_logit_bias=32, max_messages=8
)


@pytest.mark.needs_module("schemathesis")
@pytest.mark.filterwarnings("default")  # what others' packages warn of as they are loaded
def test_what_nobody_means() -> None:
    from ellm.loadtest.api_cases import make_cases, send

    worker = EchoWorker(0, max_model_len=128)
    with RouterServer([worker], router_config(limits=LIMITS)) as server, server.client() as client:
        cases = make_cases(client.get("/openapi.json").json(), 200, 7)
        assert len(cases) >= 190
        verdict = send(cases, server.url)
        assert verdict.faults == []
        assert verdict.cases == len(cases)
        assert verdict.reached >= 0.3
        dispatcher = server.service.dispatcher
        wait_until(lambda: server.on_loop(lambda: not dispatcher.admission.num_inflight), 30)
        wait_until(lambda: worker.free_blocks() == worker.limits.num_blocks, 30)
        server.on_loop(worker.core.check)
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.needs_module("schemathesis")
@pytest.mark.filterwarnings("default")
def test_what_is_not_described_is_found() -> None:
    """The check can fail: a document that leaves out a status and has a wrong type."""
    from ellm.loadtest.api_cases import make_cases, send

    with RouterServer(config=router_config(limits=LIMITS)) as server, server.client() as client:
        document = client.get("/openapi.json").json()
        document["paths"] = {path: document["paths"][path] for path in ("/version", "/tokenize")}
        del document["paths"]["/tokenize"]["post"]["responses"]["400"]
        document["components"]["schemas"]["Version"] = {"type": "array"}
        verdict = send(make_cases(document, 200, 1), server.url)
    assert any("/version" in fault for fault in verdict.faults)
    assert any("/tokenize" in fault and "400" in fault for fault in verdict.faults)
