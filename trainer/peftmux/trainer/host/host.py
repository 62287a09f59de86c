"""Adapters in one live model: what stands at each place of the base, and which rows of a batch are whose.

A model has one host. With one adapter every row is its own; with several (`Host.rows`) each adapter changes its own
rows of a batch and no other, at every place, so that one pass of the base serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftmux.kernels.lowrank import LinearPart, Segments, choose_training
from peftmux.trainer.errors import TrainerError
from peftmux.trainer.host.inputs import Inputs, PrefixSource, VirtualTokens
from peftmux.trainer.host.place import Change, Place
from peftmux.trainer.host.random_state import Draws

if TYPE_CHECKING:
    from peftmux.trainer.methods.base import AttachedAdapter

__all__ = ["Change", "Host", "Place", "RowsApart", "replace_module"]

_ATTRIBUTE = "_peftmux_host"
_MODULE = "peftmux_adapters"


class RowsApart(TrainerError):
    """A layer is given a batch in which the rows cannot be told from each other."""


class Host:
    """Installs adapters in a model and takes them out again. The model's own parameters are frozen meanwhile."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.spans: tuple[tuple[str, slice], ...] | None = None
        """The batch's rows by adapter, covering all of them in order; None: all are the one adapter's."""
        self.width = 0
        """Tokens of each row, while there are several adapters' rows."""
        self._draws: dict[str, Draws] = {}
        self._segments: dict[int, Segments] = {}
        """The spans in tokens, by how many tokens a row has."""
        self._adapters: dict[str, AttachedAdapter] = {}
        self._head: RemovableHandle | None = None
        self._hook: RemovableHandle | None = None
        self._reader: RemovableHandle | None = None
        self._given: Any = None
        self._own_loss: Any = None

    @classmethod
    def of(cls, model: Any) -> Host:
        """The model's host, made when its first adapter comes."""
        host = model.__dict__.get(_ATTRIBUTE)
        if host is None:
            host = model.__dict__[_ATTRIBUTE] = cls(model)
        return host  # type: ignore[no-any-return]

    def add(self, adapter: AttachedAdapter) -> None:
        if not self._adapters:
            self.model.requires_grad_(False)
            head = self.model.get_output_embeddings()
            self._head = head and head.register_forward_pre_hook(_dense)
        self._adapters[adapter.key] = adapter
        for name, change in adapter.changes.items():
            place = self.model.get_submodule(name)
            if not isinstance(place, Place):
                place = Place(place, self)
                replace_module(self.model, name, place)
            change.train(self.model.training)
            place.changes[adapter.key] = change
        if len(adapter.modules):
            if _MODULE not in self.model._modules:
                self.model.add_module(_MODULE, nn.ModuleDict())
            # after the base's modules: the model takes the dtype of its first parameter for its own
            getattr(self.model, _MODULE)[adapter.key] = adapter.modules.train(self.model.training)
        if self._hook is None and _needs_hook(adapter):
            self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        adapter.installed()
        if self._reader is None and adapter.head is not None:
            self._reader = self.model.get_decoder().register_forward_hook(self._read_states)  # OPT calls no other
            self._own_loss, self.model.loss_function = self.model.loss_function, self._loss

    def remove(self, adapter: AttachedAdapter) -> None:
        del self._adapters[adapter.key]
        if not self._adapters and self._head is not None:
            self._head.remove()
            self._head = None
        for name in adapter.changes:
            place = self.model.get_submodule(name)
            del place.changes[adapter.key]
            if not len(place.changes):
                replace_module(self.model, name, place.base_layer)
        if len(adapter.modules):
            held = getattr(self.model, _MODULE)
            del held[adapter.key]
            if not len(held):
                delattr(self.model, _MODULE)
        if self._hook is not None and not any(map(_needs_hook, self._adapters.values())):
            self._hook.remove()
            self._hook = None
        adapter.removed()
        if self._reader is not None and all(a.head is None for a in self._adapters.values()):
            self._reader.remove()
            self._reader = self._given = None
            self.model.loss_function = self._own_loss

    def replace(self, old: AttachedAdapter, new: AttachedAdapter) -> None:
        """`new` has the changes and the key of `old`, and takes its place."""
        self.remove(old)
        self.add(new)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the model is bare, for another adapter to be attached as if it were the first."""
        held = list(self._adapters.values())
        for adapter in held:
            self.remove(adapter)
        try:
            yield
        finally:
            for adapter in held:
                self.add(adapter)

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """What is attached within it is detached again where it raises."""
        before = set(self._adapters)
        try:
            yield
        except BaseException:
            for key in self._adapters.keys() - before:
                self._adapters[key].detach()
            raise

    @contextmanager
    def rows(self, counts: Mapping[str, int], draws: Mapping[str, Draws] | None = None) -> Iterator[None]:
        """Within it a batch holds so many rows of each adapter (by key), in this order.

        draws: of the adapters that draw from a state of their own. RowsApart for a base that has no rows somewhere.
        """
        spans, start = [], 0
        for key, count in counts.items():
            spans.append((key, slice(start, start + count)))
            start += count
        before = self.spans, self._segments, self._draws
        self.spans, self._segments, self._draws = tuple(spans), {}, dict(draws or {})
        width = self.model.register_forward_pre_hook(self._see_width, with_kwargs=True)  # after `_before_forward`
        try:
            yield
        finally:
            width.remove()
            self.spans, self._segments, self._draws = before

    @contextmanager
    def only(self, key: str) -> Iterator[None]:
        """Within it every row is this adapter's, whatever others are attached."""
        before, self.spans = self.spans, ((key, slice(None)),)
        try:
            yield
        finally:
            self.spans = before

    def rows_of(self, key: str) -> slice | None:
        """The batch's rows that are this adapter's; None where it has none."""
        return slice(None) if self.spans is None else dict(self.spans).get(key)

    def sizes(self, x: Tensor) -> list[int]:
        """How much of x's first dimension is each adapter's: rows, or tokens where a layer is given them flat."""
        assert self.spans is not None
        flat = x.dim() == 2 and x.is_floating_point()
        each, total = self.width if flat else 1, self.spans[-1][1].stop
        if len(x) != total * each:
            raise RowsApart(f"expected {total} rows of {self.width} tokens in every layer, got {list(x.shape)}")
        return [(span.stop - span.start) * each for _, span in self.spans]

    def draw(self, index: int, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """`function` of an adapter's rows, or tokens, as it draws in a pass of its own."""
        assert self.spans is not None
        key, span = self.spans[index]
        if key not in self._draws:
            return function(*tensors)
        return self._draws[key].apply(function, span.stop - span.start, self.width, *tensors)

    def add_low_rank(self, y: Any, x: Any, parts: Sequence[LinearPart]) -> Any:
        """y: [B, ..., N], x: [B, ..., K] where there is a part; each is that of the rows of one span."""
        assert self.spans is not None
        if not any(part.rank for part in parts):
            return y
        rows = x.flatten(0, -2)
        each = len(rows) // self.spans[-1][1].stop
        if each not in self._segments:
            counts = [(span.stop - span.start) * each for _, span in self.spans]
            self._segments[each] = Segments.build(range(1, len(counts) + 1), counts, x.device)
        add = choose_training(x.device)
        return add(y.flatten(0, -2), rows, dict(enumerate(parts, 1)), self._segments[each]).view_as(y)

    @property
    def loss_function(self) -> Any:
        """The model's own."""
        return self.model.loss_function if self._reader is None else self._own_loss

    @property
    def hidden(self) -> Tensor | None:
        """[B, T, D] of the last pass: the decoder's final states, while an adapter with a head is attached."""
        return None if self._given is None else self._given[0]

    def _read_states(self, module: nn.Module, args: Any, output: Any) -> None:
        self._given = output  # not what is in it: a ladder's hook may come later

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Any:
        """The model's own loss of what the one adapter at work scores; labels: [B, K] of the last K positions."""
        key = self.spans[0][0] if self.spans else next(iter(self._adapters))
        assert self.hidden is not None
        scores, size = self._adapters[key].scores(logits, self.hidden[:, -labels.shape[1] :], vocab_size)
        return self._own_loss(logits=scores, labels=labels, vocab_size=size, **kwargs)

    def _see_width(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.width = (args[0] if args else kwargs["input_ids"]).shape[1]

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Virtual tokens and prefixes come in front of what the model is given; a mask where it is not causal."""
        ids = args[0] if args else kwargs["input_ids"]
        spans = self.spans or ((next(iter(self._adapters)), slice(0, ids.shape[0])),)
        parts = [(span, self._adapters[key]) for key, span in spans if key in self._adapters]
        virtual: list[tuple[slice, VirtualTokens | None]] = [(span, a.virtual) for span, a in parts]
        prefixes: list[tuple[slice, PrefixSource | None]] = [(span, a.prefix) for span, a in parts]
        inputs = Inputs(self.model, {**kwargs, "input_ids": ids})
        for (_, adapter), added in zip(parts, inputs.insert_virtual(virtual), strict=True):
            if adapter.key in self._draws:
                own = self._draws[adapter.key]
                self._draws[adapter.key] = replace(own, tokens=own.tokens + added)
        inputs.prepend_prefixes(prefixes)
        if any(a.sees_both_ways for _, a in parts):
            inputs.see_both_ways([(span, a.sees_both_ways) for span, a in parts])
        if "logits_to_keep" in inputs.kwargs and all(a.head is not None for _, a in parts):
            inputs.kwargs["logits_to_keep"] = 1  # nobody reads them
        return args[1:], inputs.kwargs


def _needs_hook(adapter: AttachedAdapter) -> bool:
    return bool(adapter.prefix or adapter.virtual or adapter.sees_both_ways or adapter.head)


def _dense(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last positions of each row as one block: torch multiplies a cut-out row by row, and reads the weight anew."""
    return (args[0].contiguous(), *args[1:])


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module at path `name`, which may be inside of a place itself."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent.base_layer if isinstance(parent, Place) else parent, child, new)
