"""A server of OpenAI's endpoints that computes nothing: what a load generator is measured against.

    python -m ellm.loadtest.generator.null_server [--port 8900] [--ttft-ms 0] [--tpot-ms 0]

Every answer is `max_tokens` tokens long; token i leaves at ttft + i * tpot after the request was read, by the
clock, so that lateness does not add up. With both 0 the whole stream leaves in one write. It counts
a prompt's words (or ids) as its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from typing import Any

MODEL = "null-model"
WORD = " token"
CHAT_PATH, COMPLETIONS_PATH = b"/v1/chat/completions", b"/v1/completions"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_COMMON = {"id": "null-1", "created": 1, "model": MODEL}
_LAST_CHUNK = b"0\r\n\r\n"


def _event(data: Any) -> bytes:
    payload = data if isinstance(data, bytes) else json.dumps(data, separators=(",", ":")).encode()
    line = b"data: " + payload + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(line), line)


def _chunk(chat: bool, text: str | None, reason: str | None) -> bytes:
    kind = "chat.completion.chunk" if chat else "text_completion"
    content: dict[str, Any] = (
        {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
    )
    choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
    return _event({**_COMMON, "object": kind, "choices": [choice]})


_ROLE = _event(
    {
        **_COMMON,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
    }
)
_TOKEN = {chat: _chunk(chat, WORD, None) for chat in (False, True)}
_END = {chat: _chunk(chat, WORD, "length") for chat in (False, True)}


def usage(prompt: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def num_prompt_tokens(body: dict[str, Any]) -> int:
    """Words of a text or of all messages, or ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    if prompt is None:
        return sum(len(str(message.get("content")).split()) for message in body.get("messages", []))
    return len(str(prompt).split())


class NullProtocol(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self, ttft_s: float, tpot_s: float) -> None:
        self._ttft_s = ttft_s
        self._tpot_s = tpot_s
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = content_length(head)
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            path = head.split(b" ", 2)[1]
            if path in (CHAT_PATH, COMPLETIONS_PATH):
                self._answer(json.loads(body), path == CHAT_PATH)
            elif path == b"/v1/models":
                self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1}]})
            elif path == b"/health":
                self._json(200, {})
            else:
                self._json(404, {"error": {"message": "no such page", "code": "not_found"}})

    def _answer(self, body: dict[str, Any], chat: bool) -> None:
        tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        counted = usage(num_prompt_tokens(body), tokens)
        if not body.get("stream"):
            text = WORD * tokens
            content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choice = {"index": 0, **content, "finish_reason": "length"}
            kind = "chat.completion" if chat else "text_completion"
            self._json(200, {**_COMMON, "object": kind, "choices": [choice], "usage": counted})
            return
        end = _END[chat]
        if (body.get("stream_options") or {}).get("include_usage"):
            kind = "chat.completion.chunk" if chat else "text_completion"
            end += _event({**_COMMON, "object": kind, "choices": [], "usage": counted})
        end += _event(b"[DONE]") + _LAST_CHUNK
        first = _HEAD + (_ROLE if chat else b"")
        if not self._ttft_s and not self._tpot_s:
            self.write(first + _TOKEN[chat] * (tokens - 1) + end)
            return
        Paced(self, self._loop.time() + self._ttft_s, self._tpot_s, tokens, (first, _TOKEN[chat], end)).next()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @property
    def lost(self) -> bool:
        return self._transport is None

    def _json(self, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.write(head % (status, len(body)) + body)


class Paced:
    """One answer, token by token by the clock."""

    def __init__(
        self, to: NullProtocol, first_at: float, tpot_s: float, tokens: int, parts: tuple[bytes, bytes, bytes]
    ) -> None:
        self._to = to
        self._first_at = first_at
        self._tpot_s = tpot_s
        self._tokens = tokens
        self._head, self._token, self._end = parts
        self._sent = 0
        self._loop = asyncio.get_running_loop()

    def next(self) -> None:
        self._loop.call_at(self._first_at + self._sent * self._tpot_s, self._send)

    def _send(self) -> None:
        if self._to.lost:
            return
        self._sent += 1
        head = self._head if self._sent == 1 else b""
        last = self._sent == self._tokens
        self._to.write(head + (self._end if last else self._token))
        if not last:
            self.next()


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def serve(host: str, port: int, ttft_s: float, tpot_s: float) -> asyncio.Server:
    """A server that listens; port 0 takes a free one."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: NullProtocol(ttft_s, tpot_s), host, port, backlog=4096)


async def _main(args: argparse.Namespace) -> None:
    server = await serve("127.0.0.1", args.port, args.ttft_ms / 1e3, args.tpot_ms / 1e3)
    port = server.sockets[0].getsockname()[1]
    print(f"Ready: http://127.0.0.1:{port}", flush=True)
    async with server:
        await server.serve_forever()


def main() -> int:
    from ellm.loadtest.generator.sender import PreciseSelector, raise_file_limit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8900, help="0: a free one (default: %(default)s)")
    parser.add_argument("--ttft-ms", type=float, default=0.0, help="to the first token (default: 0)")
    parser.add_argument("--tpot-ms", type=float, default=0.0, help="between tokens (default: 0)")
    parser.add_argument("--cpu", type=int, help="run on this core alone")
    args = parser.parse_args()
    raise_file_limit()
    if args.cpu is not None:
        os.sched_setaffinity(0, {args.cpu})
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
            runner.run(_main(args))
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
