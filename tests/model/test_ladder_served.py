"""Ladder side-tuning served == the paper's formula in plain torch, in any batch and any steps."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig

from peftmux.kernels import native
from peftmux.runtime.engine.api import ClassificationRequest, EmbeddingRequest, Pooling
from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.errors import AdapterMemoryExhausted
from peftmux.runtime.model.ladders import Ladders, SideCache
from peftmux.runtime.model.load import fit_model
from tests.engine.harness import Answer, ask, ask_all, check_quiet, load, request, until
from tests.model.families import VOCABULARY, build, greedy
from tests.model.ladders import PaperLadder, ladder_fields, ladder_tensors
from tests.model.mixtures import logprobs, table, write
from tests.model.test_family_adapters import lora, save_adapter

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
CLOSE = 3e-4
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
BLOCK_BYTES = 4 * 4 * 2 * (12 + 12) * 4
"""block size x layers x kv heads x (key + value) x float32"""
SIDE_BYTES = 4 * 4 * 2 * (6 + 6) * 4
"""The same, of a side network."""
SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {"max_batch_tokens": 64},
    "uncached": {"prefix_caching": False},
    "chunked": {"max_batch_tokens": 3},
    "torch": {},
}
# family, its changes, fields, has biases
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "llama": ("llama", {}, {}, False),
    "llama, layers left out": ("llama", {}, {"layers": [3, 1], "merge": "add", "num_key_value_heads": 1}, False),
    "gpt2, biases": ("gpt2", {}, {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}, True),
    "opt, projected out": ("opt", {}, {"merge": "gate", "temperature": 0.3, "hidden_act": "relu"}, True),
    "phi3, fused and windowed": ("phi3", {}, {"rope_theta": 100.0, "layers": [0, 2], "merge": "add"}, False),
    "gemma2, scaled and capped": ("gemma2", {}, {"merge": "gate", "hidden_act": "gelu"}, False),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, {"num_attention_heads": 4, "num_key_value_heads": 2}, True),
    "granite, scaled logits": ("granite", {"logits_scaling": 2.0}, {}, False),
    "mixtral": ("mixtral", {}, {"merge": "add"}, False),
}


def make(module: Any, folder: Path, seed: int = 3, biases: bool = False, **changes: Any) -> PaperLadder:
    torch.manual_seed(seed)
    fields = ladder_fields(**changes)
    final = module.get_output_embeddings().weight.shape[1]
    layers = sorted(fields.get("layers") or range(4))
    tensors = ladder_tensors(fields, 48, final, layers, biases=biases)
    write(folder, fields, tensors)
    return PaperLadder(module, {**fields, "layers": layers}, tensors)


@asynccontextmanager
async def serving(module: Any, root: Path, **settings: Any) -> AsyncIterator[LocalEngine]:
    settings = {"max_batch_tokens": 8, "block_size": 4, "num_threads": 1, **settings}
    config = EngineConfig(model="tiny", adapters_root=str(root), **settings)
    engine = build_engine(fit_model(module, None, "tiny"), config, NullObserver())
    try:
        yield engine
    finally:
        await engine.drain(0.0)


def check(answer: Answer, model: PaperLadder, prompt: list[int]) -> None:
    want = model.logprobs(prompt)
    torch.testing.assert_close(table(answer), want[:-1], atol=CLOSE, rtol=0)
    assert answer.ids == model.greedy(prompt, len(answer.ids))


@pytest.mark.parametrize("case", CASES)
async def test_it_is_the_papers_formula_on_any_base(case: str, tmp_path: Path) -> None:
    family, changes, fields, biases = CASES[case]
    module = build(family, **changes)
    model = make(module, tmp_path / "ladder", biases=biases, **fields)
    async with serving(build(family, **changes), tmp_path) as engine:
        info = await load(engine, "ladder")
        assert info.kind == "ladder"
        wanted = [request(p, n, 6, prompt_logprobs=VOCABULARY) for p in PROMPTS for n in ("ladder", "")]
        answers = await ask_all(engine, wanted)
        await engine.unload_adapter("ladder")
        await check_quiet(engine)
    for i, prompt in enumerate(PROMPTS):
        check(answers[2 * i], model, prompt)
        plain = logprobs(module, prompt)
        torch.testing.assert_close(table(answers[2 * i + 1]), plain[:-1], atol=CLOSE, rtol=0)
        assert float((model.logprobs(prompt) - plain).abs().max()) > 0.05


@pytest.mark.parametrize("settings", SETTINGS)
async def test_ladders_beside_other_kinds(settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one shape, which share a cache, and one of another; nobody else's row changes by a bit."""
    if settings == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    module = build("llama")
    ladders = {
        "one": make(module, tmp_path / "one", 3),
        "two": make(module, tmp_path / "two", 4, merge="gate", temperature=0.5),
        "other": make(module, tmp_path / "other", 5, layers=[0, 2], num_attention_heads=3, merge="add"),
    }
    tuned = {
        "lora": save_adapter("llama", lora(target_modules=["q_proj", "down_proj"]), tmp_path / "lora"),
        "prefix": save_adapter("llama", PrefixTuningConfig(num_virtual_tokens=3, **TASK), tmp_path / "prefix"),
        "": module,
    }
    async with serving(build("llama"), tmp_path, **SETTINGS[settings]) as engine:
        for name in [*ladders, *tuned]:
            if name:
                await load(engine, name)
        names = [*tuned, *ladders]
        rows = [request(p, n, 6, prompt_logprobs=VOCABULARY) for p in PROMPTS for n in names]
        without = [request(p, n if n in tuned else "", 6, prompt_logprobs=VOCABULARY) for p in PROMPTS for n in names]
        plain = await ask_all(engine, without)
        mixed = await ask_all(engine, rows)
        alone = {name: await ask(engine, request(PROMPTS[0], name, 6, prompt_logprobs=VOCABULARY)) for name in ladders}
        longer = {name: await ask(engine, request([*PROMPTS[0], 7, 8, 9], name, 6)) for name in ladders}
        for name in names[1:]:
            if name:
                await engine.unload_adapter(name)
        await engine.unload_adapter("lora")
        await check_quiet(engine)
    for i, prompt in enumerate(PROMPTS):
        for j, name in enumerate(names):
            answer = mixed[i * len(names) + j]
            if name in ladders:
                check(answer, ladders[name], prompt)
            else:
                assert answer.ids == greedy(tuned[name], prompt, 6)
                other = plain[i * len(names) + j]
                close = 1e-5 if settings == "torch" else 0.0  # torch's products depend on a step's other tokens
                torch.testing.assert_close(answer.values, other.values, atol=close, rtol=0)
                torch.testing.assert_close(table(answer), table(other), atol=close, rtol=0)
    for name, model in ladders.items():
        check(alone[name], model, PROMPTS[0])
        assert longer[name].ids == model.greedy([*PROMPTS[0], 7, 8, 9], 6)
        assert (longer[name].cached > 0) is (settings != "uncached"), "both networks find their own keys and values"


async def test_a_head_reads_what_the_ladder_gives(tmp_path: Path) -> None:
    module = build("llama")
    model = make(module, tmp_path / "plain", merge="gate")
    score = torch.randn(3, 48)
    fields = {**model.f, "task_type": "SEQ_CLS"}
    write(tmp_path / "tuned", fields, {**model.t, "base_model.model.score.weight": score})
    states: list[torch.Tensor] = []
    hook = module.lm_head.register_forward_pre_hook(lambda _module, args: states.append(args[0][0]))
    model.logprobs(PROMPTS[0])
    hook.remove()
    prompt = tuple(PROMPTS[0])
    async with serving(build("llama"), tmp_path) as engine:
        await load(engine, "tuned")
        sorted_out = await engine.classify(ClassificationRequest(prompt, "tuned"))
        embedded = await engine.embed(EmbeddingRequest(prompt, "tuned", Pooling.MEAN))
    torch.testing.assert_close(torch.tensor(sorted_out.logits[0]), states[0][-1] @ score.T, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(embedded.values), states[0].mean(0), atol=1e-3, rtol=0)


async def test_preempted_rows_climb_again(tmp_path: Path) -> None:
    """Blocks go from ladder to ladder, to the base, and back."""
    module = build("llama")
    models = {name: make(module, tmp_path / name, seed) for name, seed in (("one", 3), ("two", 4))}
    greedily = {name: model.greedy for name, model in models.items()} | {"": partial(greedy, module)}
    prompts = [[i + 1, *PROMPTS[0]] for i in range(3)]
    async with serving(build("llama"), tmp_path, kv_cache_memory=BLOCK_BYTES * 18) as engine:
        for name in models:
            await load(engine, name)
        preempted: list[Any] = []
        scheduler = engine._core.scheduler
        preempt = scheduler._preempt

        def counted(row: Any) -> None:
            preempted.append(row)
            preempt(row)

        scheduler._preempt = counted  # type: ignore[method-assign]
        wanted = [(p, name) for p in prompts for name in greedily]
        asked = [request(p, name, 20) for p, name in wanted]
        rounds = [await ask_all(engine, asked), await ask_all(engine, asked[::-1])]
        await check_quiet(engine)
    assert preempted, "the cache was not small enough to prove anything"
    for (prompt, name), first, second in zip(wanted, rounds[0], rounds[1][::-1], strict=True):
        assert first.ids == second.ids == greedily[name](prompt, 20)


async def test_a_side_cache_lives_as_long_as_its_ladders(tmp_path: Path) -> None:
    """Counted once, kept while another ladder of the shape is there, and not believed after it was made anew."""
    module = build("llama")
    models = {name: make(module, tmp_path / name, seed) for name, seed in (("one", 3), ("two", 4))}
    prompt = [*PROMPTS[0], 1, 2, 3]
    weights = 4 * sum(t.numel() for t in models["one"].t.values())
    cache = SIDE_BYTES * 64
    async with serving(build("llama"), tmp_path, kv_cache_memory=BLOCK_BYTES * 64) as engine:
        placement = engine._adapters._placement
        caches = engine._core._runner.model.ladders._caches
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine._core._runner.model.module.modules()]
        await load(engine, "one")
        assert placement.bytes == weights + cache
        await load(engine, "two")
        assert placement.bytes == 2 * weights + cache
        assert (await ask(engine, request(prompt, "one", 6))).ids == models["one"].greedy(prompt, 6)
        for other in ("one", "two"):
            await engine.unload_adapter("one")
            if other == "two":
                await engine.unload_adapter("two")
                assert placement.bytes == 0
                await until(lambda: not list(caches.values()))  # the engine's thread may still hold its last call
                assert hooks == [
                    len(m._forward_hooks) + len(m._forward_pre_hooks)
                    for m in engine._core._runner.model.module.modules()
                ], "without ladders nobody watches the layers"
            await load(engine, "one")
            answer = await ask(engine, request(prompt, "one", 6))
            assert answer.ids == models["one"].greedy(prompt, 6)
            assert (answer.cached > 0) is (other == "one")


async def test_the_cache_must_fit_the_adapter_memory(tmp_path: Path) -> None:
    model = make(build("llama"), tmp_path / "one")
    make(build("llama"), tmp_path / "two", 4)
    needed = 4 * sum(t.numel() for t in model.t.values()) + SIDE_BYTES * 64
    memory = {"kv_cache_memory": BLOCK_BYTES * 64, "adapter_memory": needed}
    async with serving(build("llama"), tmp_path, **memory) as engine:
        await load(engine, "one")
        with pytest.raises(AdapterMemoryExhausted, match="two"):
            await load(engine, "two")
    async with serving(build("llama"), tmp_path, **memory | {"adapter_memory": needed - 1}) as engine:
        with pytest.raises(AdapterMemoryExhausted, match=str(needed)):
            await load(engine, "one")
        await until(lambda: gone(engine._core._runner.model.ladders))


def test_a_cache_without_room_says_what_it_needs() -> None:
    with pytest.raises(AdapterMemoryExhausted, match=f"{2 * 3 * (1 << 50) * 16 * 2 * 6 * 2} bytes .*--kv-cache-memory"):
        SideCache((3, 1 << 50, 16, 2, 6), torch.bfloat16, torch.device("cpu"))


def gone(ladders: Ladders) -> bool:
    """The refusal's traceback holds what was prepared, until it is collected."""
    gc.collect()
    return not len(ladders._caches)
