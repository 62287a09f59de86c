"""Adapters that scale what one of several siblings reads: its slice of the shared output, for their tokens alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from peftmux.adapters.base import LinearSite
from peftmux.kernels.dense import choose_dense
from peftmux.kernels.inputs import InputScale
from peftmux.kernels.lowrank import Segments
from peftmux.runtime.model.dense import stack
from peftmux.runtime.model.sites import SiteGroup
from peftmux.runtime.model.step import StepInputs, StepState

CPU = torch.device("cpu")
WIDTH, OUTS = 48, (64, 32, 7)
SLOTS, LENS = (0, 3, 5, 3, 9, 0), (2, 4, 1, 3, 2, 2)
"""Slot 9 holds nothing; slot 3 has two runs."""


def group_of(dtype: torch.dtype, state: StepState) -> tuple[SiteGroup, list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out, WIDTH, generator=generator).to(dtype) for out in OUTS]
    biases = [None if i == 1 else torch.randn(out, generator=generator).to(dtype) for i, out in enumerate(OUTS)]
    sites = [LinearSite(f"l{i}", WIDTH, out, biases[i] is not None, False) for i, out in enumerate(OUTS)]
    dense = choose_dense(CPU, dtype)(*stack(weights, biases))
    return SiteGroup(sites, biases, dense, dtype, CPU, state, "segments"), weights, biases


def step(segments: Segments) -> StepInputs:
    none = torch.zeros(0)
    return StepInputs(none, none, none, None, segments, none, segments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_scaling_adapters_have_their_own_slice(dtype: torch.dtype) -> None:
    state = StepState()
    group, weights, biases = group_of(dtype, state)
    state.set(step(Segments.build(SLOTS, LENS)))
    x = torch.randn(sum(LENS), WIDTH).to(dtype)
    base = group(x)
    scales = {(index, slot): torch.rand(WIDTH) + 0.5 for index in (1, 2) for slot in (3, 5)}
    for (index, slot), scale in scales.items():
        place = group.places(index)[InputScale]
        place.put(slot, place.prepare(InputScale(scale)))
    got = group(x)

    slots = torch.tensor(SLOTS).repeat_interleave(torch.tensor(LENS))
    columns = base.split(OUTS, 1)
    for index, mine in enumerate(got.split(OUTS, 1)):
        for token, slot in enumerate(slots.tolist()):
            if (index, slot) in scales:
                bias = biases[index]
                given = (x[token].float() * scales[index, slot]).to(dtype).float()
                expected = linear(given, weights[index].float(), None if bias is None else bias.float())
                torch.testing.assert_close(mine[token].float(), expected, rtol=2e-2, atol=2e-2)
            else:
                assert torch.equal(mine[token], columns[index][token])


def test_the_layer_is_read_once_a_step_and_never_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    state = StepState()
    group, _, _ = group_of(torch.float32, state)
    calls = []
    layer = group._own[1]
    site = group._slices[1][1][InputScale]

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return layer(x)

    monkeypatch.setattr(site, "_layer", counted)
    monkeypatch.setattr(type(layer), "weight", lambda self: pytest.fail("the weight was made anew in a step"))
    place = group.places(1)[InputScale]
    for slot in (3, 5):
        place.put(slot, place.prepare(InputScale(torch.ones(WIDTH))))
    state.set(step(Segments.build(SLOTS, LENS)))
    group(torch.randn(sum(LENS), WIDTH))
    assert calls == [8]
    state.set(step(Segments.build((0, 9), (3, 3))))
    group(torch.randn(6, WIDTH))
    assert calls == [8]
