"""`ellm serve`: read the configuration, check the checkpoint, and hold a cluster up until told to stop."""

from __future__ import annotations

import argparse

# flag -> (key in the config, metavar, help). Values are checked by the config, like those of --set.
FLAGS = {
    "--host": ("host", "HOST", "address to listen on"),
    "--port": ("port", "PORT", "of HTTP"),
    "--grpc-port": ("grpc_port", "PORT", "of gRPC"),
    "--workers": ("workers", "N", "number of workers (tensor-parallel groups)"),
    "--tp": ("tp", "N", "ranks of one worker"),
    "--device": ("device", "auto|cpu|cuda", "where the model runs"),
    "--dtype": ("dtype", "DTYPE", "auto, float32, bfloat16 or float16"),
    "--max-model-len": ("max_model_len", "TOKENS", "prompt and output together"),
    "--kv-blocks": ("kv_blocks", "N", "size of a worker's KV pool; default: sized from memory"),
    "--policy": ("policy", "NAME", "of scheduling: adaptive, full-chunked, full-recompute, ..."),
    "--tpot-slo-ms": ("tpot_slo_ms", "MS", "time per output token of requests that bring no SLO"),
    "--ttft-slo-ms": ("ttft_slo_ms", "MS", "time to the first token of requests that bring no SLO"),
    "--served-model-name": ("served_model_name", "NAME", "default: the folder's name"),
    "--address": ("address", "ADDRESS", "join this Ray cluster (auto: this machine's); default: start one"),
    "--log-level": ("log_level", "LEVEL", "debug, info, warning or error"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder or hub id; default: the bundled one"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML; see --print-config for its keys")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the config, such as worker.cache.block_size=32; may be repeated",
    )
    for flag, (key, metavar, text) in FLAGS.items():
        parser.add_argument(flag, dest=key, metavar=metavar, help=text)
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config as YAML and leave"
    )
    parser.epilog = (
        "Later wins: defaults, the file, environment (ELLM_CLUSTER__PORT=9000), --set, flags.\n"
        "Every flag's name (with underscores) is also a key for the file and --set."
    )


def run(args: argparse.Namespace) -> int:
    from ellm.deploy import config, dump, resolve

    flags = {key: getattr(args, key) for key, _, _ in FLAGS.values() if getattr(args, key) is not None}
    if args.model is not None:
        flags["model"] = args.model
    loaded = config.load(args.config, settings=args.settings, flags=flags)
    resolved = resolve.resolve(loaded.config)
    if args.print_config:
        print(dump.dump(resolved, loaded.origins, redacted=True), end="")
        return 0
    from ellm.deploy import foreground

    return foreground.serve(resolved)
