"""YAML files of options: read so that what is wrong is named by its line, and no key silently wins over its double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from peftmux.trainer.errors import OptionError


def read_yaml(path: str | Path, option: str) -> tuple[object, yaml.Node | None]:
    """What the file holds, and its tree, whose nodes know their lines (`line_of`). Raises OptionError(option)."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise OptionError(option, f"{path}: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise OptionError(option, f"{path}:{line}: expected UTF-8 text, found {error.reason}") from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        for key in _doubles(tree):
            raise OptionError(option, f"{path}:{line_of(key)}: key {key.value!r} is there twice")
        return yaml.safe_load(text), tree
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise OptionError(option, f"{where}: expected YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, no day of a month, too deep a nesting
        raise OptionError(option, f"{path}: expected YAML: {error}") from None


def line_of(node: yaml.Node) -> int:
    """1-based."""
    line: int = node.start_mark.line
    return line + 1


def _doubles(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Keys of a mapping that it has had before, at any depth."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = key.value.replace("-", "_")  # max-steps and max_steps are one option
                if name in seen:
                    yield key
                seen.add(name)
            yield from _doubles(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _doubles(item)
