"""Changes at residual branches: the attention and feed-forward modules whose output is added to a stream that a norm
reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.base import ResidualBranch
from peftmux.adapters.branches import residual_branches
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Change


class Stream(Change):
    """At the norm that reads the residual stream: passes what it reads on to the branch behind it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Tensor | None = None

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        self._seen = x
        return y

    def take(self) -> Tensor:
        """[B, T, D]. The norm comes before its branch, also where a layer is recomputed."""
        seen, self._seen = self._seen, None
        assert seen is not None, "a branch runs after the norm it reads"
        return seen


class BranchChange(Change, ABC):
    """At an attention or feed-forward module, whose output may stand first in a tuple."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = (stream,)  # no submodule: it stands at the norm
        self.on = True

    def after(self, y: Any, x: Any) -> Any:
        h = self._stream[0].take()
        if not self.on:
            return y
        if isinstance(y, tuple):
            return (self.changed(y[0], h), *y[1:])
        return self.changed(y, h)

    @abstractmethod
    def changed(self, y: Tensor, h: Tensor) -> Tensor:
        """y: [B, T, D], what the module gives; h: [B, T, D], the stream that its norm reads. [B, T, D] in y's place."""


def chosen_branches(model: Any, roles: tuple[str, ...], leave_out: list[int]) -> list[ResidualBranch]:
    """Raises OptionError for a base whose blocks have another form, or where no layer is left."""
    found = residual_branches(model)
    if not found:
        raise OptionError(
            "method",
            f"bottlenecks do not fit {type(model).__name__}: expected blocks that add what attention and feed-forward "
            "give, as it is, to the stream that a norm reads",
        )
    layers = {branch.layer for branch in found.values()}
    if odd := [layer for layer in leave_out if layer not in layers]:
        raise OptionError("leave-out", f"expected numbers of layers from 0 to {max(layers)}, got {odd[0]}")
    chosen = [b for b in found.values() if b.role in roles and b.layer not in leave_out]
    if not chosen:
        raise OptionError("leave-out", "expected some layer to be left, got all")
    return chosen


def branch_changes(branches: list[ResidualBranch], build: Callable[[Stream], BranchChange]) -> Mapping[str, Change]:
    changes: dict[str, Change] = {}
    for branch in branches:
        stream = Stream()
        changes[branch.norm] = stream
        changes[branch.name] = build(stream)
    return changes
