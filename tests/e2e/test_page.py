"""The page at `/` in a real browser: it streams a chat, draws the cluster, is usable by keyboard and on a
phone, asks nobody else for anything, and shows the cluster to the admin alone.

With ELLM_PICTURES=FOLDER the pictures are kept there.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from support.browser import Browser, browser
from support.router_server import MODEL, EchoWorker, RouterServer, router_config

pytestmark = [pytest.mark.needs_tool("chromium"), pytest.mark.needs_module("websockets")]

ADMIN = "sk-admin"
TEXT = "A list keeps what was put into it."
ANSWERED = "document.querySelectorAll('.turn.assistant .meta').length"


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    with RouterServer([EchoWorker(0, step_s=0.01), EchoWorker(1, step_s=0.01)]) as running:
        yield running


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def page(server: RouterServer, tab: Browser) -> Browser:
    """Opened, and drawn once."""
    tab.size(1280, 860)
    tab.colours("light")
    tab.open(server.url)
    tab.wait_for("document.querySelectorAll('.worker').length === 2")
    tab.wait_for("document.querySelector('#model').value")
    return tab


def quiet(tab: Browser, server: RouterServer) -> None:
    """No error, and nothing asked of anybody else."""
    assert tab.errors == []
    assert {urlsplit(url).netloc for url in tab.requested} == {urlsplit(server.url).netloc}


def picture(tab: Browser, folder: Path, name: str) -> bytes:
    path = Path(os.environ.get("ELLM_PICTURES", folder)) / f"page-{name}.png"
    tab.picture(path)
    return path.read_bytes()


def test_a_chat_streams(page: Browser, server: RouterServer) -> None:
    assert page.run("document.activeElement.id") == "prompt"
    page.run("window.seen = []")
    watch = "new MutationObserver(() => seen.push(document.querySelector('.turn.assistant p')?.textContent))"
    page.run(f"{watch}.observe(document.querySelector('#log'), {{childList: true, subtree: true}})")
    page.type(TEXT)
    page.press("Enter", 13)
    page.wait_for(ANSWERED)
    shown = page.run("document.querySelector('.turn.assistant p').textContent")
    assert shown.strip().startswith(TEXT)
    lengths = page.run("[...new Set(seen.filter((t) => t).map((t) => t.length))]")
    assert lengths == sorted(lengths)
    assert len(lengths) > 3, "it came all at once"
    assert "first token" in page.run("document.querySelector('.meta').textContent")
    page.run("document.querySelector('.meta .link').click()")
    page.wait_for("document.querySelector('#timeline-dialog').open")
    events = page.run("[...document.querySelectorAll('.events b')].map((b) => b.textContent)")
    assert events == ["queued", "sent", "prefill", "first token", "done"]
    page.press("Escape", 27)
    page.wait_for("!document.querySelector('#timeline-dialog').open")
    quiet(page, server)


def test_an_answer_can_be_stopped(page: Browser, server: RouterServer) -> None:
    for worker in server.workers:
        worker.executor.gate.clear()
    try:
        page.run("document.querySelector('#prompt').focus()")
        page.type(TEXT)
        page.press("Enter", 13)
        page.wait_for("!document.querySelector('#stop').hidden")
        page.press("Escape", 27)
        page.wait_for("document.querySelector('#stop').hidden && !document.querySelector('#send').disabled")
    finally:
        for worker in server.workers:
            worker.executor.gate.set()
    page.press("Tab", 9)  # out of the text and on to the model
    assert page.run("document.activeElement.id") == "model"
    quiet(page, server)


def test_the_cluster_is_drawn_as_it_lives(page: Browser, server: RouterServer, tmp_path: Path) -> None:
    stop = threading.Event()

    def load(number: int) -> None:
        with server.client() as client:
            while not stop.is_set():
                body = {"model": MODEL, "prompt": [5 + number] * 400, "max_tokens": 60, "ignore_eos": True}
                client.post("/v1/completions", json=body)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        page.wait_for("[...document.querySelectorAll('.bar .running')].some((bar) => bar.offsetWidth > 3)")
        page.wait_for("[...document.querySelectorAll('.figure')].every((f) => /^[0-9]/.test(f.textContent))")
        page.wait_for("document.querySelectorAll('.spark .p50')[2].getAttribute('d').includes('L')")
        light = picture(page, tmp_path, "light")
        page.colours("dark")
        assert picture(page, tmp_path, "dark") != light
        said = page.run("document.querySelector('.bar').getAttribute('aria-label')")
        assert said.startswith("KV memory of w0: running ")
        assert "2 workers, 1 router" in page.run("document.querySelector('#summary').textContent")
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    page.wait_for("[...document.querySelectorAll('.bar .running')].every((bar) => bar.offsetWidth < 1)")
    quiet(page, server)


def test_it_fits_a_phone(page: Browser, server: RouterServer, tmp_path: Path) -> None:
    page.size(375, 780, mobile=True)
    page.wait_for("innerWidth === 375")
    assert page.run("document.documentElement.scrollWidth") <= 375
    outside = "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > 376)"
    assert page.run(f"{outside}.map((e) => e.className)") == []
    data = picture(page, tmp_path, "phone")
    assert struct.unpack(">II", data[16:24]) == (750, 1560)
    page.run("document.querySelector('#cluster').scrollIntoView()")
    picture(page, tmp_path, "phone-cluster")
    quiet(page, server)


def test_without_the_admin_key_the_cluster_is_not_shown(tab: Browser) -> None:
    config = router_config(api_keys=("sk-user",), admin_key=ADMIN)
    with RouterServer([EchoWorker(0)], config) as server:
        tab.open("about:blank")  # the former page asks its server no more
        tab.errors.clear()
        tab.requested.clear()
        tab.size(1280, 860)
        tab.open(server.url)
        tab.wait_for("document.querySelector('#key-dialog').open")  # it needs a key for its models
        tab.wait_for("!document.querySelector('#locked').hidden")
        assert tab.run("document.querySelectorAll('.worker').length") == 0
        assert tab.errors  # the 401s; Chromium calls each one an error
        assert all("401" in error for error in tab.errors)
        tab.run("document.querySelector('#api-key').value = 'sk-user'")
        tab.run(f"document.querySelector('#admin-key').value = '{ADMIN}'")
        tab.run("document.querySelector('#key-dialog button[value=save]').click()")
        tab.wait_for("document.querySelectorAll('.worker').length === 1")
        tab.wait_for("document.querySelector('#model').value")
        tab.wait_for("document.querySelector('#locked').hidden")
        assert {urlsplit(url).netloc for url in tab.requested} == {urlsplit(server.url).netloc}


def test_its_headers_let_nothing_else_in(server: RouterServer) -> None:
    first = httpx.get(server.url)
    policy = first.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert first.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(server.url, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.get(f"{server.url}/page/../config.py").status_code == 404
    for path in ("app.js", "style.css", "icon.svg"):
        text = httpx.get(f"{server.url}/page/{path}").text.replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, f"{path} asks for something from elsewhere"
