"""P-Tuning at template positions, against plain torch: embeddings put together by hand, one whole forward a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime.engine.api import EmbeddingRequest, Pooling
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.params import SamplingParams
from tests.engine.harness import Answer, ask, ask_all, check_quiet, load, request
from tests.model.families import build
from tests.model.test_family_adapters import engine_for

Template = list[tuple[int, int]]
"""(tokens, at) of each group."""
TEMPLATES: dict[str, Template] = {
    "in front": [(5, 0)],
    "inside": [(2, 1)],
    "after": [(3, -1)],
    "everywhere": [(3, 0), (2, 2), (4, -2), (1, -1), (2, -1)],
    "front from the end": [(2, -4), (3, 0)],
    "two in front": [(2, 0), (1, -1), (3, 0)],
}
FAMILIES = ["llama", "gpt2", "gemma3_text"]
PROMPTS = [[5, 9, 17], [101, 44, 3, 60, 61, 62, 63, 64, 8, 7, 33]]
NEW_TOKENS = 6
WIDTH = 48


def save(folder: Path, groups: Template, **fields: Any) -> torch.Tensor:
    """Random files of this template; returns the virtual tokens [m, D]."""
    folder.mkdir(parents=True)
    total = sum(tokens for tokens, _ in groups)
    table = torch.randn(total, WIDTH, generator=torch.Generator().manual_seed(3))
    config = {
        "peft_type": "P_TUNING_TEMPLATE",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": total,
        "token_dim": WIDTH,
        "encoder_hidden_size": 8,
        "template": [{"tokens": tokens, "at": at} for tokens, at in groups],
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": table}, folder / "adapter_model.safetensors")
    return table


def laid_out(ids: list[int], count: int, template: Template, table: torch.Tensor) -> list[int | torch.Tensor]:
    """A row's entries, ids or vectors, of which the first `count` ids are the prompt."""
    before: dict[int, list[int | torch.Tensor]] = {}
    used = 0
    groups = []
    for tokens, at in template:
        groups.append((at if at >= 0 else count + 1 + at, at < 0, [*table[used : used + tokens]]))
        used += tokens
    for from_end in (False, True):
        for index, of_end, vectors in groups:
            if of_end is from_end:
                before.setdefault(index, []).extend(vectors)
    row: list[int | torch.Tensor] = []
    for index in range(len(ids) + 1):
        row += before.get(index, [])
        row += ids[index : index + 1]
    return row


@torch.inference_mode()
def logits(module: Any, row: list[int | torch.Tensor]) -> torch.Tensor:
    """[T, V]."""
    embed = module.get_input_embeddings()
    vectors = [embed(torch.tensor([e]))[0] if isinstance(e, int) else e for e in row]
    return module(inputs_embeds=torch.stack(vectors)[None]).logits[0]  # type: ignore[no-any-return]


def penalised(scores: torch.Tensor, seen: list[int], penalty: float) -> torch.Tensor:
    """Of the repetition penalty's paper: divided where positive, multiplied where negative."""
    scores = scores.clone()
    for token in set(seen):
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    return scores


def expected(
    module: Any, prompt: list[int], template: Template, table: torch.Tensor, penalty: float = 1.0
) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        last = logits(module, laid_out(ids, len(prompt), template, table))[-1]
        ids.append(int(penalised(last, ids, penalty).argmax()))
    return ids[len(prompt) :]


def check_logprobs(answer: Answer, module: Any, prompt: list[int], template: Template, table: torch.Tensor) -> None:
    """One entry for each prompt token, without a value after a virtual token."""
    row = laid_out(prompt, len(prompt), template, table)
    distributions = logits(module, row).log_softmax(-1)
    wanted = [
        None if i == 0 or not isinstance(row[i - 1], int) else float(distributions[i - 1, entry])
        for i, entry in enumerate(row)
        if isinstance(entry, int)
    ]
    entries = answer.prompt_logprobs
    assert [entry.token_id for entry in entries] == prompt
    for entry, value in zip(entries, wanted, strict=True):
        assert (entry.logprob is None) is (value is None)
        assert entry.logprob == (None if value is None else pytest.approx(value, abs=2e-4))


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_template_is_exact_in_one_batch(family: str, tmp_path: Path) -> None:
    module = build(family)
    tables = {name: save(tmp_path / name, template) for name, template in TEMPLATES.items()}
    jobs = [(name, prompt) for name in TEMPLATES for prompt in PROMPTS]
    tokens = [expected(module, prompt, TEMPLATES[name], tables[name]) for name, prompt in jobs]
    plain = [expected(module, prompt, [], torch.zeros(0, WIDTH)) for prompt in PROMPTS]
    assert sum(t != plain[i % 2] for i, t in enumerate(tokens)) > len(tokens) * 2 / 3, "the adapters are invisible"
    async with engine_for(family, tmp_path) as engine:
        for i, name in enumerate(TEMPLATES):
            info = await load(engine, name, f"t{i}")
            assert info.kind == "p-tuning"
            assert info.bytes > 0
        names = {name: f"t{i}" for i, name in enumerate(TEMPLATES)}
        wanted = [request(prompt, names[name], NEW_TOKENS, prompt_logprobs=0) for name, prompt in jobs]
        wanted += [request(prompt, "", NEW_TOKENS) for prompt in PROMPTS]
        answers = await ask_all(engine, wanted)
        assert [answer.ids for answer in answers] == tokens + plain
        for (name, prompt), answer in zip(jobs, answers, strict=False):
            check_logprobs(answer, module, prompt, TEMPLATES[name], tables[name])
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (len(prompt), 0)
        await check_quiet(engine, engine.stats().kv_cache_usage)


async def test_the_cache_is_read_and_never_mixed(tmp_path: Path) -> None:
    """The second time the prompt's full blocks of 4 are found, virtual tokens among them, real ones alone counted."""
    module = build("llama")
    template = TEMPLATES["everywhere"]
    table = save(tmp_path / "a", template)
    save(tmp_path / "b", [(2, 2), (4, -2), (3, -1)])
    prompt = PROMPTS[1]
    async with engine_for("llama", tmp_path) as engine:
        for name in ("a", "b"):
            await load(engine, name)
        first = await ask(engine, request(prompt, "a", NEW_TOKENS))
        again = await ask(engine, request(prompt, "a", NEW_TOKENS))
        assert first.ids == again.ids == expected(module, prompt, template, table)
        # 3 in front, 11 real and 9 virtual ones: 22 of the 23 can be read, in 5 blocks that end after 20,
        # of which 3 + 2 + 4 are virtual
        assert (first.cached, again.cached) == (0, 11)
        assert (await ask(engine, request(prompt, "b", NEW_TOKENS))).cached == 0
        assert (await ask(engine, request(prompt, "", NEW_TOKENS))).cached == 0
        longer = await ask(engine, request([*prompt, 9], "a", NEW_TOKENS))  # another place for what counts from the end
        assert longer.ids == expected(module, [*prompt, 9], template, table)


async def test_virtual_tokens_are_no_history(tmp_path: Path) -> None:
    module = build("llama")
    template = TEMPLATES["everywhere"]
    table = save(tmp_path / "a", template)
    wanted = [expected(module, prompt, template, table, 2.5) for prompt in PROMPTS]
    assert wanted != [expected(module, prompt, template, table) for prompt in PROMPTS], "the penalty does nothing"
    sampling = SamplingParams(temperature=0.0, repetition_penalty=2.5)
    async with engine_for("llama", tmp_path) as engine:
        await load(engine, "a")
        answers = await ask_all(engine, [request(p, "a", NEW_TOKENS, sampling=sampling) for p in PROMPTS])
        assert [answer.ids for answer in answers] == wanted


async def test_preempted_rows_are_computed_again(tmp_path: Path) -> None:
    """8 blocks of 4 for rows of up to 22 tokens: they take each other's."""
    module = build("llama")
    template = [(2, 1), (3, -1)]
    table = save(tmp_path / "a", template)
    wanted = [expected(module, prompt, template, table) for prompt in PROMPTS]
    block = 4 * 4 * 2 * 2 * 12 * 4
    async with engine_for("llama", tmp_path, kv_cache_memory=9 * block) as engine:
        await load(engine, "a")
        scheduler = engine._core.scheduler
        preempt, victims = scheduler._preempt, []

        def noted(row: Any) -> None:
            victims.append(row)
            preempt(row)

        scheduler._preempt = noted  # type: ignore[method-assign]
        answers = await ask_all(engine, [request(p, "a", NEW_TOKENS) for p in PROMPTS * 3])
        assert [answer.ids for answer in answers] == wanted * 3
        assert victims, "nobody was preempted"
        await check_quiet(engine)


async def test_embed_leaves_virtual_tokens_out(tmp_path: Path) -> None:
    module = build("llama")
    template = [(2, 1), (3, -1)]
    table = save(tmp_path / "a", template)
    prompt = PROMPTS[1]
    row = laid_out(prompt, len(prompt), template, table)
    embed = module.get_input_embeddings()
    with torch.inference_mode():
        vectors = [embed(torch.tensor([e]))[0] if isinstance(e, int) else e for e in row]
        states = module.base_model(inputs_embeds=torch.stack(vectors)[None])[0][0]
    real = states[[i for i, e in enumerate(row) if isinstance(e, int)]]
    async with engine_for("llama", tmp_path) as engine:
        await load(engine, "a")
        for pooling, state in ((Pooling.MEAN, real.mean(0)), (Pooling.LAST, real[-1])):
            answer = await engine.embed(EmbeddingRequest(tuple(prompt), "a", pooling))
            torch.testing.assert_close(torch.tensor(answer.values), state, atol=1e-4, rtol=1e-4)
            assert answer.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize(("at", "least"), [(4, 4), (-5, 4)])
async def test_a_prompt_too_short_for_the_template_is_refused(at: int, least: int, tmp_path: Path) -> None:
    save(tmp_path / "a", [(1, 0), (2, at)])
    async with engine_for("llama", tmp_path) as engine:
        await load(engine, "a")
        with pytest.raises(InvalidRequest, match=f"at least {least} tokens.*got 3") as refusal:
            await ask(engine, request(PROMPTS[0], "a"))
        assert refusal.value.field == "input"
        await ask(engine, request([*PROMPTS[0], 7], "a"))
        with pytest.raises(InvalidRequest, match="3 virtual tokens"):
            await ask(engine, request([5] * 253, "a", 1))
        assert (await ask(engine, request([5] * 252, "a", 1))).ids


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no template": ({"template": None}, "INVALID_FIELD", "template"),
    "no list": ({"template": {"tokens": 3, "at": 0}}, "INVALID_FIELD", "template"),
    "a negative group": ({"template": [{"tokens": -3, "at": 0}]}, "INVALID_FIELD", "template"),
    "a place of text": ({"template": [{"tokens": 3, "at": "end"}]}, "INVALID_FIELD", "template"),
    "a field more": ({"template": [{"tokens": 3, "at": 0, "scale": 2}]}, "INVALID_FIELD", "template"),
    "another total": ({"num_virtual_tokens": 4}, "INVALID_FIELD", "expected 3"),
    "another template": ({"template": [{"tokens": 4, "at": 0}], "num_virtual_tokens": 4}, "SHAPE_MISMATCH", "[4, 48]"),
    "a head": ({"task_type": "SEQ_CLS"}, "MISSING_TENSOR", "score"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_broken_templates_are_refused(case: str, tmp_path: Path) -> None:
    fields, reason, piece = REFUSED[case]
    save(tmp_path / "a", [(3, -1)], **fields)
    async with engine_for("llama", tmp_path) as engine:
        with pytest.raises(AdapterInvalid) as refusal:
            await load(engine, "a")
        assert (refusal.value.reason, piece in str(refusal.value)) == (reason, True), str(refusal.value)


async def test_a_classifier_with_a_template_is_refused(tmp_path: Path) -> None:
    table = save(tmp_path / "a", [(3, -1)], task_type="SEQ_CLS")
    tensors = {"prompt_embeddings": table, "base_model.score.weight": torch.zeros(2, WIDTH)}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    async with engine_for("llama", tmp_path) as engine:
        with pytest.raises(AdapterInvalid, match="expected CAUSAL_LM with P_TUNING_TEMPLATE"):
            await load(engine, "a")
