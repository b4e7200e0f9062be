"""The page at `/`: static files of router/page, read once, with headers that let nothing else in.

No build step and nothing from elsewhere. What they show they ask the server for, with the user's keys.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from fastapi import FastAPI, Request, Response

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"
FILES = {
    "/" if path.name == INDEX else f"/page/{path.name}": path
    for path in sorted(FOLDER.iterdir())
    if path.suffix in TYPES
}
PATHS = frozenset(FILES)
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked for again each time, and answered with 304
}


def add_page(app: FastAPI) -> None:
    """One route for each file."""
    for path, file in FILES.items():
        _add(app, path, file)


def _add(app: FastAPI, path: str, file: Path) -> None:
    body = file.read_bytes()
    tag = f'"{blake2b(body, digest_size=8).hexdigest()}"'
    headers = {**HEADERS, "content-type": TYPES[file.suffix], "etag": tag}

    @app.get(path, include_in_schema=False)
    async def page_file(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)
