"""The `peftmux` command: finds the sub-command and imports it only then."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from peftmux.cli.errors import CommandError

COMMANDS = {
    "serve": ("peftmux.cli.serve", "serve a base model and its adapters over gRPC"),
    "generate": ("peftmux.cli.generate", "ask a running server, and see the answer as it is made"),
    "classify": ("peftmux.cli.classify", "what an adapter's classification head says of a text"),
    "embed": ("peftmux.cli.embed", "a text as one vector"),
    "adapters": (
        "peftmux.cli.adapters",
        "load, unload, list, get on a running server; inspect or convert a folder offline",
    ),
    "train": ("peftmux.trainer.cli", "train an adapter"),
    "bench": ("peftmux.cli.bench", "measure tokens per second beside transformers' own generation"),
    "demo": ("peftmux.demo.main", "train three adapters, serve them in one batch, show what each answers"),
    "doctor": ("peftmux.cli.doctor", "what this machine can do, and why not"),
}
"""name: (module with main(argv) -> exit status, what it does)"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for a failure, 2 for bad usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"peftmux {version('peftmux')}")
        return 0
    if arguments[0] not in COMMANDS:
        return _unknown(arguments[0])
    return _guarded(arguments[0], lambda: _command(arguments[0])(arguments[1:]))


def _command(name: str) -> Callable[[Sequence[str]], int]:
    module = COMMANDS[name][0]
    _quieten()
    try:
        run: Callable[[Sequence[str]], int] = import_module(module).main
    except ModuleNotFoundError as error:
        extra = " (pip install 'peftmux[train]')" if name in ("train", "demo") else ""
        raise CommandError(f"needs the Python package {error.name!r}, which is not installed{extra}") from error
    return run


def _quieten() -> None:
    """transformers imports torchao wherever it is installed, which warns of each kernel library that finds no CUDA."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _guarded(name: str, run: Callable[[], int]) -> int:
    """Run a command; whatever happens ends as a status and at most one line, unless PEFTMUX_DEBUG is set."""
    try:
        return run()
    except CommandError as error:
        print(f"peftmux {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("PEFTMUX_DEBUG"):
            raise
        print(
            f"peftmux {name}: internal error: {type(error).__name__}: {error} (PEFTMUX_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        return 1


def _overview() -> str:
    lines = ["usage: peftmux COMMAND [options]", ""]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "peftmux COMMAND --help lists its options; peftmux --version"])


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    print(f"peftmux: expected one of {', '.join(COMMANDS)}, got {name!r}{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
