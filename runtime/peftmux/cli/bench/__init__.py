"""`peftmux bench`: tokens per second through the real server, beside transformers' own engines, in one run."""

from peftmux.cli.bench.main import main

__all__ = ["main"]
