"""`ellm chat`: a conversation over HTTP. It keeps the history; the server keeps nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from ellm.deploy.http_client import RequestFailed, Server

OPTIONAL = ("temperature", "top_p", "seed", "tpot_slo_ms", "ttft_slo_ms", "priority", "stream_pace")
HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"In the conversation: {HELP} Piped input is one message per line."
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="of one answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    parser.add_argument("--top-p", type=float, help="default: the server's")
    parser.add_argument("--seed", type=int, help="for answers that can be repeated")
    parser.add_argument("--tpot-slo-ms", type=float, help="time per output token (default: the server's)")
    parser.add_argument("--ttft-slo-ms", type=float, help="time to the first token (default: the server's)")
    parser.add_argument("--priority", type=int, help="lower runs first (default: 0)")
    parser.add_argument(
        "--stream-pace",
        action=argparse.BooleanOptionalAction,
        help="answers that flow evenly at their SLO (default: as the server is set)",
    )
    parser.add_argument("--api-key", help="where the server wants one")


def run(args: argparse.Namespace) -> int:
    server = Server(args.url, args.api_key)
    model = args.model or _first_model(server)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{model} at {server.url}. {HELP}")
    conversation = Conversation(server, model, args)
    failed = False
    for line in _lines(interactive):
        if line in ("/quit", "/exit"):
            break
        if line == "/reset":
            conversation.reset()
            continue
        if line in ("/help", "/?"):
            print(HELP)
            continue
        try:
            conversation.say(line)
        except RequestFailed as error:
            failed = True
            print(f"ellm chat: {error.message}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" [stopped]")
            if not interactive:
                return 130
    return 1 if failed and not interactive else 0


def _first_model(server: Server) -> str:
    models = server.get("/v1/models").get("data", [])
    if not models:
        raise RequestFailed(f"{server.url} serves no model yet")
    return str(models[0]["id"])


def _lines(interactive: bool) -> Iterator[str]:
    """The messages: from a prompt with line editing, or one per line of a pipe."""
    if interactive:
        import readline  # noqa: F401  (input() then has history and editing)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print()
            return
        if line:
            yield line


class Conversation:
    """The messages so far. An answer that was stopped is kept as far as it came."""

    def __init__(self, server: Server, model: str, args: argparse.Namespace) -> None:
        self._server = server
        self._body: dict[str, Any] = {"model": model, "max_tokens": args.max_tokens}
        for name in OPTIONAL:
            if getattr(args, name) is not None:
                self._body[name] = getattr(args, name)
        self._system = [{"role": "system", "content": args.system}] if args.system else []
        self.messages: list[dict[str, str]] = list(self._system)

    def reset(self) -> None:
        self.messages = list(self._system)

    def say(self, text: str) -> None:
        """Send one message and print the answer as it comes. A message that got no answer is forgotten."""
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            body = {**self._body, "messages": self.messages}
            with closing(self._server.stream("/v1/chat/completions", body)) as events:
                for event in events:
                    for choice in event.get("choices", []):
                        piece = choice.get("delta", {}).get("content") or ""
                        answer += piece
                        print(piece, end="", flush=True)
            print()
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()
