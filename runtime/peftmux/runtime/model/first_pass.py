"""The first of two passes: the base model over the tokens of adapters whose experts are weighed by what it sees.

Its keys and values stay in a cache of their own, block for block beside the served one: where the prefix cache has an
adapter's block, both passes have written it. That cache is as large as the served one; it is made when the first such
adapter is loaded, beside what `--adapter-memory` counts, and stays, because the blocks in the prefix cache rely on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftmux.adapters.parts import ClassifierPart
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.routed import Shares, shares_from
from peftmux.runtime.errors import AdapterMemoryExhausted

if TYPE_CHECKING:
    from peftmux.runtime.model.cache import PagedCache

_TOKENS = 5


@dataclass(frozen=True, slots=True, eq=False)
class PreparedClassifier:
    part: ClassifierPart

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.part.layers for t in layer)


class FirstPass:
    """The resident adapters' classifiers. `prepare` may run in any thread, the rest in the one that runs steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, ClassifierPart] = {}
        self._make_cache: Callable[[], PagedCache] | None = None
        self._making = threading.Lock()
        self._cache: PagedCache | None = None

    @property
    def empty(self) -> bool:
        return not self._held

    def __contains__(self, slot: int) -> bool:
        return slot in self._held

    @property
    def cache(self) -> PagedCache | None:
        """None until an adapter needs it."""
        return self._cache

    def bind(self, make_cache: Callable[[], PagedCache]) -> None:
        """Say how to make a cache like the served one."""
        self._make_cache, self._cache = make_cache, None

    def prepare(self, part: ClassifierPart) -> PreparedClassifier:
        layers = tuple((w.to(self._device), b.to(self._device)) for w, b in part.layers)
        with self._making:
            if self._cache is None and self._make_cache is not None:
                try:
                    self._cache = self._make_cache()
                except torch.OutOfMemoryError as error:
                    raise AdapterMemoryExhausted("no room for the first pass's cache of keys and values") from error
        return PreparedClassifier(ClassifierPart(layers, part.rule))

    def put(self, slot: int, prepared: PreparedClassifier) -> None:
        self._held[slot] = prepared.part

    def drop(self, slot: int) -> None:
        self._held.pop(slot, None)

    def shares(self, hidden: Tensor, slots: Sequence[int], lens: Sequence[int]) -> Shares:
        """hidden: [T, D], the base's for the tokens of rows with these slots and lengths."""
        runs = Segments.build(slots, lens, hidden.device).runs
        pieces: dict[int, list[Tensor]] = {}
        for slot, start, end in runs:
            part = self._held[slot]
            pieces.setdefault(slot, []).append(shares_from(hidden[start:end].float(), part.layers, part.rule))
        return {slot: torch.cat(own) for slot, own in pieces.items()}


@torch.inference_mode()
def shows_its_hidden_state(module: PreTrainedModel) -> bool:
    """Is the decoder's output what transformers lists as the last hidden state? PEFT's classifier reads that."""
    ids = torch.arange(_TOKENS, device=module.device).unsqueeze(0) % module.config.get_text_config().vocab_size
    try:
        with _hooks_kept(module):
            listed = module(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        decoder = module.get_decoder()
        return torch.equal(listed, decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError, IndexError, RuntimeError):
        return False


@contextmanager
def _hooks_kept(module: nn.Module) -> Iterator[None]:
    """Takes away what transformers puts on a model that is asked for its states: each layer would run it ever after."""
    before = {one: (set(one._forward_hooks), set(vars(one))) for one in module.modules()}
    try:
        yield
    finally:
        for one, (hooks, names) in before.items():
            for key in set(one._forward_hooks) - hooks:
                del one._forward_hooks[key]
            for mark in {"_output_capturing_hooks_installed"} & set(vars(one)) - names:
                delattr(one, mark)
