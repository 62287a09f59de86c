"""How a command ends without a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """What went wrong, in words for who typed the command. The exit status is 1."""
