"""Pictures of the page for docs, of simulated workers under load with less memory than they would like:

PYTHONPATH=tests .venv/bin/python tests/support/page_pictures.py docs
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from support.browser import Browser, browser
from support.router_server import MODEL, RouterServer
from support.small_worker import SmallWorker

TEXT = "An elastic cache keeps what pays, gives up what does not, and computes that again in time."
LOAD_S = 45.0
CLIENTS = 24


def load(url: str, stop: threading.Event) -> None:
    with httpx.Client(base_url=url, timeout=120) as client, contextlib.suppress(httpx.TransportError):
        while not stop.is_set():
            prompt = random.choices(range(4, 4000), k=random.randrange(20, 300))
            size = random.randrange(60, 240)
            body = {"model": MODEL, "prompt": prompt, "max_tokens": size, "ignore_eos": True}
            client.post("/v1/completions", json=body)
            stop.wait(random.random() / 2)


def take(tab: Browser, url: str, folder: Path) -> None:
    tab.size(1360, 820)
    tab.colours("light")
    tab.open(url)
    tab.wait_for("document.querySelectorAll('.worker').length === 2")
    tab.wait_for("document.querySelector('#model').value")
    time.sleep(LOAD_S)
    tab.type(TEXT)
    tab.press("Enter", 13)
    tab.wait_for("document.querySelector('.turn.assistant .meta')", 60)
    tab.wait_for("document.querySelectorAll('.bar .parked')[1].offsetWidth > 20", 60)
    tab.picture(folder / "page-light.png")
    tab.colours("dark")
    tab.picture(folder / "page-dark.png")
    tab.colours("light")
    tab.size(390, 844, mobile=True)
    tab.run("document.querySelector('#cluster').scrollIntoView()")
    time.sleep(1.0)
    tab.picture(folder / "page-phone-cluster.png")
    assert tab.errors == [], tab.errors


def main(folder: Path) -> None:
    stop = threading.Event()
    with (
        RouterServer([SmallWorker(0), SmallWorker(1)]) as server,
        browser(Path(tempfile.mkdtemp())) as tab,
    ):
        threads = [
            threading.Thread(target=load, args=(server.url, stop), daemon=True) for _ in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            take(tab, server.url, folder)
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
