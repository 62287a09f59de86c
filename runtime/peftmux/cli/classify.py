"""`peftmux classify PROMPT --adapter NAME`: what an adapter's classification head says of a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftmux.cli import values
from peftmux.cli.connection import add_adapter, add_connection, connected
from peftmux.cli.prompt import add_prompt, prompt_text
from peftmux.cli.settings import Settings, parse

if TYPE_CHECKING:
    from peftmux.client import Classification


def main(argv: Sequence[str]) -> int:
    parser, settings = build_parser()
    args = parse(parser, settings, argv, os.environ)
    if args.adapter_name is None:
        parser.error("expected --adapter NAME, one with a classification head, got none")
    text = prompt_text(args)
    with connected(args) as client:
        answer = client.classify(text, adapter=args.adapter_name, adapter_task=args.adapter_task)
        if args.json:
            print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False))
        elif len(answer.rows) == 1:
            _show_sequence(answer)
        else:
            _show_tokens(answer, client.tokenize(text).pieces)
    return 0


def build_parser() -> tuple[argparse.ArgumentParser, Settings]:
    parser = argparse.ArgumentParser(
        prog="peftmux classify", description="What an adapter's classification head says of a text."
    )
    settings = Settings(parser)
    add_prompt(settings)
    add_adapter(settings, " of an adapter with a classification head")
    settings.add("--adapter-task", metavar="N", type=values.natural, help="which task of a multi-task adapter")
    settings.add("--json", action="store_true", default=False, help="print the whole answer as one JSON object")
    add_connection(settings)
    return parser, settings


def _show_sequence(answer: Classification) -> None:
    """Every label with its probability, the likeliest first."""
    ranked = sorted(zip(answer.rows[0].probabilities, answer.labels, strict=True), key=lambda pair: -pair[0])
    for probability, label in ranked:
        print(f"{probability:.4f}  {label}")


def _show_tokens(answer: Classification, pieces: Sequence[str]) -> None:
    """Every token with its likeliest label."""
    for row, piece in zip(answer.rows, pieces, strict=True):
        print(f"{max(row.probabilities):.4f}  {row.label}  {piece}")
