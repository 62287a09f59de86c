"""`peftmux bench`: tokens per second through the real server, beside transformers' own engines, in one run."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Imported late, so that the opponents' module can also be run by itself."""
    from peftmux.cli.bench.command import main as run

    return run(argv)
