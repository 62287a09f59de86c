"""What readouts make of a step's final states: each row's own, whatever the others read, in one copy to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from peftmux.kernels.head import Head, HeadLayer, HeadSite
from peftmux.runtime.model.states import read_out
from peftmux.runtime.params import OutputOptions, Readout, SamplingParams
from peftmux.runtime.scheduler import RowPlan

WIDTH = 6


def reading(row: int, readout: Readout, tokens: tuple[int, ...], read_from: int, slot: int = 0) -> RowPlan:
    return RowPlan(
        row=row,
        slot=slot,
        tokens=tokens,
        start=0,
        position_offset=0,
        blocks=(1,),
        samples=False,
        generated=0,
        sampling=SamplingParams(),
        output=OutputOptions(),
        prompt_logprobs_from=len(tokens),
        next_tokens=(),
        suppressed=(),
        history=None,
        readout=readout,
        read_from=read_from,
    )


def head_of(labels: int, seed: int) -> Head:
    weight = torch.randn(labels, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Head("token", HeadLayer(weight, torch.arange(labels).float()), tuple(map(str, range(labels))))


def test_rows_of_every_kind_get_their_own_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, site = {3: head_of(4, 0), 5: head_of(2, 1)}, HeadSite(torch.device("cpu"))
    for slot, head in heads.items():
        site.put(slot, site.prepare(head))
    rows = [
        reading(10, Readout.LAST, (1, 2, 3), 2),
        reading(11, Readout.TOKENS, (1, -1, 3), 0, slot=3),
        reading(12, Readout.MEAN, (4, 5), 0),
        reading(13, Readout.LAST, (4, 5), 2),  # its last token comes in a later step
        reading(14, Readout.SEQUENCE, (6,), 0, slot=5),
        reading(15, Readout.LAST, (7,), 0),
        reading(16, Readout.SEQUENCE, (8, 9), 1, slot=3),
    ]
    states = torch.randn(8, WIDTH).bfloat16()
    states[6, 2] = torch.inf  # of row 15
    copies: list[Tensor] = []
    cpu = Tensor.cpu

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        copies.append(tensor)
        return cpu(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "cpu", counted)
    got = read_out(states, rows, site)
    assert len(copies) == 1

    wide = states.float()
    logits = {slot: linear(wide, head.output.weight, head.output.bias) for slot, head in heads.items()}
    expected = {
        10: wide[0:1],
        11: logits[3][1:3],
        12: wide[3:5].sum(0, keepdim=True),
        14: logits[5][5:6],
        16: logits[3][7:8],
    }
    assert got.pop(15) == ()
    assert list(got) == list(expected)
    for row, values in expected.items():
        torch.testing.assert_close(torch.tensor(got[row]), values)
