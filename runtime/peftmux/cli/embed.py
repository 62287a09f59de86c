"""`peftmux embed PROMPT`: a text's final hidden states, pooled."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence

from peftmux.cli import values
from peftmux.cli.connection import add_adapter, add_connection, connected
from peftmux.cli.prompt import add_prompt, prompt_text
from peftmux.cli.settings import Settings, parse


def main(argv: Sequence[str]) -> int:
    parser, settings = build_parser()
    args = parse(parser, settings, argv, os.environ)
    with connected(args) as client:
        answer = client.embed(
            prompt_text(args),
            adapter=args.adapter_name or "",
            adapter_task=args.adapter_task,
            pooling=args.pooling,
            normalize=args.normalize,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(answer)))
    else:
        print(" ".join(f"{value:.8g}" for value in answer.values))
    return 0


def build_parser() -> tuple[argparse.ArgumentParser, Settings]:
    parser = argparse.ArgumentParser(prog="peftmux embed", description="A text as one vector, printed on one line.")
    settings = Settings(parser)
    add_prompt(settings)
    add_adapter(settings, "; the base model if left out")
    settings.add("--adapter-task", metavar="N", type=values.natural, help="which task of a multi-task adapter")
    settings.add(
        "--pooling", choices=["mean", "last"], default="mean", help="over the text's tokens, or the last one alone"
    )
    settings.add("--normalize", action="store_true", default=False, help="to length 1")
    settings.add("--json", action="store_true", default=False, help="print the whole answer as one JSON object")
    add_connection(settings)
    return parser, settings
