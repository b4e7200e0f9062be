"""Pictures of the page for docs, of a real server under load with less memory than it would like:

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
from support.served import served

from ellm.deploy.ports import free_ports

QUESTION = "What does the list method append do?"
LOAD_S = 60.0
CLIENTS = 14
WORDS = ("list", "dict", "tuple", "set", "string", "file", "object", "method", "class", "function", "loop")


def load(url: str, stop: threading.Event) -> None:
    with httpx.Client(base_url=url, timeout=120) as client, contextlib.suppress(httpx.TransportError):
        while not stop.is_set():
            prompt = "The " + " ".join(random.choices(WORDS, k=random.randrange(10, 60)))
            size = random.randrange(40, 180)
            body = {"model": "pydoc-5m", "prompt": prompt, "max_tokens": size, "ignore_eos": True}
            client.post("/v1/completions", json=body)
            stop.wait(random.random())


def take(tab: Browser, url: str, folder: Path) -> None:
    tab.size(1360, 860)
    tab.colours("light")
    tab.open(url)
    tab.wait_for("document.querySelectorAll('.worker').length === 2")
    tab.wait_for("document.querySelector('#model').value")
    time.sleep(LOAD_S)
    tab.type(QUESTION)
    tab.press("Enter", 13)
    tab.wait_for("document.querySelector('.turn.assistant .meta')", 60)
    tab.wait_for("[...document.querySelectorAll('.bar .parked')].some((bar) => bar.offsetWidth > 0)", 60)
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
    (port,) = free_ports(1)
    flags = ["--port", str(port), "--workers", "2", "--device", "cpu", "--kv-blocks", "64"]
    flags += ["--tpot-slo-ms", "250", "--ttft-slo-ms", "1500", "--set", f"worker.cache.host_bytes={8 << 20}"]
    stop = threading.Event()
    with served(*flags) as server, browser(Path(tempfile.mkdtemp())) as tab:
        url = server.wait_until_ready()
        threads = [threading.Thread(target=load, args=(url, stop), daemon=True) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            take(tab, url, folder)
        finally:
            stop.set()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
