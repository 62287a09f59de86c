"""Options from a YAML file and from the environment, as the flags they stand for."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.yaml_file import read_yaml

ENVIRONMENT = "PEFTMUX_"
_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_NEGATIVE = re.compile(r"-|-\d+|-\d*\.\d+")
"""What argparse takes for a value though it begins with a dash."""
_NO_FLAGS = ("config", "debug")
"""The first is read before the flags; PEFTMUX_DEBUG asks the command for its traces."""


def file_arguments(parser: argparse.ArgumentParser, argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Flags to put before the command line's own, which then win: the file of --config, then the environment.

    PEFTMUX_MAX_STEPS=100 is --max-steps 100; variables that name no option are somebody else's. Raises OptionError for
    a file that cannot be read, or that names an option the parser does not have.
    """
    actions = _actions(parser)
    arguments: list[str] = []
    given, _ = _config_parser().parse_known_args(list(argv))
    if given.config:
        arguments += flags(parser, _read(given.config), given.config)
    for name, text in environment.items():
        dest = name.removeprefix(ENVIRONMENT).lower()
        if name.startswith(ENVIRONMENT) and dest in actions and dest not in _NO_FLAGS:
            arguments += _flag(actions[dest], _listed(name, text) if actions[dest].nargs == "+" else text)
    return arguments


def _listed(name: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(name, f"expected YAML, as [a, b]: {getattr(error, 'problem', None) or error}") from None


def flags(parser: argparse.ArgumentParser, options: Mapping[Any, object], where: str) -> list[str]:
    """Options by name as command-line words. Raises OptionError for one that the parser does not have."""
    actions = _actions(parser)
    arguments: list[str] = []
    for name, value in options.items():
        dest = str(name).replace("-", "_")
        if dest not in actions or dest == "config":
            raise OptionError("config", f"{where}: no such option {name!r}")
        arguments += _flag(actions[dest], value)
    return arguments


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """By option's name. transformers has a --no_x, too, for what is on by default: the one taken has a value."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.option_strings and action.dest != "help" and not isinstance(action, argparse._StoreFalseAction):
            found.setdefault(action.dest, action)
    return found


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _read(path: str) -> Mapping[object, object]:
    options, _ = read_yaml(path, "config")
    if not isinstance(options, dict):
        raise OptionError("config", f"{path}: expected options by name, found {type(options).__name__}")
    return options


def _switched(name: str, value: object) -> bool:
    word = str(value).lower()
    if word not in (*_ON, *_OFF):
        raise OptionError(name, f"expected true or false, got {value!r}")
    return word in _ON


def _words(name: str, values: Sequence[object], several: bool) -> list[str]:
    """Raises OptionError for what argparse would take for another flag, or for no value of this one."""
    if len(values) > 1 and not several:
        raise OptionError(name, f"expected one value, got {values}")
    words = list(map(str, values))
    for word in words:
        if word.startswith("-") and not _NEGATIVE.fullmatch(word):
            raise OptionError(name, f"expected values that do not begin with a dash, got {word!r}")
    return words


def _flag(action: argparse.Action, value: object) -> list[str]:
    """One option as command-line words. null leaves the default."""
    name = max(action.option_strings, key=lambda flag: "-" in flag.strip("-"))
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        on = _switched(name.lstrip("-"), value)
        return [action.option_strings[0] if on else action.option_strings[0].replace("--", "--no-", 1)]
    if isinstance(value, dict):
        try:
            return [name, json.dumps(value)]
        except (TypeError, ValueError) as error:  # YAML has dates, and what holds itself
            raise OptionError(name.lstrip("-"), f"expected a JSON object: {error}") from None
    if isinstance(value, list):
        return [name, *_words(name.lstrip("-"), value, several=action.nargs == "+")]
    return [f"{name}={value}"]  # a text may begin with a dash
