"""`ellm keys`: the file of API keys. A key is shown once, when it is made; the file holds only its hash."""

from __future__ import annotations

import argparse
from pathlib import Path

from ellm.worker.api.errors import ConfigError

EPILOG = """
Routers read the file named by router.api_key_file, and again within a second when it changes. On a cluster
of several machines it must be at the same path on each (a mounted secret, a shared folder).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key and print it")
    add.add_argument("--name", default="", help="whose it is, for the list")
    add.add_argument("--requests-per-s", type=float, metavar="N", help="over the whole cluster")
    add.add_argument("--tokens-per-min", type=float, metavar="N", help="prompt and output together")
    add.add_argument("--priority", type=int, metavar="N", help="of its requests; lower runs first")
    listing = actions.add_parser("list", help="show the keys' ids and limits")
    revoke = actions.add_parser("revoke", help="remove a key")
    revoke.add_argument("id", metavar="ID", help="its id, as in the list")
    for action in (add, listing, revoke):
        action.add_argument("--file", type=Path, required=True, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    from ellm.router.keys import locked, read_keys

    if args.action == "list":
        print("id        name              requests/s  tokens/min  priority")
        for item in (entry.key for entry in read_keys(args.file)):
            limits = (item.requests_per_s, item.tokens_per_min, item.priority)
            shown = ["-" if value is None else f"{value:g}" for value in limits]
            print(f"{item.id:8}  {item.name:16}  {shown[0]:>10}  {shown[1]:>10}  {shown[2]:>8}")
        return 0
    with locked(args.file):  # two at once would each forget the other's
        return _revoke(args) if args.action == "revoke" else _add(args)


def _revoke(args: argparse.Namespace) -> int:
    from ellm.router.keys import read_keys, write_keys

    stored = read_keys(args.file)
    kept = [entry for entry in stored if entry.key.id != args.id]
    if len(kept) == len(stored):
        raise ConfigError(f"{args.file} has no key {args.id}")
    write_keys(args.file, kept)
    return 0


def _add(args: argparse.Namespace) -> int:
    from ellm.router.keys import ApiKey, check_limits, new_key, read_keys, write_keys

    stored = read_keys(args.file) if args.file.exists() else []
    wanted = ApiKey("", args.name, args.requests_per_s, args.tokens_per_min, args.priority)
    try:
        check_limits(wanted)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    entry, plain = new_key(wanted)
    write_keys(args.file, [*stored, entry])
    print(plain)
    return 0
