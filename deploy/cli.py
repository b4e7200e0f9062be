"""The `ellm` command: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 it failed, 2 the command line or the configuration cannot work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from ellm.worker.api.errors import ConfigError, EllmError

COMMANDS = {
    "serve": "start a cluster that serves a model over HTTP",
    "chat": "talk to a running server in the terminal",
    "generate": "complete prompts with the engine alone, without a cluster",
    "plan": "say what a GPU can hold and serve of a model, and what pays there",
    "bench": "load a server by the clock and say what it kept up with",
    "simulate": "compare scheduling policies on a modelled GPU, without one",
    "kernels": "check the GPU kernels, with a GPU or without one",
    "keys": "make, list, change and revoke API keys",
    "status": "show the workers of a running server",
    "top": "watch the workers of a running server",
    "drain": "empty one worker without losing a request",
    "version": "print the versions of eLLM and what it runs on",
}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the given command's module is imported (all of them where it is None)."""
    top = argparse.ArgumentParser(prog="ellm", description="LLM serving on Ray with an elastic KV cache.")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command in (None, name):
            module = importlib.import_module(f"ellm.deploy.commands.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), "")
    args = parser(command).parse_args(words)
    try:
        return int(args.run(args))
    except ConfigError as error:
        print(f"ellm {args.command}: {error.message}", file=sys.stderr)
        return 2
    except EllmError as error:
        print(f"ellm {args.command}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
