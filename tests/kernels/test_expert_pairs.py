"""Tokens sorted by their experts and adapters, and summed back."""

from __future__ import annotations

import pytest
import torch

from peftmux.kernels.experts import Pairs
from peftmux.kernels.lowrank import Segments


@pytest.mark.parametrize("owned", [True, False], ids=["own adapters", "one adapter"])
@pytest.mark.parametrize(("tokens", "each"), [(1, 1), (7, 2), (64, 3)])
def test_pairs_of_one_expert_and_adapter_stand_together(tokens: int, each: int, owned: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.stack([torch.randperm(5, generator=generator)[:each] for _ in range(tokens)])
    slots = torch.randint(1, 4, (tokens,), generator=generator)
    pairs = Pairs.of(experts, slots if owned else 700)
    listed = [
        (expert, slot if owned else 700, token)
        for token, (row, slot) in enumerate(zip(experts.tolist(), slots.tolist(), strict=True))
        for expert in row
    ]
    assert pairs.order.sort().values.tolist() == list(range(tokens * each))
    assert pairs.tokens.tolist() == [listed[i][2] for i in pairs.order.tolist()]
    ends = [0, *(group.end for group in pairs.groups)]
    assert [group.start for group in pairs.groups] == ends[:-1]
    assert ends[-1] == tokens * each
    assert len({(group.expert, group.slot) for group in pairs.groups}) == len(pairs.groups)
    for expert, slot, start, end in pairs.groups:
        own = [listed[i] for i in pairs.order[start:end].tolist()]
        assert {(e, s) for e, s, _ in own} == {(expert, slot)}
        assert [token for _, _, token in own] == sorted(token for _, _, token in own)


def test_values_come_back_to_their_tokens() -> None:
    experts = torch.tensor([[3, 0], [1, 3], [0, 2]])
    pairs = Pairs.of(experts, torch.tensor([1, 2, 1]))
    values = torch.tensor(
        [[10.0 * token + expert, 1.0] for token, row in enumerate(experts.tolist()) for expert in row]
    )
    assert pairs.by_token(values[pairs.order]).tolist() == [[3.0, 2.0], [24.0, 2.0], [42.0, 2.0]]


def test_tokens_of_some_adapters_are_found_once_a_step() -> None:
    segments = Segments.build((3, 0, 5, 3, 9), (2, 1, 3, 1, 1))
    tokens, slots = segments.tokens_of((3, 9))
    assert (tokens.tolist(), slots.tolist()) == ([0, 1, 6, 7], [3, 3, 3, 9])
    assert segments.tokens_of((3, 9))[0] is tokens
    assert segments.tokens_of((5,))[0].tolist() == [3, 4, 5]
