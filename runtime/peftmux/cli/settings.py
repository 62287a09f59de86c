"""Flags that fall back on the environment, then on a config file: flag > PEFTMUX_* > --config > default."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


class Settings:
    """The options of one parser.

    `--some-flag` may also be set by PEFTMUX_SOME_FLAG and by the key `some-flag` (or `some_flag`) of the YAML file
    that --config or PEFTMUX_CONFIG names. A flag that may be repeated takes several values from the environment
    separated by commas, and a list from the file.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._options: dict[str, tuple[argparse.Action, Any]] = {}
        self._repeated: set[str] = set()
        self._together: list[tuple[str, ...]] = []
        self.add("--config", metavar="FILE", help="YAML file with values for these options")

    def add(self, *names: str, default: Any = None, help: str, **arguments: Any) -> None:
        """As `add_argument`. `default` is the value itself, already of the right type."""
        shown = f" (default: {default})" if default not in (None, False, [], ()) else ""
        action = self._parser.add_argument(*names, default=argparse.SUPPRESS, help=help + shown, **arguments)
        self._options[action.dest] = (action, default)
        if arguments.get("action") in ("append", "extend"):
            self._repeated.add(action.dest)

    def together(self, *flags: str) -> None:
        """All of these options (without defaults) or none."""
        self._together.append(flags)

    def resolve(self, given: argparse.Namespace, environ: Mapping[str, str]) -> argparse.Namespace:
        """Fill in what the command line left out. Bad values end the program as argparse does: message, status 2."""
        config_path = getattr(given, "config", None) or environ.get("PEFTMUX_CONFIG")
        file = self._read(config_path) if config_path else {}
        for dest, (action, default) in self._options.items():
            if hasattr(given, dest):
                continue
            variable = "PEFTMUX_" + dest.upper()
            if environ.get(variable):
                value = self._from_environment(action, variable, environ[variable])
            elif dest in file:
                value = self._convert(action, f"{config_path}: {dest}", file[dest])
            else:
                value = default
            setattr(given, dest, value)
        for flags in self._together:
            got = [flag for flag in flags if getattr(given, _dest(flag)) is not None]
            if 0 < len(got) < len(flags):
                self._fail(f"expected {' and '.join(flags)} together, got only {' and '.join(got)}")
        return given

    def _read(self, path: str) -> dict[str, Any]:
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self._fail(f"cannot read the config file {path}: {error}")
        if not isinstance(content, dict):
            self._fail(f"{path}: expected a mapping of option names to values, got {type(content).__name__}")
        values = {str(key).replace("-", "_"): value for key, value in content.items()}
        unknown = sorted(values.keys() - self._options.keys())
        if unknown:
            known = ", ".join(sorted(dest.replace("_", "-") for dest in self._options))
            self._fail(f"{path}: unknown option {unknown[0]!r}; expected one of {known}")
        return values

    def _from_environment(self, action: argparse.Action, source: str, text: str) -> Any:
        return self._convert(action, source, text.split(",") if action.dest in self._repeated else text)

    def _convert(self, action: argparse.Action, source: str, value: Any) -> Any:
        if action.nargs == 0:
            return self._flag(source, str(value).lower())
        if action.dest in self._repeated:
            return [self._one(action, source, item) for item in (value if isinstance(value, list) else [value])]
        return self._one(action, source, value)

    def _flag(self, source: str, text: str) -> bool:
        if text not in _TRUE | _FALSE:
            self._fail(f"{source}: expected true or false, got {text!r}")
        return text in _TRUE

    def _one(self, action: argparse.Action, source: str, value: Any) -> Any:
        convert: Any = action.type or str
        try:
            result = convert(str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            self._fail(f"{source}: {error}")
        if action.choices is not None and result not in action.choices:
            self._fail(f"{source}: expected one of {', '.join(map(str, action.choices))}, got {value!r}")
        return result

    def _fail(self, message: str) -> NoReturn:
        self._parser.error(message)


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def parse(
    parser: argparse.ArgumentParser, settings: Settings, argv: Sequence[str], environ: Mapping[str, str]
) -> argparse.Namespace:
    """Parse a command line and fill in the rest."""
    return settings.resolve(parser.parse_args(argv), environ)
