"""The prompt of the commands that ask a server: an argument or standard input."""

from __future__ import annotations

import argparse
import sys

from peftmux.cli.settings import Settings


def add_prompt(settings: Settings) -> None:
    settings.add("prompt", nargs="?", metavar="PROMPT", help="the prompt; '-' or none reads standard input")


def prompt_text(args: argparse.Namespace) -> str:
    text: str = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    return text
