"""The open-loop load generator of `ellm bench`: requests by the clock, at any OpenAI-compatible server.

    options     what was asked for
    plan        arrivals + lengths + dataset + content -> PlannedRequest, all before the first one is sent
    run         one sender process per core that is needed (sender), with a client (http_client, grpc_client)
    summary     records -> figures; report_json, report_html, compare show them; sweep repeats at other rates

`loadtest/bench.py` is another thing: it measures the engine beside its peers.
"""
