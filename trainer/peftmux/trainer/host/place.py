"""What stands at one place of the base, and the changes that adapters make there to their own rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftmux.kernels.lowrank import LinearPart

if TYPE_CHECKING:
    from peftmux.trainer.host.host import Host


class Change(nn.Module):
    """What one adapter does at one place of the base, computed from its trainable tensors at each call.

    The first dimension of x and y is the batch's rows, or all of their tokens; x is the first thing that the module is
    given. A subclass overrides `before`, `after` or both; its file tensors are named by what follows the module's path
    in the adapter's file.
    """

    replaces: ClassVar[bool] = False
    """`after` needs x alone: it is given None for y, and the base computes nothing, where no other adapter needs it."""

    @property
    def draws(self) -> bool:
        """Whether `after` and `read` draw at random, from torch's global generator; nothing else may."""
        return False

    def before(self, x: Any) -> Any:
        """What the base's module is given in the place of x."""
        return x

    def after(self, y: Any, x: Any) -> Any:
        """What stands for the base's output y. x is what the place was given, not what `before` made of it."""
        return y

    def low_rank(self) -> LinearPart | None:
        """All that it does, where that is a low-rank term: many such are one operation, over their rows together."""
        return None

    def read(self, x: Tensor) -> Tensor:
        """What the low-rank term reads of x."""
        return x

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {}


class _Nothing(Change):
    def low_rank(self) -> LinearPart:
        return LinearPart()


_NOTHING = _Nothing()


class Place(nn.Module):
    """Stands where a module of the base stood, with the changes of the adapters that act there."""

    def __init__(self, base_layer: nn.Module, host: Host) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.changes = nn.ModuleDict()
        """By `AttachedAdapter.key`."""
        self.__dict__["host"] = host  # no submodule: the host holds the model
        self.training = base_layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # attention is called by keywords
            name = next(iter(kwargs))
            return self._changed(kwargs[name], lambda x: self.base_layer(**{**kwargs, name: x}))
        return self._changed(args[0], lambda x: self.base_layer(x, *args[1:], **kwargs))

    def _changed(self, x: Any, base: Callable[[Any], Any]) -> Any:
        host: Host = self.__dict__["host"]
        if host.spans is None:
            (alone,) = self.changes.values()
            return _alone(alone, base, x)  # type: ignore[arg-type]
        here = [self._change(key) for key, _ in host.spans]
        if len(here) == 1:
            return _alone(here[0], base, x)
        low_rank = [part for change in here if (part := change.low_rank()) is not None]
        sizes = host.sizes(x)
        if len(low_rank) == len(here):
            return host.add_low_rank(base(x), _read(host, here, x, sizes), low_rank)
        pieces = x.split(sizes)  # not slices: the gradient of a slice is as large as x
        replaced = all(change.replaces for change in here)
        outputs = [None] * len(here) if replaced else _split(base(_given(here, x, pieces)), sizes)
        own = zip(here, outputs, pieces, strict=True)
        return _cat([_call(host, i, change, change.after, y, x) for i, (change, y, x) in enumerate(own)])

    def _change(self, key: str) -> Change:
        return self.changes[key] if key in self.changes else _NOTHING  # type: ignore[return-value] # noqa: SIM401

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models look at a layer's weight, its dtype or its sizes
            return getattr(self._modules["base_layer"], name)


def _alone(change: Change, base: Callable[[Any], Any], x: Any) -> Any:
    return change.after(None if change.replaces else base(change.before(x)), x)


def _given(here: Sequence[Change], x: Any, pieces: Sequence[Any]) -> Any:
    """What the base's module is given for rows of several adapters: x itself, where none of them changes it."""
    if all(type(change).before is Change.before for change in here):
        return x
    return _cat([change.before(piece) for change, piece in zip(here, pieces, strict=True)])


def _read(host: Host, here: Sequence[Change], x: Tensor, sizes: list[int]) -> Tensor:
    """What the low-rank terms of the batch's adapters read of x, each of its own rows."""
    if not any(change.draws for change in here):
        return x
    pieces = enumerate(zip(here, x.split(sizes), strict=True))
    return torch.cat([_call(host, i, change, change.read, piece) for i, (change, piece) in pieces])


def _call(host: Host, index: int, change: Change, function: Callable[..., Any], *tensors: Any) -> Any:
    """Of the rows of the batch's adapter of this index."""
    return host.draw(index, function, *tensors) if change.draws else function(*tensors)


def _split(y: Any, sizes: list[int]) -> list[Any]:
    """The rows of a module's output by adapter; it may be a tuple of tensors and Nones."""
    if not isinstance(y, tuple):
        return list(y.split(sizes))
    columns = [item.split(sizes) if isinstance(item, Tensor) else [item] * len(sizes) for item in y]
    return list(zip(*columns, strict=True))


def _cat(pieces: list[Any]) -> Any:
    if isinstance(pieces[0], tuple):
        columns = zip(*pieces, strict=True)
        return tuple(torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
