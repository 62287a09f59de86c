"""Random adapters of many kinds for a random Llama, in the files their references write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftmux.adapters.writer import write_adapter

Tensors = dict[str, Tensor]
_P = "base_model.model."
_RANK = 16
_ATTENTION = ("q_proj", "v_proj")
_EXPERTS = 4


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of one Llama: linear layers by path, as (in, out)."""

    linear: Mapping[str, tuple[int, int]]
    norms: tuple[str, ...]
    layers: int
    hidden: int
    kv: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shapes:
        head = config.hidden_size // config.num_attention_heads
        hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * head
        own = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }
        layers = range(config.num_hidden_layers)
        linear = {f"model.layers.{i}.{name}": sizes for i in layers for name, sizes in own.items()}
        norms = tuple(f"model.layers.{i}.{n}" for i in layers for n in ("input_layernorm", "post_attention_layernorm"))
        return cls(linear, norms, config.num_hidden_layers, hidden, kv, config.vocab_size)

    def named(self, *names: str) -> dict[str, tuple[int, int]]:
        return {path: sizes for path, sizes in self.linear.items() if path.rsplit(".", 1)[1] in names}


class Maker:
    """One adapter's random tensors."""

    def __init__(self, shapes: Shapes, seed: int) -> None:
        self.shapes = shapes
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *size: int, scale: float = 0.02) -> Tensor:
        return torch.randn(*size, generator=self._generator) * scale

    def near_one(self, *size: int) -> Tensor:
        return 1 + self.random(*size, scale=0.05)

    def low_rank(self, sites: Mapping[str, tuple[int, int]], a: str, b: str, rank: int = _RANK) -> Tensors:
        found = {}
        for path, (width, out) in sites.items():
            found[f"{_P}{path}.{a}"] = self.random(rank, width)
            found[f"{_P}{path}.{b}"] = self.random(out, rank)
        return found


Made = tuple[dict[str, Any], Tensors]


def _lora(make: Maker) -> Made:
    return {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK}, make.low_rank(
        make.shapes.linear, "lora_A.weight", "lora_B.weight"
    )


def _rslora(make: Maker) -> Made:
    config, tensors = _lora(make)
    return {**config, "use_rslora": True}, tensors


def _dora(make: Maker) -> Made:
    config, tensors = _lora(make)
    for path, (_, out) in make.shapes.linear.items():
        tensors[f"{_P}{path}.lora_magnitude_vector"] = make.near_one(out)
    return {**config, "use_dora": True}, tensors


def _adalora(make: Maker) -> Made:
    tensors = make.low_rank(make.shapes.linear, "lora_A", "lora_B")
    for path in make.shapes.linear:
        tensors[f"{_P}{path}.lora_E"] = make.near_one(_RANK, 1)
    return {"peft_type": "ADALORA", "init_r": _RANK, "lora_alpha": _RANK}, tensors


def _vera(make: Maker) -> Made:
    tensors = {}
    for path, (_, out) in make.shapes.named(*_ATTENTION).items():
        tensors[f"{_P}{path}.vera_lambda_b"] = make.random(out)
        tensors[f"{_P}{path}.vera_lambda_d"] = make.random(64)
    config = {"peft_type": "VERA", "r": 64, "projection_prng_key": 1}
    return {**config, "target_modules": list(_ATTENTION)}, tensors


def _loha(make: Maker) -> Made:
    tensors = {}
    for path, (width, out) in make.shapes.linear.items():
        for which in ("w1", "w2"):
            tensors[f"{_P}{path}.hada_{which}_a"] = make.random(out, 4, scale=0.1)
            tensors[f"{_P}{path}.hada_{which}_b"] = make.random(4, width, scale=0.1)
    return {"peft_type": "LOHA", "r": 4, "alpha": 4}, tensors


def _loramoe(make: Maker) -> Made:
    tensors = {}
    for path, (width, out) in make.shapes.named(*_ATTENTION).items():
        tensors[f"{_P}{path}.moe_gate.weight"] = make.random(_EXPERTS, width)
        for expert in range(_EXPERTS):
            tensors[f"{_P}{path}.experts.{expert}.lora_A.weight"] = make.random(4, width)
            tensors[f"{_P}{path}.experts.{expert}.lora_B.weight"] = make.random(out, 4)
    config = {"peft_type": "LORAMOE", "num_experts": _EXPERTS, "r": 4, "lora_alpha": 4}
    return {**config, "target_modules": list(_ATTENTION)}, tensors


def _ia3(make: Maker) -> Made:
    tensors = {}
    for path, (width, out) in make.shapes.named("k_proj", "v_proj", "down_proj").items():
        shape = (1, width) if path.endswith("down_proj") else (out, 1)
        tensors[f"{_P}{path}.ia3_l"] = make.near_one(*shape)
    config = {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"]}
    return {**config, "feedforward_modules": ["down_proj"]}, tensors


def _norms(make: Maker) -> Made:
    tensors = {f"{_P}{n}.ln_tuning_layers.weight": make.near_one(make.shapes.hidden) for n in make.shapes.norms}
    names = ["input_layernorm", "post_attention_layernorm"]
    return {"peft_type": "LN_TUNING", "target_modules": names}, tensors


def _shira(make: Maker) -> Made:
    tensors = {}
    for path, (width, out) in make.shapes.named(*_ATTENTION).items():
        count = 2 * (width + out)
        flat = torch.randperm(width * out, generator=make._generator)[:count]
        tensors[f"{_P}{path}.shira_weight"] = make.random(count)
        tensors[f"{_P}{path}.shira_indices"] = torch.stack([flat // width, flat % width]).int()
    return {"peft_type": "SHIRA", "r": 2, "target_modules": list(_ATTENTION)}, tensors


def _prefix(make: Maker) -> Made:
    width = make.shapes.layers * 2 * make.shapes.kv
    return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 16}, {
        "prompt_embeddings": make.random(16, width, scale=0.3)
    }


def _prompt(make: Maker) -> Made:
    return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 16}, {
        "prompt_embeddings": make.random(16, make.shapes.hidden, scale=0.05)
    }


def _layers(make: Maker) -> Made:
    path = f"model.layers.{make.shapes.layers - 1}.self_attn.o_proj"
    width, out = make.shapes.linear[path]
    return {"peft_type": "LAYERS"}, {f"{_P}{path}.weight": make.random(out, width, scale=0.05)}


KINDS: Mapping[str, Callable[[Maker], Made]] = {
    "lora": _lora,
    "rslora": _rslora,
    "dora": _dora,
    "adalora": _adalora,
    "vera": _vera,
    "loha": _loha,
    "loramoe": _loramoe,
    "ia3": _ia3,
    "ln": _norms,
    "shira": _shira,
    "prefix": _prefix,
    "prompt": _prompt,
    "layers": _layers,
}
"""By kind; bottlenecks, in AdapterHub's files, come beside them."""
BOTTLENECK = "pfeiffer"


def save_random_kinds(model: Path, root: Path, count: int) -> list[str]:
    """`count` different adapters whose kinds take turns, as folders of `root`; returns their names."""
    from transformers import AutoConfig

    shapes = Shapes.of(AutoConfig.from_pretrained(model))
    kinds, names = [*KINDS, BOTTLENECK], []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        name = f"kinds-{index}-{kind}"
        names.append(name)
        make = Maker(shapes, 5000 + index)
        if kind == BOTTLENECK:
            _save_bottleneck(make, root / name)
            continue
        config, tensors = KINDS[kind](make)
        stored = {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in tensors.items()}
        write_adapter(root / name, {"task_type": "CAUSAL_LM", **config}, stored)
    return names


def _save_bottleneck(make: Maker, folder: Path) -> None:
    config = {
        "output_adapter": True,
        "original_ln_before": True,
        "original_ln_after": True,
        "residual_before_ln": True,
        "non_linearity": "relu",
        "scaling": 1.0,
    }
    width, inner, tensors = make.shapes.hidden, 48, {}
    for layer in range(make.shapes.layers):
        stem = f"model.layers.{layer}.output_adapters.adapters.a."
        tensors[f"{stem}adapter_down.0.weight"] = make.random(inner, width)
        tensors[f"{stem}adapter_down.0.bias"] = make.random(inner)
        tensors[f"{stem}adapter_up.weight"] = make.random(width, inner)
        tensors[f"{stem}adapter_up.bias"] = make.random(width)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"config": config, "name": "a"}))
    save_file(tensors, folder / "adapter.safetensors")
