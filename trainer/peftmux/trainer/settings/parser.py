"""The flags of one method: the run's options, the method's own, and transformers' TrainingArguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods import get_method
from peftmux.trainer.settings.arguments import checked_learning_rate
from peftmux.trainer.settings.flags import add_fields
from peftmux.trainer.settings.options import RunOptions


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The options by name. Raises OptionError where argparse would end the process."""
    parser.exit_on_error = False
    parser.error = _refuse  # type: ignore[method-assign]  # of what is missing or too much, which 3.12 and 3.13 raise
    try:
        return vars(parser.parse_args(list(words)))
    except argparse.ArgumentError as error:
        if error.argument_name is None:
            _refuse(error.message)
        raise OptionError(_plain(error.argument_name), error.message) from None


def _refuse(message: str) -> NoReturn:
    """message: argparse's, which names a flag in all its spellings."""
    raise OptionError("options", re.sub(r"--[\w-]+(/--[\w-]+)+", lambda names: f"--{_plain(names[0])}", message))


def _plain(flags: str) -> str:
    """`--max-steps/--max_steps` is max-steps."""
    return flags.partition("/")[0].lstrip("-").replace("_", "-")


def build_parser(name: str) -> argparse.ArgumentParser:
    """Every flag of one method. An option not given is not in the namespace, so that defaults stay in one place."""
    method = get_method(name)
    parser = HfArgumentParser(
        (),
        prog=f"peftmux train {name}",
        description=f"Train {method.summary}.",
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of options by name")
    add_fields(parser.add_argument_group("run"), RunOptions)
    add_fields(parser.add_argument_group(name), method.config_class)
    training = HfArgumentParser([TrainingArguments], add_help=False)  # type: ignore[list-item]
    for action in training._actions:
        action.default = argparse.SUPPRESS
        if action.dest == "learning_rate":
            action.type, action.help = _learning_rate, _learning_rate_help(method.learning_rate)
    group = parser.add_argument_group("training (transformers' TrainingArguments)")
    if "--warmup-ratio" not in training._option_string_actions:
        group.add_argument("--warmup-ratio", "--warmup_ratio", type=float, default=argparse.SUPPRESS, metavar="SHARE")
    for action in training._actions:
        group._add_action(action)
    return parser


def _learning_rate_help(default: Callable[[int], float]) -> str:
    rates = {width: f"{default(width):.2g}" for width in (1024, 4096)}
    if len(set(rates.values())) == 1:
        return f"Initial learning rate (default: {rates[1024]})"
    return "Initial learning rate (default: " + ", ".join(f"{v} at width {k}" for k, v in rates.items()) + ")"


def _learning_rate(text: str) -> float:
    try:
        return checked_learning_rate(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None
