"""LoRAMoE (arXiv 2312.09979) served == the paper's formula in plain torch, on other projections than Llama's too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels import native
from tests.engine.harness import ask_all, check_quiet, load, request
from tests.model.families import VOCABULARY, build
from tests.model.mixtures import ALPHA, EXPERTS, RANK, config, hooked, logprobs, random, sizes, table, write
from tests.model.test_family_adapters import engine_for, lora, save_adapter

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
BASES = {
    "llama": (["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]),
    "gpt2": (["c_fc"], ["c_attn"]),
    "phi3": (["gate_up_proj", "qkv_proj"], ["o_proj"]),
    "opt": (["fc1", "fc2", "k_proj"], []),
}


def tensors_for(module: nn.Module, mixed: list[str], plain: list[str]) -> dict[str, Tensor]:
    """By path of the layer and what follows it."""
    torch.manual_seed(4)
    tensors = {}
    for name, layer in module.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in mixed:
            inside, out = sizes(layer)
            tensors[f"{name}.moe_gate.weight"] = 3 * random(EXPERTS, inside)
            for e in range(EXPERTS):
                tensors[f"{name}.experts.{e}.lora_A.weight"] = random(RANK, inside)
                tensors[f"{name}.experts.{e}.lora_B.weight"] = random(out, RANK)
        if leaf in plain:
            inside, out = sizes(layer)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = random(RANK, inside), random(out, RANK)
    return tensors


def formula(tensors: dict[str, Tensor], module: nn.Module) -> Any:
    """Within it `module` is the paper's model."""

    def hook_for(name: str) -> Any:
        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = inputs[0]
            if f"{name}.lora_A.weight" in tensors:
                a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
                return y + ALPHA / RANK * (x @ a.T) @ b.T
            weights = torch.softmax(x @ tensors[f"{name}.moe_gate.weight"].T, dim=-1)
            for e in range(EXPERTS):
                a, b = (tensors[f"{name}.experts.{e}.lora_{m}.weight"] for m in "AB")
                y = y + weights[..., e : e + 1] * (ALPHA / RANK * ((x @ a.T) @ b.T))
            return y

        return hook

    layers = {key.split(".experts.")[0].split(".moe_gate")[0].split(".lora_")[0] for key in tensors}
    return hooked(module, {name: hook_for(name) for name in layers})


@pytest.mark.parametrize("form", ["native", "torch"])
@pytest.mark.parametrize("family", BASES)
async def test_alone_and_mixed(family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    mixed, plain = BASES[family]
    module = build(family)
    tensors = tensors_for(module, mixed, plain)
    fields = config(peft_type="LORAMOE", target_modules=mixed + plain)
    write(tmp_path / "moe", fields, {f"base_model.model.{k}": v for k, v in tensors.items()})
    other = lora(target_modules=mixed[:1], use_dora=True, fan_in_fan_out=family == "gpt2")
    adapted = save_adapter(family, other, tmp_path / "dora")
    async with engine_for(family, tmp_path) as engine:
        info = await load(engine, "moe")
        assert info.kind == "loramoe"
        assert info.tensors == len(tensors)
        await load(engine, "dora")
        wanted = [request(p, n, 1, prompt_logprobs=VOCABULARY) for p in PROMPTS for n in ("moe", "", "dora")]
        answers = await ask_all(engine, wanted)
        alone = await ask_all(engine, wanted[:1])
        for name in ("moe", "dora"):
            await engine.unload_adapter(name)
        await check_quiet(engine)
    for i, prompt in enumerate(PROMPTS):
        base = logprobs(module, prompt)[:-1]
        with formula(tensors, module):
            want = logprobs(module, prompt)[:-1]
        for answer, expected in zip(answers[3 * i :], (want, base, logprobs(adapted, prompt)[:-1]), strict=False):
            torch.testing.assert_close(table(answer), expected, atol=3e-4, rtol=0)
        assert float((want - base).abs().max()) > 0.1
        if i == 0:
            torch.testing.assert_close(table(alone[0]), want, atol=3e-4, rtol=0)


def test_the_names_of_moe_peft(tmp_path: Path) -> None:
    """Its tensors begin with `loramoe.layers.N`; attention has plain LoRA; experts may have sizes of their own."""
    module = build("llama")
    mixed, plain = BASES["llama"]
    ours = tensors_for(module, mixed, plain)
    fields = config(peft_type="LORAMOE", target_modules=dict.fromkeys(mixed + plain, True) | {"k_proj": False})
    write(tmp_path / "ours", fields, {f"base_model.model.{k}": v for k, v in ours.items()})
    theirs = {k.replace("model.layers", "loramoe.layers", 1): v for k, v in ours.items()}
    write(tmp_path / "theirs", fields | {"routing_strategy": "loramoe"}, theirs)
    base = TorchBase(module)
    a, b = (load_adapter(tmp_path / name, base).parts.linear for name in ("ours", "theirs"))
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip((a[name].a, a[name].b, a[name].gate), (b[name].a, b[name].b, b[name].gate), strict=True):
            assert (x is None) is (y is None)
            assert x is None or y is None or torch.equal(x, y)
    own = {k: (v[:, :2] if "lora_B" in k else v[:2]) if "experts" in k else v for k, v in theirs.items()}
    write(tmp_path / "sizes", fields | {"expert_lora": {"r": 2, "use_rslora": True}}, own)
    parts = load_adapter(tmp_path / "sizes", base).parts.linear
    assert parts["model.layers.0.mlp.up_proj"].scale == pytest.approx(ALPHA / 2**0.5)
    assert parts["model.layers.0.self_attn.q_proj"].scale == ALPHA / RANK


BROKEN: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "no experts": ("INVALID_FIELD", "num_experts", {"num_experts": None}, None),
    "too few experts": ("SHAPE_MISMATCH", "moe_gate", {"num_experts": EXPERTS - 1}, None),
    "another rank": ("RANK_MISMATCH", "rank 5", {"r": 5}, None),
    "top-k": ("UNSUPPORTED_FIELD", "top_k", {"top_k": 2}, None),
    "another routing": ("UNSUPPORTED_FIELD", "routing_strategy", {"routing_strategy": "mixlora"}, None),
    "DoRA": ("UNSUPPORTED_FIELD", "use_dora", {"use_dora": True}, None),
    "a bias": ("UNSUPPORTED_FIELD", "bias", {"bias": "all"}, None),
    "an unknown field of the experts": ("UNSUPPORTED_FIELD", "expert_lora", {"expert_lora": {"magic": 1}}, None),
    "no targets": ("INVALID_FIELD", "target_modules", {"target_modules": None}, None),
    "an extra expert": (
        "UNUSED_TENSOR",
        "experts.7",
        {},
        lambda t: t | {f"{UP}.experts.7.lora_A.weight": torch.ones(4)},
    ),
    "a missing expert": ("MISSING_TENSOR", "experts.2", {}, lambda t: _without(t, f"{UP}.experts.2.lora_B.weight")),
    "a missing router": ("MISSING_TENSOR", "moe_gate", {}, lambda t: _without(t, f"{UP}.moe_gate.weight")),
    "a router that is not finite": (
        "NOT_FINITE",
        "moe_gate",
        {},
        lambda t: t | {f"{UP}.moe_gate.weight": torch.full((EXPERTS, 48), torch.nan)},
    ),
    "no mixture at all": ("MISSING_TENSOR", "moe_gate", {"target_modules": ["q_proj"]}, lambda t: _only(t, "q_proj")),
}
UP = "base_model.model.model.layers.1.mlp.up_proj"


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k != name}


def _only(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if part in k}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ones_are_refused(case: str, tmp_path: Path) -> None:
    reason, words, fields, damage = BROKEN[case]
    module = build("llama")
    mixed, plain = BASES["llama"]
    tensors = {f"base_model.model.{k}": v for k, v in tensors_for(module, mixed, plain).items()}
    good = config(peft_type="LORAMOE", target_modules=mixed + plain)
    write(tmp_path / "a", good | fields, damage(tensors) if damage else tensors)
    with pytest.raises(AdapterInvalid, match=words) as error:
        load_adapter(tmp_path / "a", TorchBase(module))
    assert error.value.reason == reason
