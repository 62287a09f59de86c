"""Families of base models: equal greedy tokens to transformers' `generate`, or a refusal that says why."""

from __future__ import annotations

import asyncio
import re

import pytest
from transformers import PreTrainedModel

from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.model.loaded import LoadedModel
from tests.engine.harness import Answer, ask, check_quiet, request
from tests.model.families import REFUSED, SERVED, build, greedy

PROMPTS = [
    [5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64],
    [101, 44, 3],
    [7] * 21,
    [150, 151, 152, 153, 9],
]
NEW_TOKENS = 12


def engine_over(model: LoadedModel) -> LocalEngine:
    """Steps of 8 tokens: a prompt of 21 comes in pieces, beside rows that decode."""
    config = EngineConfig(model=model.name, max_batch_tokens=8, block_size=4, num_threads=1)
    return build_engine(model, config, NullObserver())


async def staggered(engine: LocalEngine, prompts: list[list[int]]) -> list[Answer]:
    """Each prompt arrives when the one before it has its second token."""
    answers = [Answer() for _ in prompts]
    arrived = [asyncio.Event() for _ in prompts]

    async def one(i: int) -> None:
        if i:
            await arrived[i - 1].wait()
        async for delta in engine.generate(request(prompts[i], max_tokens=NEW_TOKENS)):
            answers[i].add(delta)
            if len(answers[i].ids) > 1:
                arrived[i].set()

    await asyncio.gather(*(one(i) for i in range(len(prompts))))
    return answers


@pytest.mark.parametrize("family", SERVED)
async def test_family_is_served_exactly(family: str) -> None:
    module = build(family)
    expected = [greedy(module, prompt, NEW_TOKENS) for prompt in PROMPTS]
    engine = engine_over(fit_model(module, None, family))
    try:
        together = await staggered(engine, PROMPTS)
        assert [answer.ids for answer in together] == expected
        again = await ask(engine, request(PROMPTS[2], max_tokens=NEW_TOKENS))
        assert (again.ids, again.cached > 0) == (expected[2], True)
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)


@pytest.mark.parametrize("family", REFUSED)
def test_family_without_the_attention_interface_is_refused(family: str) -> None:
    module: PreTrainedModel = build(family)
    name = type(module).__name__
    with pytest.raises(UnsupportedModel, match=re.escape(name.removesuffix("ForCausalLM"))) as refusal:
        fit_model(module, None, family)
    assert re.search("expected|cannot|not served", str(refusal.value))


async def test_two_models_that_load_at_once_do_not_mix() -> None:
    """Each finds its own layers, and each engine answers as its own model does."""
    names = ["llama", "gemma2", "gpt2", "qwen3"]
    modules = [build(name) for name in names]
    expected = [greedy(module, PROMPTS[0], NEW_TOKENS) for module in modules]
    models = await asyncio.gather(
        *(asyncio.to_thread(fit_model, m, None, n) for m, n in zip(modules, names, strict=True))
    )
    engines = [engine_over(model) for model in models]
    try:
        wanted = request(PROMPTS[0], max_tokens=NEW_TOKENS)
        answers = await asyncio.gather(*(ask(engine, wanted) for engine in engines))
        assert [answer.ids for answer in answers] == expected
    finally:
        for engine in engines:
            await engine.drain(0.0)
