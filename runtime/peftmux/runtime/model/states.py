"""Final hidden states: caught on their way to the output projection, and read out for rows that generate nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftmux.adapters.stream import decoders
from peftmux.kernels.head import HeadSite
from peftmux.runtime.params import Readout, State
from peftmux.runtime.scheduler.plan import RowPlan


class StateTap:
    """Catches what the decoder under a causal model returns: after the last norm, before the output projection."""

    def __init__(self, module: Any) -> None:
        self.wanted = False
        """Of the forward that comes next; kept activations would hold their memory."""
        self.width = 0
        """Of a state; 0 before the first forward, and where no module gives them."""
        self._states: Tensor | None = None
        for decoder in decoders(module):
            decoder.register_forward_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        states: Tensor = output[0]
        self.width = states.shape[-1]
        if self.wanted:
            self._states = states

    def take(self, keep: Tensor) -> Tensor:
        """[N, D], those of tokens `keep` [N] of the forward that has just run."""
        states = self._states
        assert states is not None, "no forward that keeps its states has run since the last call"
        self._states = None
        return states.view(-1, states.shape[-1]).index_select(0, keep)


def read_out(states: Tensor, rows: Sequence[RowPlan], heads: HeadSite) -> dict[int, tuple[State, ...]]:
    """What each row's states come to, by row; () for a row where that is not finite.

    states: [N, D] of the rows' read tokens, in order. A head gives its logits, LAST the state, MEAN the states' sum.
    """
    read = [row for row in rows if row.reads]
    at = 0
    spans = []
    for row in read:
        spans.append((at, at + len(row.reads)))
        at += len(row.reads)
    values = _with_heads(states, read, spans, heads)
    return dict(zip([row.row for row in read], _plain(values), strict=True))


def _with_heads(
    states: Tensor, rows: Sequence[RowPlan], spans: Sequence[tuple[int, int]], heads: HeadSite
) -> list[Tensor]:
    """One product for all rows of an adapter; the rows of one slot need not stand together."""
    values: list[Tensor | None] = [None] * len(rows)
    by_slot: dict[int, list[int]] = {}
    for i, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
        if row.readout in (Readout.SEQUENCE, Readout.TOKENS):
            by_slot.setdefault(row.slot, []).append(i)
        else:
            part = states[start:stop].float()
            values[i] = part.sum(0, keepdim=True) if row.readout is Readout.MEAN else part
    for slot, indices in by_slot.items():
        parts = [states[start:stop] for start, stop in (spans[i] for i in indices)]
        logits = heads.apply(slot, torch.cat(parts))
        for i, part in zip(indices, logits.split([len(p) for p in parts]), strict=True):
            values[i] = part
    return [value for value in values if value is not None]


def _plain(values: Sequence[Tensor]) -> list[tuple[State, ...]]:
    """Of float32 values of any widths, in one copy to the host."""
    on_host = torch.cat([value.flatten() for value in values]).cpu().split([value.numel() for value in values])
    return [
        tuple(map(tuple, own.view(value.shape).tolist())) if bool(own.isfinite().all()) else ()
        for own, value in zip(on_host, values, strict=True)
    ]
