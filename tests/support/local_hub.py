"""A model hub on a loopback port, as `huggingface_hub` asks one: commits of one repository, and a book of
what was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REPO = "someone/model"
SLOW_S = 0.3  # a download takes a while, so that those who come together meet


class LocalHub:
    """`files`: commit -> (name -> content). The last commit is `main`."""

    def __init__(self, files: Mapping[str, Mapping[str, bytes]]) -> None:
        self.files = files
        self.downloads: Counter[tuple[str, str]] = Counter()  # (commit, file)
        self.asked: Counter[str] = Counter()  # revisions
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, *, body: bool) -> None:
                status, headers, content = hub.answer(urlsplit(self.path).path, body=body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path: str, *, body: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        about, files = f"/api/models/{REPO}", f"/{REPO}/resolve/"
        if path.startswith(about):
            _, _, rest = path.removeprefix(about).partition("/")
            kind, _, revision = rest.partition("/")
            if (commit := self._commit(revision or "main")) is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            with self._lock:
                self.asked[revision] += kind == "revision"
            return 200, {"Content-Type": "application/json"}, json.dumps(self._about(kind, commit)).encode()
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            commit = self._commit(revision)
            if commit is not None and name in self.files[commit]:
                content = self.files[commit][name]
                if body:
                    with self._lock:
                        self.downloads[commit, name] += 1
                    time.sleep(SLOW_S)
                return (
                    200,
                    {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit},
                    content,
                )
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _commit(self, revision: str) -> str | None:
        return [*self.files][-1] if revision == "main" else (revision if revision in self.files else None)

    def _about(self, kind: str, commit: str) -> object:
        files = self.files[commit]
        if kind == "tree":
            return [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        return {"id": REPO, "modelId": REPO, "sha": commit, "private": False, "tags": [], "downloads": 0,
                "siblings": [{"rfilename": name} for name in files]}  # fmt: skip


@contextmanager
def local_hub(files: Mapping[str, Mapping[str, bytes]]) -> Iterator[LocalHub]:
    hub = LocalHub(files)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join(10)
