"""`ellm keys`: the file of API keys. A key is shown once, when it is made; the file holds only its hash."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ellm.worker.api.errors import ConfigError

if TYPE_CHECKING:
    from ellm.router.keys import ApiKey

EPILOG = """
Routers read the file named by router.api_key_file, and again within a second when it changes; one that they
cannot read leaves the keys as they were (ellm_api_key_file_broken in /metrics, and a line in the log). On a
cluster of several machines it must be at the same path on each (a mounted secret, a shared folder).
"""
_FIELDS = ("name", "requests_per_s", "tokens_per_min", "priority", "models", "cache_salt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key and print it")
    listing = actions.add_parser("list", help="show the keys' ids and limits")
    change = actions.add_parser("change", help="change what a key may do; the key itself stays")
    revoke = actions.add_parser("revoke", help="remove a key")
    for action in (change, revoke):
        action.add_argument("id", metavar="ID", help="its id, as in the list")
    for action in (add, change):
        _add_fields(action)
    for action in (add, listing, change, revoke):
        action.add_argument("--file", type=Path, required=True, metavar="FILE")


def _add_fields(action: argparse.ArgumentParser) -> None:
    """Each "none" takes a limit away."""
    action.add_argument("--name", help="whose it is, for the list and the audit lines")
    action.add_argument("--requests-per-s", type=_or_none(float), metavar="N", help="over the whole cluster")
    action.add_argument(
        "--tokens-per-min", type=_or_none(float), metavar="N", help="prompt and output together"
    )
    action.add_argument(
        "--priority", type=_or_none(int), metavar="N", help="of its requests; lower runs first"
    )
    action.add_argument(
        "--model",
        dest="models",
        action="append",
        metavar="NAME",
        help="a model it may use, by its served name; may be given again. Without any: all",
    )
    action.add_argument(
        "--cache-salt",
        metavar="NAME",
        help="keys of one salt share cached prompts, and may learn from timing what the others asked;"
        " without it a key shares with none",
    )


def _or_none(kind: type) -> Any:
    def read(text: str) -> Any:
        return "none" if text == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its errors
    return read


def run(args: argparse.Namespace) -> int:
    from ellm.router.keys import locked

    if args.action == "list":
        return _list(args)
    with locked(args.file):  # two at once would each forget the other's
        return {"revoke": _revoke, "change": _change, "add": _add}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from ellm.router.keys import read_keys

    print("id        name              requests/s  tokens/min  priority  cache salt    models")
    for item in (entry.key for entry in read_keys(args.file)):
        limits = (item.requests_per_s, item.tokens_per_min, item.priority)
        shown = ["-" if value is None else f"{value:g}" for value in limits]
        models = "all" if item.models is None else ", ".join(item.models)
        print(
            f"{item.id:8}  {item.name:16}  {shown[0]:>10}  {shown[1]:>10}  {shown[2]:>8}"
            f"  {item.cache_salt or 'its own':12}  {models}"
        )
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from ellm.router.keys import read_keys, write_keys

    stored = read_keys(args.file)
    kept = [entry for entry in stored if entry.key.id != args.id]
    if len(kept) == len(stored):
        raise ConfigError(f"{args.file} has no key {args.id}")
    write_keys(args.file, kept)
    return 0


def _change(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ellm.router.keys import read_keys, write_keys

    stored = read_keys(args.file)
    if all(entry.key.id != args.id for entry in stored):
        raise ConfigError(f"{args.file} has no key {args.id}")
    changed = [
        replace(entry, key=_asked(entry.key, args)) if entry.key.id == args.id else entry for entry in stored
    ]
    write_keys(args.file, changed)
    return 0


def _add(args: argparse.Namespace) -> int:
    from ellm.router.keys import ApiKey, new_key, read_keys, write_keys

    stored = read_keys(args.file) if args.file.exists() else []
    entry, plain = new_key(_asked(ApiKey(""), args))
    write_keys(args.file, [*stored, entry])
    print(plain)
    return 0


def _asked(key: ApiKey, args: argparse.Namespace) -> ApiKey:
    """The key with what the command line says. Raises ConfigError."""
    from dataclasses import replace

    from ellm.router.keys import check_limits

    given: dict[str, Any] = {name: getattr(args, name) for name in _FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if "models" in given:
        given["models"] = None if given["models"] == ["none"] else tuple(given["models"])
    fields: Any = {name: None if value == "none" else value for name, value in given.items()}
    key = replace(key, **fields)
    try:
        check_limits(key)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return key
