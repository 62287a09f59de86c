"""`peftmux generate PROMPT`: ask a running server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from peftmux.cli import values
from peftmux.cli.connection import add_adapter, add_connection, connected
from peftmux.cli.prompt import add_prompt, prompt_text
from peftmux.cli.settings import Settings, parse

if TYPE_CHECKING:
    from peftmux.client import Client, GenerateOptions, Prompt

_SAMPLING: dict[str, tuple[Any, str]] = {
    "temperature": (float, "0 is greedy"),
    "top-p": (float, "keep the likeliest tokens up to this probability"),
    "top-k": (values.natural, "keep this many tokens"),
    "min-p": (float, "drop tokens below this share of the likeliest one's probability"),
    "seed": (values.natural, "the same seed and request give the same tokens"),
    "repetition-penalty": (float, "above 1 makes what was said less likely"),
    "presence-penalty": (float, "-2 to 2"),
    "frequency-penalty": (float, "-2 to 2"),
    "max-tokens": (values.positive, "at most this many tokens; the rest of the context if left out"),
    "min-tokens": (values.natural, "no end token and no stop string before this many tokens"),
    "logprobs": (values.natural, "with --json: log-probabilities and this many alternatives for each token"),
    "priority": (int, "higher is served first; 0 is normal"),
}


def main(argv: Sequence[str]) -> int:
    parser, settings = build_parser()
    args = parse(parser, settings, argv, os.environ)
    text = prompt_text(args)
    with connected(args) as client:
        prompt = _prompt(text, args)
        if args.json:
            answer = client.generate(prompt, **_options(args))
            print(json.dumps(dataclasses.asdict(answer), default=_plain, ensure_ascii=False))
        else:
            _stream(client, prompt, args)
    return 0


def build_parser() -> tuple[argparse.ArgumentParser, Settings]:
    parser = argparse.ArgumentParser(
        prog="peftmux generate", description="Ask a running server, and see the answer as it is made."
    )
    settings = Settings(parser)
    add_prompt(settings)
    add_adapter(settings, "; the base model if left out")
    settings.add(
        "--adapters",
        dest="adapter_weights",  # PEFTMUX_ADAPTERS is the server's folder
        metavar="NAME=W,...",
        type=values.weights,
        help="a weighted sum of adapters instead of one",
    )
    settings.add("--adapter-task", metavar="N", type=values.natural, help="which task of a multi-task adapter")
    settings.add("--chat", action="store_true", default=False, help="PROMPT is what the user says in a conversation")
    settings.add("--system", metavar="TEXT", help="what the system says before (with --chat)")
    settings.add("--stop", metavar="TEXT", action="append", help="end before this text (may be repeated)")
    settings.add("--ignore-eos", action="store_true", default=False, help="go on past the end token")
    settings.add("--json", action="store_true", default=False, help="print the whole answer as one JSON object")
    for name, (kind, text) in _SAMPLING.items():
        settings.add(f"--{name}", metavar="X" if kind is float else "N", type=kind, help=text)
    add_connection(settings)
    return parser, settings


def _prompt(text: str, args: argparse.Namespace) -> Prompt:
    from peftmux.client import ChatMessage

    if not args.chat:
        return text
    system = [ChatMessage("system", args.system)] if args.system else []
    return [*system, ChatMessage("user", text)]


def _options(args: argparse.Namespace) -> GenerateOptions:
    names = [name.replace("-", "_") for name in _SAMPLING] + ["adapter_task", "stop", "ignore_eos"]
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.adapter_name is not None:
        chosen["adapter"] = args.adapter_name
    if args.adapter_weights:
        chosen["adapters"] = args.adapter_weights
    return cast("GenerateOptions", chosen)


def _stream(client: Client, prompt: Prompt, args: argparse.Namespace) -> None:
    last = None
    for last in client.stream(prompt, **_options(args)):
        print(last.text, end="", flush=True)
    print()
    if last is not None and last.usage is not None and last.finish_reason is not None and sys.stderr.isatty():
        usage = last.usage
        counts = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, {usage.cached_tokens} cached"
        print(f"[{last.finish_reason.value}: {counts}]", file=sys.stderr)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"no JSON for {type(value).__name__}")
