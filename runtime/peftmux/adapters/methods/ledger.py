"""The account of an adapter's tensors: each is claimed once, in the shape the base needs, or it is refused."""

from __future__ import annotations

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.methods.registry import Shapes

PREFIX = "base_model.model."
"""Stands before a module's path in the names of PEFT's tensors."""


class Ledger:
    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._unclaimed = set(shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._unclaimed

    def has(self, name: str) -> bool:
        """Is it in the files, claimed or not?"""
        return name in self._shapes

    def unclaimed(self) -> list[str]:
        return sorted(self._unclaimed)

    def claim(self, name: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
        """Claim a tensor that must be there; None in `expected` is any size from 1. Returns its shape."""
        if name not in self._unclaimed:
            raise AdapterInvalid(Reason.MISSING_TENSOR, f"expected tensor {name} {_show(expected)}, which is missing")
        shape = self._shapes[name]
        fits = len(shape) == len(expected) and all(
            got >= 1 if want is None else got == want for got, want in zip(shape, expected, strict=True)
        )
        if not fits:
            raise AdapterInvalid(
                Reason.SHAPE_MISMATCH,
                f"tensor {name}: expected shape {_show(expected)} for this base, got {list(shape)}",
            )
        self._unclaimed.remove(name)
        return shape

    def close(self) -> None:
        """Raise if a tensor is left that nothing has claimed."""
        if self._unclaimed:
            names = self.unclaimed()
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise AdapterInvalid(
                Reason.UNUSED_TENSOR,
                f"expected every tensor to be used, but nothing in the config uses {', '.join(names[:3])}{more}",
            )


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
