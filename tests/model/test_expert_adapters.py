"""LoRA on mixture-of-experts weights and routers: served == PEFT, family by family, and no other row changes."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.experts import expert_weights
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.attention import AttentionRows
from peftmux.kernels.experts import ExpertsPart, ExpertsSite, Group, apply_experts_part
from peftmux.kernels.lowrank import Segments
from peftmux.runtime.model.experts import experts_forward
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.model.step import StepInputs, StepState
from tests.engine.harness import Answer, ask, ask_all, check_quiet, load, request
from tests.model.families import VOCABULARY, build
from tests.model.test_family_adapters import engine_for, lora, save_adapter

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "gate.weight"]}),
    "mixtral-down-alone": ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
    "mixtral-all-linear": ("mixtral", {"target_modules": "all-linear"}),
    "qwen2_moe": ("qwen2_moe", {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
    "qwen2_moe-shared": (
        "qwen2_moe",
        {"target_modules": [], "target_parameters": ["shared_expert.up_proj.weight", "gate_up_proj"]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "target_modules": ["o_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {r".*\.gate_up_proj": 6, "down_proj": 2},
            "alpha_pattern": {r".*\.gate_up_proj": 24},
        },
    ),
    "qwen3_moe-router": ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "olmoe": ("olmoe", {"target_modules": ["k_proj"], "target_parameters": EXPERTS, "use_rslora": True}),
    "gpt_oss": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "router.weight"]}),
    "deepseek_v3": ("deepseek_v3", {"target_modules": [], "target_parameters": [*EXPERTS, "gate.weight"]}),
}


@torch.inference_mode()
def logprobs(module: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = module(input_ids=torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def table(answer: Answer) -> torch.Tensor:
    """[T - 1, V]."""
    rows = torch.full((len(answer.prompt_logprobs) - 1, VOCABULARY), torch.nan)
    for row, entry in zip(rows, answer.prompt_logprobs[1:], strict=True):
        ids, values = zip(*entry.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return rows


def nonzero(module: nn.Module) -> None:
    """init_lora_weights=False leaves wrapped parameters' B at zero."""
    torch.manual_seed(11)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("case", CASES)
async def test_alone_and_mixed_with_base_rows(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    adapted = save_adapter(family, lora(**fields), tmp_path / "a")
    nonzero(adapted)
    adapted.save_pretrained(str(tmp_path / "a"))
    save_adapter(family, lora(target_modules=["o_proj"]), tmp_path / "b")
    base = build(family)
    async with engine_for(family, tmp_path) as engine:
        info = await load(engine, "a")
        await load(engine, "b")
        assert info.applied_sites > 0
        alone = await ask(engine, request(PROMPTS[0], "a", 1, prompt_logprobs=VOCABULARY))
        mixed = [request(p, name, 1, prompt_logprobs=VOCABULARY) for p in PROMPTS for name in ("a", "", "b")]
        answers = await ask_all(engine, mixed)
        await engine.unload_adapter("a")
        await engine.unload_adapter("b")
        await check_quiet(engine)
    for i, prompt in enumerate(PROMPTS):
        with_a, plain = table(answers[3 * i]), table(answers[3 * i + 1])
        want, want_plain = logprobs(adapted, prompt)[:-1], logprobs(base, prompt)[:-1]
        torch.testing.assert_close(with_a, want, atol=2e-4, rtol=0)
        torch.testing.assert_close(plain, want_plain, atol=2e-4, rtol=0)
        assert float((want - want_plain).abs().max()) > 0.02, "the adapter is invisible"
    torch.testing.assert_close(table(alone), logprobs(adapted, PROMPTS[0])[:-1], atol=2e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_other_rows_keep_every_bit_and_changed_ones_follow_the_formula(family: str) -> None:
    """One block of the base over 9 tokens, of which adapters in slots 2 and 3 change five."""
    torch.manual_seed(1)
    module = build(family).model.layers[1].mlp.experts
    weights = expert_weights(module, "experts")
    assert weights is not None
    step = StepState()
    forward = experts_forward(module, weights, step)
    assert forward is not None
    x, experts = torch.randn(9, 48), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    shares = torch.rand(9, 2)
    plain = module.forward(x, experts, shares)
    parts = {}
    for slot in (2, 3):
        for site, place in ((weights.up, forward.up), (weights.down, forward.down)):
            a, b = torch.randn(4, 3, site.in_features), torch.randn(4, site.out_features, 3)
            parts[slot, site.name] = ExpertsPart(a, b, 0.1 * slot)
            place.put(slot, place.prepare(parts[slot, site.name]))
    step.set(step_of([0, 2, 9, 3, 2], [2, 2, 2, 2, 1]))
    got = forward(x, experts, shares)
    assert torch.equal(got[[0, 1, 4, 5]], plain[[0, 1, 4, 5]])
    for slot, tokens in ((2, [2, 3, 8]), (3, [6, 7])):
        changed = copy.deepcopy(module)
        for site in (weights.up, weights.down):
            part, weight = parts[slot, site.name], getattr(changed, site.name.removeprefix("experts."))
            delta = part.scale * part.b @ part.a
            weight += delta.transpose(1, 2) if weights.transposed else delta
        want = changed(x[tokens], experts[tokens], shares[tokens])
        torch.testing.assert_close(got[tokens], want, rtol=1e-4, atol=1e-4)
        assert (want - plain[tokens]).abs().max() > 0.1
    for slot in (2, 3):
        forward.up.drop(slot)
        forward.down.drop(slot)
    assert torch.equal(forward(x, experts, shares), plain)


def step_of(slots: list[int], lens: list[int]) -> StepInputs:
    """Of interest here: whose tokens there are."""
    none = torch.empty(0, dtype=torch.int64)
    segments = Segments.build(slots, lens)
    return StepInputs(none, none, none, AttentionRows.build([], [], [], torch.device("cpu")), segments, none, segments)


def test_a_block_that_cannot_be_reproduced_is_no_site() -> None:
    """Whatever a family does to its experts beyond the common form: the adapter is refused by name."""
    module = build("mixtral")
    experts = module.model.layers[2].mlp.experts
    usual = type(experts).forward
    experts.forward = lambda *args: 1.01 * usual(experts, *args)
    model = fit_model(module, None, "mixtral")
    sites = [name for name in model.parameter_sites if name.endswith("down_proj")]
    assert sites == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1, 3)]


def test_the_kernel_is_its_definition() -> None:
    torch.manual_seed(2)
    part = ExpertsPart(torch.randn(3, 2, 5), torch.randn(3, 7, 2), 1.5)
    site = ExpertsSite(3, 5, 7, torch.float32, torch.device("cpu"))
    site.put(4, site.prepare(part))
    x, y = torch.randn(6, 5), torch.randn(6, 7)
    experts = torch.tensor([0, 0, 2, 2, 2, 1])
    want = torch.stack([y[p] + 1.5 * part.b[e] @ (part.a[e] @ x[p]) for p, e in enumerate(experts.tolist())])
    torch.testing.assert_close(apply_experts_part(y, x, experts, part), want)
    site.apply(y, x, [Group(0, 4, 0, 2), Group(2, 4, 2, 4), Group(2, 9, 4, 5), Group(1, 0, 5, 6)])
    torch.testing.assert_close(y[:4], want[:4])
    assert not torch.isclose(y[4:], want[4:]).all()
    with pytest.raises(ValueError, match=r"expected a and b of shapes"):
        site.prepare(ExpertsPart(part.a[:2], part.b, 1.0))
    with pytest.raises(ValueError, match="finite"):
        site.prepare(ExpertsPart(part.a * 1e30 * 1e30, part.b, 1.0))


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"target_parameters": ["mlp.experts.gate_up"]}, "NO_SITES", "gate_up"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "UNKNOWN_SITE", "experts.base_layer"),
        ({"target_parameters": ["input_layernorm.weight"]}, "UNSUPPORTED_SITE", "input_layernorm"),
        ({"target_parameters": [*EXPERTS, "q_proj.weight"]}, "INVALID_FIELD|MISSING_TENSOR", "q_proj"),
        ({"target_parameters": EXPERTS, "use_dora": True}, "INVALID_FIELD", "use_dora"),
        ({"target_parameters": EXPERTS, "lora_bias": True}, "INVALID_FIELD", "lora_bias"),
        ({"target_parameters": EXPERTS, "bias": "all"}, "UNSUPPORTED_FIELD", "bias"),
        ({"target_parameters": EXPERTS, "r": 3}, "RANK_MISMATCH", "rank 12"),
        ({"target_parameters": "all"}, "INVALID_FIELD", "target_parameters"),
        ({"target_parameters": None}, "UN", "experts"),
    ],
)
def test_contradictory_configs_are_refused(fields: dict[str, Any], reason: str, words: str, tmp_path: Path) -> None:
    save_adapter("mixtral", lora(target_modules=["q_proj"], target_parameters=EXPERTS), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(AdapterInvalid, match=words) as error:
        load_adapter(tmp_path / "a", TorchBase(build("mixtral")))
    assert re.match(reason, error.value.reason), error.value.reason
