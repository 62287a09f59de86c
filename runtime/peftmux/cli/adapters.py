"""`peftmux adapters ACTION`: adapters on a running server, and folders offline."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from peftmux.cli.connection import add_connection, connected
from peftmux.cli.errors import CommandError
from peftmux.cli.settings import Settings
from peftmux.cli.values import DTYPES

if TYPE_CHECKING:
    from peftmux.client import Adapter

_OFFLINE = ("convert", "inspect", "merge")
_COLUMNS = ("name", "kind", "state", "residency", "rank", "bytes", "in flight", "revision", "source")


def main(argv: Sequence[str]) -> int:
    parser, settings = build_parser()
    args = parser.parse_args(argv)
    settings[args.action].resolve(args, os.environ)
    if getattr(args, "model", "") is None:
        parser.error("expected --model MODEL, got none")
    if getattr(args, "out", "") is None:
        parser.error("expected --out DIR, got none")
    _ACTIONS[args.action](args)
    return 0


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, Settings]]:
    """The parser, and the settings of each action."""
    parser = argparse.ArgumentParser(prog="peftmux adapters", description="Adapters on a running server, and offline.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    settings = {}
    for name, text in _TEXTS.items():
        settings[name] = Settings(actions.add_parser(name, help=text, description=text.capitalize() + "."))
        if name != "list":
            metavar, what = ("PATH", "the adapter's folder") if name in _OFFLINE else ("NAME", "the adapter's name")
            settings[name].add(metavar.lower(), metavar=metavar, help=what)
    load = settings["load"]
    load.add("source", metavar="SOURCE", help="its folder, under the server's adapter root")
    load.add("--revision", metavar="DIGEST", default="", help="refuse other content than this")
    load.add("--pinned", action="store_true", default=False, help="accepted; loaded adapters are never moved away")
    load.add("--replace", action="store_true", default=False, help="other content becomes the name's new revision")
    for name in ("load", "unload"):
        settings[name].add("--wait", action=argparse.BooleanOptionalAction, default=True, help="return when it is done")
    settings["convert"].add("--out", metavar="DIR", help="a new folder for the converted adapter")
    settings["merge"].add("--out", metavar="DIR", help="a new folder for the merged checkpoint")
    settings["merge"].add("--dtype", choices=DTYPES, default="auto", help="of its weights; auto is the base's own")
    for name in ("inspect", "merge"):
        settings[name].add("--model", metavar="MODEL", help="the base model, a folder or a hub id")
    for name, options in settings.items():
        options.add("--json", action="store_true", default=False, help="print JSON")
        if name not in _OFFLINE:
            add_connection(options)
    return parser, settings


def _load(args: argparse.Namespace) -> None:
    with connected(args) as client:
        adapter = client.load_adapter(
            args.name,
            args.source,
            revision=args.revision,
            pinned=args.pinned,
            wait=args.wait,
            replace=args.replace,
        )
    _show([adapter], args.json)


def _unload(args: argparse.Namespace) -> None:
    with connected(args) as client:
        adapter = client.unload_adapter(args.name, wait=args.wait)
    _show([adapter], args.json)


def _get(args: argparse.Namespace) -> None:
    with connected(args) as client:
        adapter = client.get_adapter(args.name)
    fields = dataclasses.asdict(adapter)
    print(_json(fields) if args.json else _lines(fields))


def _list(args: argparse.Namespace) -> None:
    with connected(args) as client:
        adapters = client.list_adapters()
    _show(adapters, args.json)


def _inspect(args: argparse.Namespace) -> None:
    from peftmux.cli.inspect import inspect_adapter

    fields = inspect_adapter(args.path, args.model)
    print(_json(fields) if args.json else _lines(fields))


def _convert(args: argparse.Namespace) -> None:
    from peftmux.adapters.convert import convert_adapter
    from peftmux.adapters.errors import AdapterError

    try:
        digest = convert_adapter(args.path, args.out)
    except AdapterError as error:
        raise CommandError(str(error)) from error
    fields = {"folder": args.out, "revision": digest}
    print(_json(fields) if args.json else _lines(fields))


def _merge(args: argparse.Namespace) -> None:
    from peftmux.adapters.errors import AdapterError
    from peftmux.adapters.merged import merge_checkpoint

    try:
        adapter = merge_checkpoint(args.path, args.model, args.out, args.dtype)
    except (AdapterError, OSError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    fields = {"folder": args.out, "kind": adapter.kind, "revision": adapter.digest, "sites": adapter.applied_sites}
    print(_json(fields) if args.json else _lines(fields))


def _show(adapters: Iterable[Adapter], as_json: bool) -> None:
    if as_json:
        print(_json([dataclasses.asdict(adapter) for adapter in adapters]))
        return
    rows = [_COLUMNS, *map(_row, adapters)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(adapter: Adapter) -> tuple[str, ...]:
    rank = str(adapter.max_rank) if adapter.min_rank == adapter.max_rank else f"{adapter.min_rank}-{adapter.max_rank}"
    return (
        adapter.name,
        adapter.kind or "-",
        adapter.state.value if adapter.state else "-",
        adapter.residency.value if adapter.residency else "-",
        rank,
        str(adapter.bytes),
        str(adapter.requests_in_flight),
        adapter.revision[:12] or "-",
        adapter.source + (f"  {adapter.error}" if adapter.error else ""),
    )


def _lines(fields: Mapping[str, Any]) -> str:
    return "\n".join(f"{name:<20}{_text(value)}".rstrip() for name, value in fields.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}" + "".join(f"\n  {item}" for item in value)
    return str(value.value if isinstance(value, Enum) else value)


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda item: item.value, ensure_ascii=False)


_TEXTS = {
    "load": "load an adapter from the server's adapter root",
    "unload": "unload an adapter",
    "list": "every adapter of the server",
    "get": "all there is to know of one adapter",
    "convert": "turn a folder's adapter_model.bin, a pickle, into safetensors, offline; only for sources you trust",
    "inspect": "check a folder against a base model, offline, exactly as a server would",
    "merge": "write the base model with an adapter merged into its weights, offline, as transformers loads it",
}
_ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "load": _load,
    "unload": _unload,
    "list": _list,
    "get": _get,
    "convert": _convert,
    "inspect": _inspect,
    "merge": _merge,
}
