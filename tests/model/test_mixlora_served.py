"""MixLoRA (arXiv 2404.15159) served == the paper's formula in plain torch, expert by expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.pytorch_utils import Conv1D

from peftmux.adapters.convert import convert_adapter
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels import native
from peftmux.kernels.experts import ExpertsPart
from peftmux.kernels.lowrank import Segments
from peftmux.kernels.mixture import BlockShape, MixturePart, MixtureSite, apply_mixture_part
from tests.engine.harness import ask_all, check_quiet, load, request
from tests.model.families import VOCABULARY, build
from tests.model.mixtures import ALPHA, RANK, config, hooked, logprobs, random, sizes, table, write
from tests.model.test_family_adapters import engine_for, lora, save_adapter

PROMPTS = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
EXPERTS, TOP_K = 5, 2


def tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


# inner projections, outer projection, what is between them, attention projections with a plain LoRA
BLOCKS: dict[str, tuple[list[str], str, Any, list[str]]] = {
    "llama": (["gate_proj", "up_proj"], "down_proj", lambda g, u: silu(g) * u, ["q_proj", "o_proj"]),
    "gemma": (["gate_proj", "up_proj"], "down_proj", lambda g, u: tanh_gelu(g) * u, ["v_proj"]),
    "phi3": (["gate_up_proj"], "down_proj", lambda y: silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1], []),
    "phi": (["fc1"], "fc2", tanh_gelu, ["k_proj"]),
    "gpt2": (["c_fc"], "c_proj", tanh_gelu, []),
    "qwen2_moe": (["gate_proj", "up_proj"], "down_proj", lambda g, u: silu(g) * u, []),
}


def is_block(family: str, name: str) -> bool:
    """qwen2_moe's own experts have a shared one beside them, which is such a block."""
    return name.endswith(".shared_expert" if family == "qwen2_moe" else ".mlp")


def tensors_for(module: nn.Module, family: str, leave: str = "") -> dict[str, Tensor]:
    """By path and what follows it; the projection `leave` has no variants."""
    inner, outer, _, attention = BLOCKS[family]
    torch.manual_seed(6)
    tensors = {}
    for name, layer in module.named_modules():
        block, _, leaf = name.rpartition(".")
        if is_block(family, name):
            tensors[f"{name}.moe_gate.weight"] = 3 * random(EXPERTS, sizes(getattr(layer, inner[0]))[0])
        elif is_block(family, block) and leaf in (*inner, outer) and leaf != leave:
            inside, out = sizes(layer)
            for e in range(EXPERTS):
                tensors[f"{name}.experts.{e}.lora_A.weight"] = random(RANK, inside)
                tensors[f"{name}.experts.{e}.lora_B.weight"] = random(out, RANK)
        elif leaf in attention:
            inside, out = sizes(layer)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = random(RANK, inside), random(out, RANK)
    return tensors


def formula(tensors: dict[str, Tensor], module: nn.Module, family: str) -> Any:
    """Within it `module` is the paper's model: every expert a whole network, for every token; then the k best."""
    inner, outer, act, _ = BLOCKS[family]

    def variant(block: nn.Module, path: str, projection: str, e: int, x: Tensor) -> Tensor:
        layer = getattr(block, projection)
        y = (
            torch.addmm(layer.bias, x, layer.weight)
            if isinstance(layer, Conv1D)
            else nn.functional.linear(x, layer.weight, layer.bias)
        )
        a = tensors.get(f"{path}.{projection}.experts.{e}.lora_A.weight")
        if a is None:
            return y
        return y + ALPHA / RANK * (x @ a.T) @ tensors[f"{path}.{projection}.experts.{e}.lora_B.weight"].T

    def block_hook(path: str) -> Any:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            probabilities = torch.softmax((x @ tensors[f"{path}.moe_gate.weight"].T).float(), dim=-1)
            out = torch.zeros_like(y.reshape(len(x), -1))
            for t in range(len(x)):
                best = probabilities[t].argsort(descending=True)[:TOP_K].tolist()
                for e in best:
                    own = [variant(block, path, p, e, x[t : t + 1]) for p in inner]
                    weight = probabilities[t, e] / probabilities[t, best].sum()
                    out[t] += weight * variant(block, path, outer, e, act(*own))[0]
            return out.view_as(y)

        return hook

    def lora_hook(path: str) -> Any:
        a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        return lambda _layer, inputs, y: y + ALPHA / RANK * (inputs[0] @ a.T) @ b.T

    hooks = {k[: -len(".moe_gate.weight")]: k for k in tensors if k.endswith(".moe_gate.weight")}
    plain = [k[: -len(".lora_A.weight")] for k in tensors if k.endswith("_proj.lora_A.weight")]
    return hooked(module, {p: block_hook(p) for p in hooks} | {p: lora_hook(p) for p in plain})


def fields_for(family: str, **more: Any) -> dict[str, Any]:
    inner, outer, _, attention = BLOCKS[family]
    targets: Any = [*inner, outer, *attention]
    if family == "qwen2_moe":
        targets = r".*\.shared_expert\.(gate_proj|up_proj|down_proj)"
    if family == "gpt2":
        targets = r".*\.mlp\.(c_fc|c_proj)"
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K}
    return config(peft_type="MIXLORA", routing_strategy="mixlora", target_modules=targets) | sizes | more


@pytest.mark.parametrize(
    ("family", "form"), [(f, "native") for f in BLOCKS] + [("llama", "torch"), ("gpt2", "torch")], ids="-".join
)
async def test_alone_and_mixed(family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    module = build(family)
    tensors = tensors_for(module, family)
    write(tmp_path / "moe", fields_for(family), {f"base_model.model.{k}": v for k, v in tensors.items()})
    other = lora(
        target_modules=r".*\.c_proj" if family == "gpt2" else [BLOCKS[family][1]], fan_in_fan_out=family == "gpt2"
    )
    adapted = save_adapter(family, other, tmp_path / "lora")
    async with engine_for(family, tmp_path) as engine:
        info = await load(engine, "moe")
        assert (info.kind, info.min_rank, info.tensors) == ("mixlora", RANK, len(tensors))
        await load(engine, "lora")
        wanted = [request(p, n, 1, prompt_logprobs=VOCABULARY) for p in PROMPTS for n in ("moe", "", "lora")]
        answers = await ask_all(engine, wanted)
        alone = await ask_all(engine, wanted[:1])
        for name in ("moe", "lora"):
            await engine.unload_adapter(name)
        await check_quiet(engine)
    for i, prompt in enumerate(PROMPTS):
        base = logprobs(module, prompt)[:-1]
        with torch.inference_mode(), formula(tensors, module, family):
            want = logprobs(module, prompt)[:-1]
        for answer, expected in zip(answers[3 * i :], (want, base, logprobs(adapted, prompt)[:-1]), strict=False):
            torch.testing.assert_close(table(answer), expected, atol=3e-4, rtol=0)
        assert float((want - base).abs().max()) > 0.1
        if i == 0:
            torch.testing.assert_close(table(alone[0]), want, atol=3e-4, rtol=0)


@pytest.mark.parametrize("leave", ["gate_proj", "down_proj"])
async def test_a_projection_without_variants(leave: str, tmp_path: Path) -> None:
    module = build("llama")
    tensors = tensors_for(module, "llama", leave)
    targets = [name for name in fields_for("llama")["target_modules"] if name != leave]
    fields = fields_for("llama", target_modules=targets)
    write(tmp_path / "moe", fields, {f"base_model.model.{k}": v for k, v in tensors.items()})
    async with engine_for("llama", tmp_path) as engine:
        await load(engine, "moe")
        answers = await ask_all(engine, [request(PROMPTS[0], "moe", 1, prompt_logprobs=VOCABULARY)])
    with torch.inference_mode(), formula(tensors, module, "llama"):
        torch.testing.assert_close(table(answers[0]), logprobs(module, PROMPTS[0])[:-1], atol=3e-4, rtol=0)


def test_moe_pefts_pickle_is_converted(tmp_path: Path) -> None:
    """Its names, its .bin: refused with a hint, then read after `peftmux adapters convert`."""
    module = build("llama")
    ours = tensors_for(module, "llama")
    theirs = {k.replace("model.layers", "mixlora.layers", 1): v for k, v in ours.items()}
    folder = tmp_path / "bin"
    folder.mkdir()
    fields = fields_for("llama", expert_lora={"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    torch.save(theirs, folder / "adapter_model.bin")
    base = TorchBase(module)
    with pytest.raises(AdapterInvalid, match="peftmux adapters convert"):
        load_adapter(folder, base)
    convert_adapter(folder, tmp_path / "converted")
    write(tmp_path / "ours", fields_for("llama"), {f"base_model.model.{k}": v for k, v in ours.items()})
    a, b = (load_adapter(tmp_path / name, base).parts for name in ("converted", "ours"))
    assert a.places == b.places
    one, two = (parts.others["model.layers.2.mlp"][0] for parts in (a, b))
    assert isinstance(one, MixturePart)
    assert isinstance(two, MixturePart)
    assert torch.equal(one.router, two.router)
    assert torch.equal(one.experts["up_proj"].b, two.experts["up_proj"].b)


BROKEN: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "more than all experts": ("INVALID_FIELD", "top_k", {"top_k": EXPERTS + 1}, None),
    "another routing": ("UNSUPPORTED_FIELD", "routing_strategy", {"routing_strategy": "mixlora-dynamic"}, None),
    "another activation": ("UNSUPPORTED_FIELD", "act_fn", {"act_fn": "gelu"}, None),
    "fewer experts than there are": ("SHAPE_MISMATCH", "moe_gate", {"num_experts": 4}, None),
    "attention alone": ("NO_SITES", "feed-forward", {"target_modules": ["q_proj"]}, None),
    "a missing router": ("MISSING_TENSOR", "moe_gate", {}, "model.layers.1.mlp.moe_gate.weight"),
    "a missing expert": ("MISSING_TENSOR", "experts.4", {}, "model.layers.1.mlp.up_proj.experts.4.lora_A.weight"),
    "a projection too many": (
        "UNUSED_TENSOR",
        "down_proj",
        {"target_modules": ["gate_proj", "q_proj", "o_proj"]},
        None,
    ),
    "another rank": ("RANK_MISMATCH", "rank 3", {"r": 3}, None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ones_are_refused(case: str, tmp_path: Path) -> None:
    reason, words, fields, missing = BROKEN[case]
    module = build("llama")
    tensors = {f"base_model.model.{k}": v for k, v in tensors_for(module, "llama").items() if k != missing}
    write(tmp_path / "a", fields_for("llama") | fields, tensors)
    with pytest.raises(AdapterInvalid, match=words) as error:
        load_adapter(tmp_path / "a", TorchBase(module))
    assert error.value.reason == reason


def test_a_base_without_such_blocks_is_refused(tmp_path: Path) -> None:
    """OPT's two layers stand in the decoder layer itself."""
    module = build("opt")
    write(tmp_path / "a", config(peft_type="MIXLORA", target_modules=["fc1"]), {"x": torch.zeros(1)})
    with pytest.raises(AdapterInvalid, match="feed-forward block") as error:
        load_adapter(tmp_path / "a", TorchBase(module))
    assert error.value.reason == "NO_SITES"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_site_is_its_definition_and_leaves_other_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    site = MixtureSite(BlockShape({"g": (6, 10), "u": (6, 10)}, "d", (10, 6)), swiglu, dtype, torch.device("cpu"))
    parts = {slot: random_part(experts, k) for slot, experts, k in ((1, 4, 2), (5, 3, 3))}
    for slot, part in parts.items():
        site.put(slot, site.prepare(part))
    x, inner = torch.randn(9, 6).to(dtype), [torch.randn(9, 10).to(dtype) for _ in range(2)]
    hidden = torch.randn(9, 10).to(dtype)
    before = hidden.clone()
    added = site.mix(x, inner, hidden, Segments.build([0, 5, 2, 1, 0], [2, 3, 1, 2, 1]))
    assert [(start, end) for start, end, _ in added] == [(2, 5), (6, 8)]
    untouched = [0, 1, 5, 8]
    assert torch.equal(hidden[untouched], before[untouched])
    close = 1e-5 if dtype is torch.float32 else 5e-2
    for (start, end, terms), slot in zip(added, (5, 1), strict=True):
        rows = slice(start, end)
        own = {name: y[rows].float() for name, y in zip(("g", "u"), inner, strict=True)}
        want, want_terms = apply_mixture_part(x[rows].float(), own, swiglu, "d", parts[slot])
        torch.testing.assert_close(hidden[rows].float(), want, rtol=close, atol=close)
        torch.testing.assert_close(terms.float(), want_terms, rtol=close, atol=close)


def swiglu(own: Any) -> Tensor:
    out: Tensor = silu(own[0]) * own[1]
    return out


def random_part(experts: int, top_k: int) -> MixturePart:
    shapes = {"g": (6, 10), "u": (6, 10), "d": (10, 6)}
    factors = {n: ExpertsPart(random(experts, 2, i), random(experts, o, 2), 0.9) for n, (i, o) in shapes.items()}
    return MixturePart(random(experts, 6), top_k, factors)
