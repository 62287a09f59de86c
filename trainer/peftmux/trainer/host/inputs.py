"""What adapters put in front of a batch: virtual tokens among its ids, keys and values before its first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from peftmux.trainer.data.encode import IGNORED


class PrefixSource(Protocol):
    """Keys and values before a row's first token."""

    @property
    def length(self) -> int: ...

    def layers(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Of each attention layer keys and values [n, kv_heads, head_dim], differentiable, in the base's dtype."""
        ...


class VirtualTokens(Protocol):
    """Tokens that are trained vectors. Their ids lie past the vocabulary; a Change at the embedding resolves them."""

    def insert(self, ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """ids, labels: [B, T] -> [B, T + n] with the virtual tokens in; their labels are IGNORED."""
        ...


class SeesBothWays(Protocol):
    """Which tokens see each other whatever their order."""

    def __call__(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T] bool."""
        ...


class PrefixLayer(DynamicLayer):
    """One layer's prefix as a cache that is only read, so that recomputing a layer gives the same again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [rows, kv_heads, n, head_dim]; one row stands for any number."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, kv_heads, T, head_dim] -> [B, kv_heads, n + T, head_dim], nothing kept."""
        rows = key_states.shape[0]
        keys, values = self.keys.expand(rows, -1, -1, -1), self.values.expand(rows, -1, -1, -1)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class Inputs:
    """The keyword arguments of one forward, as they are being rewritten."""

    def __init__(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self._model = model

    def insert_virtual(self, sources: Sequence[tuple[slice, VirtualTokens | None]]) -> list[int]:
        """Each adapter's virtual tokens into its rows; rows are filled up on the right to the longest.

        Returns how many there are, by adapter.
        """
        if not any(source for _, source in sources):
            return [0] * len(sources)
        if self.kwargs.get("past_key_values") is not None:
            raise ValueError("a model with virtual tokens attached takes whole sequences, without past_key_values")
        ids, labels, mask = (self.kwargs.get(n) for n in ("input_ids", "labels", "attention_mask"))
        assert ids is not None
        keep = self.kwargs.get("logits_to_keep")
        cropped = 0 if keep is None or labels is None else ids.shape[1] - labels.shape[1]
        if labels is not None and cropped:  # back to one for each token
            labels = pad(labels, (cropped, 0), value=IGNORED)
        new = [
            (ids[s], None if labels is None else labels[s]) if source is None else source.insert(ids[s], _of(labels, s))
            for s, source in sources
        ]
        width = max(piece.shape[1] for piece, _ in new)
        self.kwargs["input_ids"] = torch.cat([pad(piece, (0, width - piece.shape[1])) for piece, _ in new])
        added = [piece.shape[1] - ids.shape[1] for piece, _ in new]
        if labels is not None:
            parts = [pad(part, (0, width - part.shape[1]), value=IGNORED) for _, part in new if part is not None]
            self.kwargs["labels"] = torch.cat(parts)
            if keep is not None:
                first = max(min(added) + (cropped or -1), 0)  # a row's first token is predicted now, if it is learned
                self.kwargs |= {"labels": self.kwargs["labels"][:, first:], "logits_to_keep": width - first}
        if mask is not None:
            ones = [mask.new_ones(piece.shape[0], piece.shape[1] - ids.shape[1]) for piece, _ in new]
            grown = [torch.cat([one, mask[s]], 1) for one, (s, _) in zip(ones, sources, strict=True)]
            self.kwargs["attention_mask"] = torch.cat([pad(part, (0, width - part.shape[1])) for part in grown])
        return added

    def prepend_prefixes(self, sources: Sequence[tuple[slice, PrefixSource | None]]) -> None:
        """The prefixes as the past, so that a row's first token has position n and sees all of its prefix."""
        present = [source for _, source in sources if source is not None]
        if not present:
            return
        if self.kwargs.get("past_key_values") is not None:
            raise ValueError("a model with a prefix attached takes whole sequences, without past_key_values")
        ids = self.kwargs["input_ids"]
        widest = max(source.length for source in present)
        layers = (
            [(k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in present[0].layers()]
            if len(sources) == 1
            else _side_by_side(sources, widest)
        )
        self.kwargs |= {"past_key_values": Cache(layers=[PrefixLayer(k, v) for k, v in layers]), "use_cache": False}
        mask = self.kwargs.get("attention_mask")
        if len(sources) > 1:
            lengths = torch.cat([ids.new_full((s.stop - s.start, 1), p.length if p else 0) for s, p in sources])
            seen = torch.arange(widest, device=ids.device) >= widest - lengths
            mask = ids.new_ones(ids.shape) if mask is None else mask
            self.kwargs["attention_mask"] = torch.cat([seen.to(mask.dtype), mask], 1)
            self.kwargs["position_ids"] = lengths + torch.arange(ids.shape[1], device=ids.device)
        elif mask is not None:
            self.kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], widest), mask], 1)

    def see_both_ways(self, sources: Sequence[tuple[slice, SeesBothWays | None]]) -> None:
        """Tokens that stand in one run of such see each other whatever their order; all else is causal as before."""
        ids, mask, positions = (self.kwargs.get(n) for n in ("input_ids", "attention_mask", "position_ids"))
        assert ids is not None
        flags = torch.cat([torch.zeros_like(ids[s], dtype=torch.bool) if f is None else f(ids[s]) for s, f in sources])
        if not flags.any():
            return
        past = 0 if mask is None else mask.shape[1] - ids.shape[1]
        own = None if mask is None else mask[:, past:]
        run = torch.where(flags, (flags & ~pad(flags, (1, -1))).cumsum(-1), 0)
        together = flags.unsqueeze(-1) & (run.unsqueeze(-1) == run.unsqueeze(-2))
        if mask is None and positions is not None:
            row = _packed_rows(positions)
            together = together & (row.unsqueeze(-1) == row.unsqueeze(-2))
        if own is not None:
            together = together & own.bool().unsqueeze(-2)
        earlier = visible(positions, own)
        seen = together | (causal_only(ids) if earlier is None else earlier)
        if mask is not None and past:
            seen = torch.cat([mask[:, None, :past].bool().expand(-1, ids.shape[1], -1), seen], -1)
        if positions is None:
            self.kwargs["position_ids"] = torch.arange(past, past + ids.shape[1], device=ids.device).unsqueeze(0)
        self.kwargs["attention_mask"] = whole_mask(self._model, seen.expand(ids.shape[0], -1, -1))


def causal_only(ids: Tensor) -> Tensor:
    """[1, T, T] bool, query by key."""
    size = ids.shape[-1]
    return torch.ones(size, size, dtype=torch.bool, device=ids.device).tril().unsqueeze(0)


def visible(positions: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """[B, T, T] bool, query by key; None: all that came before. A token always sees itself.

    positions: [B, T], of packed rows, which begin anew with each of them. mask: [B, T], 0 for filling.
    """
    if positions is None and mask is None:
        return None
    like = positions if mask is None else mask
    assert like is not None
    seen = causal_only(like)
    if mask is not None:
        seen = seen & mask.bool().unsqueeze(-2)
    elif positions is not None:
        row = _packed_rows(positions)
        seen = seen & (row.unsqueeze(-1) == row.unsqueeze(-2))
    return seen | torch.eye(like.shape[-1], dtype=torch.bool, device=like.device)


def whole_mask(model: Any, seen: Tensor) -> Tensor:
    """[B, T, keys] bool -> [B, 1, T, keys] as the model's attention takes a mask that is complete already."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        return seen.unsqueeze(1)
    hidden = torch.finfo(model.dtype).min
    return torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, hidden).unsqueeze(1)


def _packed_rows(positions: Tensor) -> Tensor:
    """[B, T]: of each token the number of its row, where positions begin anew with each row."""
    new = positions[..., 1:] != positions[..., :-1] + 1
    return pad(new.long().cumsum(-1), (1, 0))


def _of(tensor: Tensor | None, span: slice) -> Tensor | None:
    return None if tensor is None else tensor[span]


def _side_by_side(sources: Sequence[tuple[slice, PrefixSource | None]], width: int) -> list[tuple[Tensor, Tensor]]:
    """Prefixes of several adapters for their rows, [rows, kv_heads, width, head_dim], filled up with zeros in front."""
    by_adapter = [(s.stop - s.start, source.layers() if source else None) for s, source in sources]
    model_layers = next(layers for _, layers in by_adapter if layers is not None)
    stacked = []
    for index, like in enumerate(model_layers):
        pair = []
        for which in (0, 1):
            pieces = []
            for rows, layers in by_adapter:
                t = like[which][:0] if layers is None else layers[index][which]
                filled = pad(t.transpose(0, 1), (0, 0, width - t.shape[0], 0))  # [kv_heads, width, head_dim]
                pieces.append(filled.expand(rows, -1, -1, -1))
            pair.append(torch.cat(pieces))
        stacked.append((pair[0], pair[1]))
    return stacked
