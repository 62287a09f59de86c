"""Engines over the fixture bases with every servable adapter loaded, and what transformers itself answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import pytest_asyncio
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peftmux.kernels import native
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from tests.engine.harness import adapters, base, check_quiet, load, running
from tests.parity.fixtures import Case, cases, folders

TORCH = "torch operators"
SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {"block_size": 4},
    "uncached": {"prefix_caching": False},
    "chunked": {"block_size": 4, "max_batch_tokens": 4},
    TORCH: {"block_size": 4},
}


class Steps(NullObserver):
    """Remembers how many tokens each step had."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def step(self, seconds: float, tokens: int) -> None:
        self.tokens.append(tokens)


@dataclass(slots=True)
class Served:
    """One engine, its base, and the steps it has run."""

    engine: LocalEngine
    base: str
    settings: str
    steps: Steps
    cases: list[Case] = field(default_factory=list)


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
        if settings == TORCH:  # what runs where the native library cannot be built
            patch.setattr(native, "load", lambda: None)
        async with running(name, observer=steps, **SETTINGS[settings]) as engine:
            for folder in folders(name):
                await load(engine, folder)
            usage = engine.stats().kv_cache_usage
            yield Served(engine, name, settings, steps, cases(name))
            await check_quiet(engine, usage)


@dataclass(frozen=True, slots=True)
class Reference:
    """A fixture base as transformers loads and runs it."""

    module: Any

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[T, V]."""
        logits: torch.Tensor = self.module(input_ids=torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def greedy(self, ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids])
        out = self.module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens


@pytest.fixture(scope="session")
def reference() -> Any:
    """(name of a base) -> Reference."""

    @cache
    def load_reference(name: str) -> Reference:
        return Reference(
            AutoModelForCausalLM.from_pretrained(base(name), dtype=torch.float32, attn_implementation="eager").eval()
        )

    return load_reference


@pytest.fixture(scope="session")
def half_reference() -> Any:
    """(folder, ids) -> log-probabilities [T, V] of a bfloat16 base's weights and its adapter, computed in float32."""

    @torch.inference_mode()
    def logprobs(folder: str, ids: list[int]) -> torch.Tensor:
        module = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.bfloat16, attn_implementation="eager")
        adapted = PeftModel.from_pretrained(module.float(), f"{adapters()}/{folder}").eval()
        return adapted(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]

    return logprobs
