"""Classified == PEFT's own logits: alone, and mixed in one batch with rows that generate and that embed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftmux.kernels import native
from peftmux.runtime.engine.api import Classification, ClassificationRequest, EmbeddingRequest, Pooling
from peftmux.runtime.engine.local import LocalEngine
from tests.engine.harness import FIXTURES, ask, check_quiet, load, request, running
from tests.folders import CLASSIFIES
from tests.parity.conftest import SETTINGS, TORCH, Steps

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOLERANCE = 3e-4


@dataclass(frozen=True, slots=True)
class Case:
    """Row `row` of one folder's expected values."""

    folder: str
    row: int
    ids: list[int]
    logits: Tensor
    """[rows, C]: one row for a sequence head, one for each real token otherwise."""

    @property
    def request(self) -> ClassificationRequest:
        return ClassificationRequest(tuple(self.ids), self.folder)


def cases(base: str) -> list[Case]:
    found = []
    for name in CLASSIFIES:
        if name.startswith(f"peft/{base}/"):
            expected = load_file(Path(FIXTURES, name, "expected.safetensors"))
            for row, (ids, logits) in enumerate(zip(expected["input_ids"], expected["logits"], strict=True)):
                rows = logits[-len(ids) :] if logits.ndim == 2 else logits[None]  # virtual tokens come first
                found.append(Case(name.split("/")[2], row, ids.tolist(), rows))
    return found


@dataclass(slots=True)
class Served:
    engine: LocalEngine
    base: str
    cases: list[Case]
    steps: Steps


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[(name, settings) for name in ("llama", "qwen2") for settings in SETTINGS],
    ids="-".join,
)
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    name, settings = request.param
    steps = Steps()
    with pytest.MonkeyPatch.context() as patch:
        if settings == TORCH:
            patch.setattr(native, "load", lambda: None)
        async with running(name, observer=steps, **SETTINGS[settings]) as engine:
            for folder in {case.folder for case in cases(name)} | {"lora"}:
                await load(engine, folder)
            usage = engine.stats().kv_cache_usage
            yield Served(engine, name, cases(name), steps)
            await check_quiet(engine, usage)


def check(answer: Classification, case: Case, engine: LocalEngine) -> None:
    logits = torch.tensor(answer.logits)
    torch.testing.assert_close(logits, case.logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(torch.tensor(answer.probabilities), logits.softmax(-1), rtol=0, atol=1e-6)
    assert answer.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert answer.labels == tuple(f"LABEL_{i}" for i in case.logits.argmax(-1).tolist())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(case.ids), 0)
    assert answer.adapter_revision == engine.get_adapter(case.folder).revision


async def test_alone_and_again_from_the_cache(served: Served) -> None:
    for case in served.cases:
        for _ in range(2):
            check(await served.engine.classify(case.request), case, served.engine)


async def test_mixed_with_rows_that_generate_and_embed(served: Served) -> None:
    engine = served.engine
    ids = [case.ids for case in served.cases]
    alone = [await ask(engine, request(one, "lora")) for one in ids[:4]]
    served.steps.tokens.clear()
    generating = asyncio.gather(*(ask(engine, request(one, "lora")) for one in ids[:4]))
    embedding = asyncio.gather(*(engine.embed(EmbeddingRequest(tuple(one), "lora", Pooling.LAST)) for one in ids[:4]))
    answers = await asyncio.gather(*(engine.classify(case.request) for case in served.cases))
    for answer, case in zip(answers, served.cases, strict=True):
        check(answer, case, engine)
    for mixed, one in zip(await generating, alone, strict=True):
        assert mixed.ids == one.ids
        assert mixed.values == pytest.approx(one.values, abs=1e-5)
    assert len({len(e.values) for e in await embedding}) == 1
    assert max(served.steps.tokens) > 3


async def test_a_token_head_computes_every_token(served: Served) -> None:
    """Others fill the cache with the same adapter's tokens: states are not in it."""
    for case in served.cases:
        await served.engine.embed(EmbeddingRequest((*case.ids, 7), case.folder, Pooling.LAST))
        answer = await served.engine.classify(case.request)
        check(answer, case, served.engine)
        if len(case.logits) > 1:
            assert answer.usage.cached_tokens == 0
