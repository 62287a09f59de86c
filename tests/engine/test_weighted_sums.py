"""Weighted sums of adapters: the numbers of a sum of deltas, and the life of what is made for them."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.sums import MAX_IDLE
from peftmux.runtime.errors import AdapterMemoryExhausted, AdapterNotFound, Draining, InvalidRequest
from tests.engine.harness import (
    FIXTURES,
    Answer,
    StepGate,
    adapters,
    ask,
    ask_all,
    base,
    check_quiet,
    in_engine_thread,
    load,
    request,
    running,
)
from tests.parity.test_parity_served import table

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.filterwarnings("ignore")]

VOCABULARY = 96
TOLERANCE = 3e-4
PROMPTS = [[5, 9, 17, 33, 60, 7], [44, 12, 80], [21] * 9]
LORAS = ["lora", "lora_rslora", "lora_rank_alpha_pattern"]
OTHERS = ["lora_dora", "lora_alora", "prefix", "ia3", "prompt_text", "lora_modules_to_save"]
LOADED = [*LORAS, "lora_embed", "shira", *OTHERS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LocalEngine]:
    async with running(block_size=4) as engine:
        for name in LOADED:
            await load(engine, name)
        usage = engine.stats().kv_cache_usage
        yield engine
        await check_quiet(engine, usage)


def module(name: str = "llama") -> Any:
    return AutoModelForCausalLM.from_pretrained(base(name), dtype=torch.float32, attn_implementation="eager").eval()


def peft_sum(terms: list[tuple[str, float]]) -> Any:
    """PEFT's own concatenation of ranks."""
    model: Any = PeftModel.from_pretrained(module(), f"{adapters()}/{terms[0][0]}", adapter_name=terms[0][0])
    for name, _ in terms[1:]:
        model.load_adapter(f"{adapters()}/{name}", name)
    names, weights = zip(*terms, strict=True)
    model.add_weighted_adapter(list(names), list(weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.eval()


def merged(terms: list[tuple[str, float]], name: str = "llama") -> Any:
    """The sum in weights: W + sum of w * (W of one adapter, merged by PEFT, less W)."""
    model = module(name)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    total = {k: v.clone() for k, v in plain.items()}
    for folder, weight in terms:
        one: Any = PeftModel.from_pretrained(module(name), f"{adapters(name)}/{folder}").merge_and_unload()
        for k, v in one.state_dict().items():
            total[k] += weight * (v - plain[k])
    model.load_state_dict(total)
    return model


@torch.inference_mode()
def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)[:-1]


def asked(ids: list[int], terms: list[tuple[str, float]], **fields: Any) -> Any:
    return request(ids, prompt_logprobs=VOCABULARY, adapters=terms, **fields)


async def check(engine: LocalEngine, model: Any, terms: list[tuple[str, float]]) -> list[Answer]:
    answers = await ask_all(engine, [asked(ids, terms) for ids in PROMPTS])
    for ids, answer in zip(PROMPTS, answers, strict=True):
        torch.testing.assert_close(table(answer), logprobs(model, ids), rtol=0, atol=TOLERANCE)
    return answers


async def test_a_sum_of_loras_is_pefts(engine: LocalEngine) -> None:
    terms = [("lora", 0.7), ("lora_rslora", -0.4), ("lora_rank_alpha_pattern", 1.3)]
    await check(engine, peft_sum(terms), terms)


@pytest.mark.parametrize(
    "terms",
    [
        [("lora", 0.5), ("shira", 1.5)],
        [("shira", 2.0)],
        [("lora", -2.0)],
        [("lora", 0.0), ("lora_rslora", 0.0)],
    ],
    ids=str,
)
async def test_a_sum_is_the_sum_of_what_each_adds(engine: LocalEngine, terms: list[tuple[str, float]]) -> None:
    await check(engine, merged(terms), terms)


async def test_biases_are_summed() -> None:
    terms = [("lora_bias_all", 0.5), ("lora_bias_lora_only", -0.7)]
    scaled: Any = PeftModel.from_pretrained(module("qwen2"), f"{adapters('qwen2')}/lora_bias_term")
    for layer in scaled.modules():
        if isinstance(getattr(layer, "scaling", None), dict):  # B's own bias is scaled like the rest
            layer.scaling["default"] *= 1.25
    async with running("qwen2") as engine:
        for name in ("lora_bias_all", "lora_bias_lora_only", "lora_bias_term"):
            await load(engine, name)
        await check(engine, merged(terms, "qwen2"), terms)
        await check(engine, scaled.eval(), [("lora_bias_term", 1.25)])


async def test_an_embeddings_low_rank_is_summed(engine: LocalEngine) -> None:
    terms = [("lora_embed", 0.6), ("lora", 0.5)]
    await check(engine, merged(terms), terms)


async def test_one_adapter_of_weight_one_is_itself(engine: LocalEngine) -> None:
    for name in ("lora", "shira", "lora_embed"):
        alone = await ask(engine, request(PROMPTS[0], name, prompt_logprobs=VOCABULARY))
        summed = await ask(engine, asked(PROMPTS[0], [(name, 1.0)]))
        assert (summed.ids, summed.revision) == (alone.ids, alone.revision)
        assert torch.equal(table(summed), table(alone))


async def test_an_adapter_named_twice_has_both_weights(engine: LocalEngine) -> None:
    revision = engine.get_adapter("lora").revision
    twice = await ask(engine, asked(PROMPTS[0], [("lora", 0.25), (f"lora@{revision[:12]}", 0.5)]))
    once = await ask(engine, asked(PROMPTS[0], [("lora", 0.75)]))
    assert twice.revision == once.revision
    assert torch.equal(table(twice), table(once))


async def test_sums_share_a_batch_with_their_members_and_others(engine: LocalEngine) -> None:
    sums = [[("lora", 0.5), ("lora_rslora", 0.5)], [("lora_rslora", 0.5), ("lora", 0.25)], [("shira", 0.5)]]
    plain = ["", "lora", "lora_dora", "prefix", "lora_rslora"]
    wanted = [asked(PROMPTS[0], terms) for terms in sums]
    wanted += [request(PROMPTS[0], name, prompt_logprobs=VOCABULARY) for name in plain]
    alone = [await ask(engine, one) for one in wanted]
    assert len({tuple(answer.values) for answer in alone}) == len(alone)
    mixed = await ask_all(engine, wanted * 2)
    for a, b in zip(mixed, alone * 2, strict=True):
        torch.testing.assert_close(table(a), table(b), rtol=0, atol=1e-4)
        assert (a.ids, a.revision) == (b.ids, b.revision)


async def test_the_order_of_the_terms_is_none(engine: LocalEngine) -> None:
    terms = [("lora", 0.5), ("lora_rslora", 0.125)]
    one = await ask(engine, asked(PROMPTS[0], terms))
    other = await ask(engine, asked(PROMPTS[0], terms[::-1]))
    assert one.revision == other.revision
    assert len(one.revision) == 64
    assert one.ids == other.ids


async def test_caches_are_never_mixed(engine: LocalEngine) -> None:
    ids = list(range(20, 40))
    jobs: list[list[tuple[str, float]]] = [
        [("lora", 0.5), ("lora_rslora", 0.25)],
        [("lora", 0.25), ("lora_rslora", 0.5)],
        [("lora", 0.5)],
    ]
    for terms in jobs:
        assert (await ask(engine, request(ids, adapters=terms))).cached == 0
    assert (await ask(engine, request(ids))).cached == 0
    assert (await ask(engine, request(ids, "lora"))).cached == 0
    for terms in jobs:
        assert (await ask(engine, request(ids, adapters=terms))).cached == 16


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lora_dora", "an output scale at "),
        ("lora_alora", "an invocation"),
        ("prefix", "a prefix"),
        ("prompt_text", "virtual tokens"),
        ("ia3", "output scale|InputScale"),
        ("lora_modules_to_save", "replaced rows|ReplacedRows"),
    ],
)
async def test_what_cannot_be_summed_is_refused_by_name(engine: LocalEngine, name: str, why: str) -> None:
    for terms in ([("lora", 0.5), (name, 0.5)], [(name, 1.0)]):
        with pytest.raises(AdapterInvalid, match=f"'{name}'.*expected.*({why})") as refusal:
            await ask(engine, request(PROMPTS[0], adapters=terms))
        assert refusal.value.reason == "NOT_SUMMABLE"
    assert engine.get_adapter(name).requests_in_flight == engine.get_adapter("lora").requests_in_flight == 0


async def test_bad_terms_are_refused(engine: LocalEngine) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapter": "lora", "adapters": [("lora", 1.0)]}, "adapters"),
        ({"adapters": [("lora", float("nan"))]}, "adapters[0].weight"),
        ({"adapters": [("lora", 1.0), ("lora_rslora", float("inf"))]}, "adapters[1].weight"),
        ({"adapters": [("../x", 1.0)]}, "adapters[0].adapter"),
        ({"adapters": [("", 1.0)]}, "adapters[0].adapter"),
        ({"adapters": [("lora", 0.1)] * 33}, "adapters"),
        ({"adapters": [("lora", 0.5)], "task": 0}, "adapter_task"),
    ]
    for fields, field in cases:
        with pytest.raises(InvalidRequest) as refusal:
            await ask(engine, request(PROMPTS[0], **fields))
        assert refusal.value.field == field
    with pytest.raises(AdapterNotFound, match="nobody"):
        await ask(engine, request(PROMPTS[0], adapters=[("lora", 0.5), ("nobody", 0.5)]))
    with pytest.raises(AdapterNotFound, match="no revision"):
        await ask(engine, request(PROMPTS[0], adapters=[("lora@0123456789", 0.5)]))
    assert engine.get_adapter("lora").requests_in_flight == 0


async def test_weights_past_the_base_dtype_are_refused(engine: LocalEngine) -> None:
    with pytest.raises(AdapterInvalid) as refusal:
        await ask(engine, request(PROMPTS[0], adapters=[("lora", 1e300), ("lora_rslora", 1e300)]))
    assert refusal.value.reason == "NOT_FINITE"


def held(engine: LocalEngine) -> int:
    return engine._adapters._placement.bytes


async def test_a_sum_is_made_once_and_counted() -> None:
    terms = [("lora", 0.5), ("lora_rslora", 0.5)]
    async with running() as engine:
        sizes = sum([(await load(engine, name)).bytes for name, _ in terms])
        assert held(engine) == sizes
        answers = await ask_all(engine, [request(ids, adapters=terms) for ids in PROMPTS * 4])
        assert held(engine) == 2 * sizes
        assert len({answer.revision for answer in answers}) == 1
        assert [a.requests_in_flight for a in engine.list_adapters()] == [0, 0]
        assert [a.name for a in engine.list_adapters()] == ["lora", "lora_rslora"]
        for name, _ in terms:
            await engine.unload_adapter(name)
        await in_engine_thread(engine, lambda: None)
        assert held(engine) == 0
        await check_quiet(engine)


async def test_an_unload_waits_for_a_sums_requests() -> None:
    terms = [("lora", 0.5), ("lora_rslora", 0.5)]
    async with running() as engine:
        for name, _ in terms:
            await load(engine, name)
        expected = await ask(engine, request(PROMPTS[0], adapters=terms))
        gate = StepGate(engine)
        gate.hold()
        answer = asyncio.create_task(ask(engine, request(PROMPTS[0], adapters=terms)))
        await gate.step_begins()
        assert engine.get_adapter("lora").requests_in_flight == 1
        unload = asyncio.create_task(engine.unload_adapter("lora"))
        await asyncio.sleep(0.02)
        with pytest.raises(Draining):
            await ask(engine, request(PROMPTS[0], adapters=terms))
        assert not unload.done()
        gate.remove()
        assert (await answer).ids == expected.ids
        await unload
        await in_engine_thread(engine, lambda: None)
        assert held(engine) == engine.get_adapter("lora_rslora").bytes
        await check_quiet(engine)


async def test_a_replaced_member_is_in_no_sum_any_more(tmp_path: Path) -> None:
    for name in ("lora", "lora_rslora"):
        shutil.copytree(Path(adapters()) / name, tmp_path / name)
    terms = [("a", 0.5)]
    async with running(adapters_root=str(tmp_path)) as engine:
        await load(engine, "lora", "a")
        first = await ask(engine, asked(PROMPTS[0], terms))
        await load(engine, "lora_rslora", "a", replace=True)
        second = await ask(engine, asked(PROMPTS[0], terms))
        assert second.revision != first.revision
        torch.testing.assert_close(
            table(second), logprobs(merged([("lora_rslora", 0.5)]), PROMPTS[0]), rtol=0, atol=TOLERANCE
        )
        await in_engine_thread(engine, lambda: None)
        assert held(engine) == 2 * engine.get_adapter("a").bytes


async def test_files_that_have_changed_are_refused(tmp_path: Path) -> None:
    shutil.copytree(Path(adapters()) / "lora", tmp_path / "a")
    async with running(adapters_root=str(tmp_path)) as engine:
        await load(engine, "a")
        path = tmp_path / "a" / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] + 1}))
        with pytest.raises(AdapterInvalid, match=r"'a'.*load it again.*expected revision"):
            await ask(engine, request(PROMPTS[0], adapters=[("a", 0.5)]))
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(AdapterInvalid, match=r"'a'.*load it again"):
            await ask(engine, request(PROMPTS[0], adapters=[("a", 0.25)]))
        assert (await ask(engine, request(PROMPTS[0], "a"))).ids
        await check_quiet(engine)


async def test_idle_sums_make_room() -> None:
    """Memory for the adapter and two sums: the one that has been idle longest goes, one in use stays."""
    async with running() as probe:
        size = (await load(probe, "lora")).bytes
    async with running(adapter_memory=int(3.5 * size)) as engine:
        await load(engine, "lora")
        one, two, three = ([("lora", weight)] for weight in (0.5, 0.25, 0.125))
        for terms in (one, two, one, three):
            await ask(engine, request(PROMPTS[0], adapters=terms))
        kept = engine._adapters.sums._kept
        assert [list(r.members) for r in kept.values()] == [[engine._adapters.store.get("lora").revision]] * 2
        first = (await ask(engine, request(PROMPTS[0], adapters=one))).revision
        assert first in kept
        assert held(engine) == 3 * size
        gate = StepGate(engine)
        gate.hold()
        busy = [asyncio.create_task(ask(engine, request(PROMPTS[0], adapters=terms))) for terms in (one, three)]
        await gate.step_begins()
        waiting = asyncio.create_task(ask(engine, request(PROMPTS[0], adapters=two)))
        await asyncio.sleep(0.05)
        gate.remove()
        results = await asyncio.gather(*busy, waiting, return_exceptions=True)
        assert all(isinstance(r, Answer | AdapterMemoryExhausted) for r in results)
        assert isinstance(results[0], Answer)
        await load(engine, "lora_rslora")  # an adapter is worth more than what can be made again
        await check_quiet(engine)


async def test_many_weights_do_not_pile_up(engine: LocalEngine) -> None:
    for i in range(MAX_IDLE + 5):
        await ask(engine, request(PROMPTS[1], adapters=[("shira", 2.0 + i)], max_tokens=1))
    assert len(engine._adapters.sums._kept) <= MAX_IDLE


async def test_a_caller_that_leaves_leaves_nothing_behind(engine: LocalEngine) -> None:
    tasks = [
        asyncio.create_task(ask(engine, request(PROMPTS[0], adapters=[("lora", 3.0 + i), ("shira", 1.0)])))
        for i in range(4)
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    answer = await ask(engine, request(PROMPTS[0], adapters=[("lora", 3.0), ("shira", 1.0)]))
    assert answer.ids
    assert engine.get_adapter("lora").requests_in_flight == 0


def test_the_fixtures_are_what_the_tests_say() -> None:
    """Different ranks and scales, or concatenating them would prove little."""
    ranks = {name: load_file(Path(FIXTURES, "peft/llama", name, "adapter_model.safetensors")) for name in LORAS}
    shapes = {name: {t.shape[0] for n, t in tensors.items() if "lora_A" in n} for name, tensors in ranks.items()}
    assert len(set(map(frozenset, shapes.values()))) > 1
