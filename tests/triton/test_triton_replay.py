"""Decode steps captured and replayed over Triton's operators, in the interpreter: adapters come and go in between.

The capture is a tape of what happens to tensors, so nothing that the host knows at replay can help.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LNTuningConfig, PeftConfig

from peftmux.kernels.attention import AttentionPath
from peftmux.kernels.lowrank import site as lowrank_site
from peftmux.runtime.engine import factory
from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.model import cache
from peftmux.runtime.model.graphs import DecodeGraphs
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.tables import DeviceOperators
from tests.engine.harness import ask_all, check_quiet, load, request
from tests.model.families import build, greedy
from tests.model.test_family_adapters import TASK, lora, save_adapter
from tests.triton.tape import TapeCapture

LAUNCHERS = ("elementwise", "embedding", "inputs", "norms")
PROMPT = [5, 9, 17, 33, 3]
NEW_TOKENS = 3
ADAPTERS: dict[str, PeftConfig] = {
    "small": lora(rank_pattern={".*": 3}, target_modules=["q_proj", "v_proj", "down_proj"]),
    "large": lora(rank_pattern={".*": 20}, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"], **TASK),
    "embedding": lora(target_modules=["embed_tokens", "o_proj"]),
}


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> TapeCapture:
    """Have every operator take the form that it takes on a GPU, and decode steps replayed."""
    import importlib

    from peftmux.kernels.attention.triton_path import TritonAttention
    from peftmux.kernels.lowrank.triton_path import TritonPath

    for operator in LAUNCHERS:
        launcher = importlib.import_module(f"peftmux.kernels.{operator}.launch")
        monkeypatch.setattr(launcher, "triton_here", lambda device: True)
    monkeypatch.setattr(lowrank_site, "_path", TritonPath)

    def attention(device: Any, dtype: Any) -> AttentionPath:
        own = TritonAttention(device, dtype)
        return AttentionPath("triton", own.attend, own.write_kv)

    monkeypatch.setattr(cache, "choose_attention", attention)
    tape = TapeCapture()

    def graphs(model: LoadedModel, max_rows: int, step_tokens: int, block_size: int, failed: Any) -> DecodeGraphs:
        blocks = -(-model.context_length // block_size)
        operators = DeviceOperators(model.device, model.dtype, step_tokens, blocks, block_size)
        return DecodeGraphs(model.forward, model.device, max_rows, operators, tape, pytest.fail)

    monkeypatch.setattr(factory, "decode_graphs", graphs)
    return tape


@asynccontextmanager
async def serving(family: str, root: Path) -> AsyncIterator[LocalEngine]:
    config = EngineConfig(
        model=family, adapters_root=str(root), max_batch_tokens=16, max_rows=4, block_size=4, num_threads=1
    )
    engine = build_engine(fit_model(build(family), None, family), config, NullObserver())
    try:
        yield engine
    finally:
        await engine.drain(0.0)


async def test_adapters_come_and_go_between_replays(tmp_path: Path, capture: TapeCapture) -> None:
    expected = {"": greedy(build("llama"), PROMPT, NEW_TOKENS)}
    for name, config in ADAPTERS.items():
        expected[name] = greedy(save_adapter("llama", config, tmp_path / name), PROMPT, NEW_TOKENS)
    async with serving("llama", tmp_path) as engine:
        graphs = engine._core._runner.graphs
        assert graphs is not None

        async def check(*names: str) -> None:
            answers = await ask_all(engine, [request(PROMPT, name, NEW_TOKENS) for name in names])
            assert [answer.ids for answer in answers] == [expected[name] for name in names]

        for name in ADAPTERS:
            await load(engine, name)
        await check("small", "embedding")
        known, captures = set(graphs._captured), capture.captures
        await check("large", "ia3")
        await engine.unload_adapter("small")
        await check("norms", "large", "")
        await load(engine, "small")
        await check("", "small")
        assert capture.replays > capture.captures
        assert capture.captures - captures == len(set(graphs._captured) - known), "nothing was captured anew"
        for name in ADAPTERS:
            await engine.unload_adapter(name)
        await check("")
        await check_quiet(engine)
