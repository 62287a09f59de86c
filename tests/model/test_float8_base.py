"""Parts of every kind over a base held in float8. The oracle: a plain base of the weights that the codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftmux.adapters.checkpoint import load_checkpoint
from peftmux.adapters.float8 import Float8Linear
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.runtime.model.load import load_model
from tests.engine.harness import FIXTURES, ask_all, check_quiet, load, request, running
from tests.parity.test_parity_served import table
from tests.trainer.lowered import lowered_logits

pytest.importorskip("torchao", reason="needs torchao, which `peftmux[test]` brings on Linux")

LLAMA = str(FIXTURES / "base" / "llama")
KINDS = (
    *("peft/llama/lora", "peft/llama/lora_dora", "peft/llama/ia3", "peft/llama/vera", "peft/llama/lokr"),
    *("peft/llama/prefix", "peft/llama/shira", "adapterhub/llama/houlsby_double_seq_bn"),
)
IDS = [[5, 9, 17, 33, 60, 7], [44, 12, 80, 81, 82, 3, 4, 5, 6]]


def held(**options: Any) -> Any:
    return load_checkpoint(LLAMA, quantization="fp8", **{"dtype": torch.float32, **options}).eval()


def plain(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Plain layers of code times its row's scale, rounded to the base's dtype."""
    module = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=dtype).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, Float8Linear):
            codes: Any = layer.weight
            assert codes.qdata.dtype == torch.float8_e4m3fn
            assert codes.scale.shape == (layer.out_features, 1)
            module.get_submodule(name).weight.data = (codes.qdata.float() * codes.scale.float()).to(dtype)
    return module


async def test_all_kinds_in_one_batch() -> None:
    names = ["", *(kind.split("/")[-1] for kind in KINDS)]
    base = plain(held())
    async with running(quantization="fp8", adapters_root=str(FIXTURES)) as engine:
        for name, folder in zip(names[1:], KINDS, strict=True):
            await load(engine, folder, name)
        jobs = [(name, ids) for ids in IDS for name in names]
        vocabulary = base.config.vocab_size
        answers = await ask_all(engine, [request(i, n, max_tokens=1, prompt_logprobs=vocabulary) for n, i in jobs])
        for name in names[1:]:
            await engine.unload_adapter(name)
        await check_quiet(engine)
    folders = dict(zip(names[1:], KINDS, strict=True))
    for (name, ids), answer in zip(jobs, answers, strict=True):
        rows = torch.tensor([ids])
        with torch.inference_mode():
            logits = base(rows).logits
            if name:
                changed = lowered_logits(base, load_adapter(FIXTURES / folders[name], TorchBase(base)), rows)
                assert (changed - logits).abs().max() > 1e-3, f"{name} would be invisible"
                logits = changed
        expected = logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(table(answer, vocabulary), expected, rtol=0, atol=2e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_computes_with_its_row_scaled_codes(dtype: torch.dtype) -> None:
    model = held(dtype=dtype)
    weights = plain(model, dtype)
    x = torch.randn(3, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        layer, other = model.get_submodule(name), weights.get_submodule(name)
        assert type(layer) is Float8Linear
        torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)
        torch.testing.assert_close(TorchBase(model).weight(name), other.weight.data.float(), rtol=0, atol=0)


def test_a_large_neighbour_changes_no_row() -> None:
    layer = held().model.layers[0].mlp.up_proj
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(1))
    beside = x.clone()
    beside[1:] *= 1e4
    torch.testing.assert_close(layer(beside)[0], layer(x)[0], rtol=0, atol=0)


def test_the_weights_stay_in_8_bits_where_they_are_served() -> None:
    model = load_model(LLAMA, device=torch.device("cpu"), dtype=torch.bfloat16, quantization="fp8")
    layers: dict[str, Any] = {
        name: site.group.dense._layer  # type: ignore[attr-defined]
        for name, site in model.sites.items()
        if name.endswith("_proj")
    }
    assert len(layers) == 7 * model.module.config.num_hidden_layers
    for name, layer in layers.items():
        codes, whole = layer.weight, layer.in_features * layer.out_features * 2
        assert codes.qdata.nbytes + codes.scale.nbytes == whole / 2 + layer.out_features * 4, name


def test_backward_keeps_no_dequantised_weight() -> None:
    layer = held().model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, torch.ones_like(y) @ layer.dequantised())
    assert kept == []


def test_a_saved_float8_base_needs_no_flag(tmp_path: Path) -> None:
    model = held()
    model.save_pretrained(tmp_path)
    again = load_checkpoint(str(tmp_path), dtype=torch.float32)
    ids = torch.tensor([IDS[0]])
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
