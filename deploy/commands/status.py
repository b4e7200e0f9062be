"""`ellm status`: the workers of a running server, as its router sees them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ellm.deploy.http_client import Server

COLUMNS = (
    "id",
    "node",
    "state",
    "num_running",
    "num_waiting",
    "num_parked",
    "uncached_token_ratio",
    "free_blocks",
    "num_blocks",
    "rank_pids",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.add_argument("--api-key", help="the admin key, where the server has one")


def run(args: argparse.Namespace) -> int:
    server = Server(args.url, args.api_key, timeout_s=10.0)
    status = server.get("/admin/workers")
    if args.json:
        print(json.dumps(status))
        return 0
    several = len({worker.get("model") for worker in status["workers"]}) > 1
    columns = (*COLUMNS[:1], "model", *COLUMNS[1:]) if several else COLUMNS
    rows = [columns, *(tuple(_cell(worker.get(name)) for name in columns) for worker in status["workers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(x) for x in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)
