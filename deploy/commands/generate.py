"""`ellm generate`: the engine alone, in this process, on a few prompts. No Ray, no HTTP."""

from __future__ import annotations

import argparse
import sys

SAMPLING = {
    "--temperature": (float, 0.0, "0 takes the likeliest token (default)"),
    "--top-k": (int, 0, "only the K likeliest tokens; 0: all"),
    "--top-p": (float, 1.0, "only the likeliest tokens that sum up to P"),
    "--min-p": (float, 0.0, "only tokens at least P times as likely as the likeliest"),
    "--repetition-penalty": (float, 1.0, "above 1 discourages tokens seen before"),
    "--presence-penalty": (float, 0.0, "subtracted from tokens of the output so far"),
    "--frequency-penalty": (float, 0.0, "the same, for each occurrence"),
    "--seed": (int, None, "default: worker.model.seed"),
    "--min-tokens": (int, 0, "no end before so many"),
    "--max-tokens": (int, 128, "at most so many (default: 128)"),
}

CONFIG_FLAGS = {
    "--device": ("device", "auto|cpu|cuda"),
    "--dtype": ("dtype", "DTYPE"),
    "--max-model-len": ("max_model_len", "TOKENS"),
    "--kv-blocks": ("kv_blocks", "N"),
    "--threads": ("threads", "N"),
    "--tp": ("tp", "RANKS"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or hub id; default: the bundled one"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="may be repeated; default: standard input, one prompt"
    )
    parser.add_argument("--chat", action="store_true", help="take each prompt as a user's message")
    parser.add_argument("--stop", action="append", default=[], help="end at this string; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")
    parser.add_argument("--stats", action="store_true", help="tokens per second, to standard error")
    for flag, (kind, default, text) in SAMPLING.items():
        parser.add_argument(flag, type=kind, default=default, help=text)
    for flag, (key, metavar) in CONFIG_FLAGS.items():
        parser.add_argument(flag, dest=key, metavar=metavar)
    parser.add_argument("--config", metavar="FILE", help="as for ellm serve")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")


def run(args: argparse.Namespace) -> int:
    from ellm.deploy import config, resolve
    from ellm.worker.api.errors import ConfigError
    from ellm.worker.model.inspect import inspect_checkpoint

    flags = {key: getattr(args, key) for key, _ in CONFIG_FLAGS.values() if getattr(args, key) is not None}
    if args.model is not None:
        flags["model"] = args.model
    loaded = config.load(args.config, settings=args.settings, flags=flags).config
    worker = resolve.resolve_worker(loaded.worker)
    prompts = args.prompt or ([sys.stdin.read()] if not sys.stdin.isatty() else [])
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT, or text on standard input")
    inspect_checkpoint(worker.model.path, worker.model.revision, worker.tensor_parallel_size)

    from ellm.deploy.generation import generate

    return generate(args, worker, prompts)
