"""The offline default: a small base model made from text that this package generates, and `peftmux demo`."""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The embedded base model's folder, written by `peftmux.demo.make_base`."""

SMALL = Path(__file__).parent / "small"
"""One of half the width, a quarter of its parameters, on which methods are compared beside BASE."""
