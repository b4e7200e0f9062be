"""`ellm top`: the workers of a running server, live in the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ellm.deploy.http_client import RequestFailed, Server
from ellm.deploy.top_view import Metrics, parse_metrics, render

EPILOG = """
The bar is what a worker holds and has promised: # context with KV, r recomputed within each step, s streamed
from the host, p parked (its KV may be gone), . free. TTFT and TPOT are medians of what this router has
answered since the last look.
"""
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
HOME, TO_END = "\x1b[H", "\x1b[J"
LINE_END = "\x1b[K\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--api-key", help="the admin key, where the server has one")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="print it once, without colours, and leave")


def run(args: argparse.Namespace) -> int:
    server = Server(args.url, args.api_key, timeout_s=10.0)
    if args.once:
        width = shutil.get_terminal_size((120, 24)).columns
        workers, metrics = look(server)
        print("\n".join(render(workers, metrics, Metrics(), width, colour=False)))
        return 0
    look(server)  # what is wrong with the server is said before the screen is taken
    with screen():
        watch(server, max(0.1, args.interval))
    return 0


def watch(server: Server, interval_s: float) -> None:
    """Until Ctrl-C. A server that does not answer is looked at again."""
    last = Metrics()
    while True:
        size = shutil.get_terminal_size((120, 24))
        try:
            workers, metrics = look(server)
            lines = render(workers, metrics, last, size.columns)
            last = metrics
        except RequestFailed as error:
            lines = [error.message[: size.columns]]
        sys.stdout.write(HOME + LINE_END.join(lines[: size.lines - 1]) + LINE_END + TO_END)
        sys.stdout.flush()
        time.sleep(interval_s)


def look(server: Server) -> tuple[list[dict[str, object]], Metrics]:
    """Raises RequestFailed."""
    return server.get("/admin/workers")["workers"], parse_metrics(server.text("/metrics"))


@contextmanager
def screen() -> Iterator[None]:
    """The terminal's other screen, and back to what was there before, whatever happens."""
    sys.stdout.write(ENTER)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
