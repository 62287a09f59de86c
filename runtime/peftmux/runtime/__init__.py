"""The serving engine and its gRPC server. `Engine` is the engine in process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftmux.runtime.engine.sync import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """`Engine` brings torch and transformers with it: imported when it is asked for."""
    if name == "Engine":
        from peftmux.runtime.engine.sync import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
