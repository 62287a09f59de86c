"""Frequencies that transformers picks by the longest row of a batch are settled: a long row changes no neighbour."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.model.load import fit_model
from tests.engine.harness import ask, ask_all, request
from tests.model.families import build, greedy

SHORT, LONG = [5, 9, 17, 33, 3, 7, 8], [(7 * i) % 190 + 3 for i in range(150)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "sliding_window": None}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_long_neighbour_changes_nothing(kind: str) -> None:
    family, changes = KINDS[kind]
    config = EngineConfig(model=kind, max_batch_tokens=64, block_size=4, num_threads=1, prefix_caching=False)
    engine = build_engine(fit_model(build(family, **changes), None, kind, context_length=256), config, NullObserver())
    try:
        alone = await ask(engine, request(SHORT, max_tokens=16))
        long = await ask(engine, request(LONG, max_tokens=16))
        beside = await ask_all(engine, [request(LONG, max_tokens=16), request(SHORT, max_tokens=16)])
    finally:
        await engine.drain(0.0)
    for got, expected in zip(beside, (long, alone), strict=True):
        assert got.ids == expected.ids
        assert got.values == pytest.approx(expected.values, abs=1e-4)


async def test_longrope_serves_the_frequencies_of_a_full_context() -> None:
    """What transformers computes where the row itself is long."""
    family, changes = KINDS["longrope"]
    expected = greedy(build(family, **changes), LONG, 8)
    config = EngineConfig(model=family, max_batch_tokens=64, block_size=4, num_threads=1)
    engine = build_engine(fit_model(build(family, **changes), None, family), config, NullObserver())
    try:
        assert (await ask(engine, request(LONG, max_tokens=8))).ids == expected
    finally:
        await engine.drain(0.0)


def test_longrope_does_depend_on_the_batch_in_transformers() -> None:
    """The hazard itself, so that the tests above can fail."""
    family, changes = KINDS["longrope"]
    module: Any = build(family, **changes)
    with torch.inference_mode():
        alone = module(input_ids=torch.tensor([SHORT])).logits
        positions = torch.tensor([[*range(len(SHORT)), 200]])
        beside = module(input_ids=torch.tensor([[*SHORT, 3]]), position_ids=positions).logits[:, : len(SHORT)]
    assert float((alone - beside).abs().max()) > 1e-2
