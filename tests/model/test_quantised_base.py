"""Adapters over bases held in 4 and 8 bits: PEFT's logits on plain layers of the weights that the bits stand for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from peftmux.adapters.float8 import adopt_float8
from peftmux.adapters.quantised import dequantised, quantisation_config
from peftmux.adapters.torch_base import TorchBase
from peftmux.runtime.engine.factory import EngineConfig, start_engine
from peftmux.runtime.engine.observer import NullObserver
from tests.engine.harness import ask_all, check_quiet, load, request

IDS = [[5, 9, 17, 33, 60, 7], [44, 12, 80, 81, 82], [21, 22, 23, 24, 25, 26, 27, 28]]
VOCABULARY = 96
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    "dora": LoraConfig(
        r=4, target_modules=["o_proj", "up_proj"], use_dora=True, task_type="CAUSAL_LM", init_lora_weights=False
    ),
    "some": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}
LIBRARIES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "fp8": "torchao"}


@pytest.fixture(scope="module", params=list(LIBRARIES))
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, folder): of a checkpoint saved quantised, of the plain one, and the root of adapters."""
    library = LIBRARIES[request.param]
    pytest.importorskip(library, reason=f"needs {library}, which `peftmux[test]` brings on Linux")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    made = AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        quantization_config=quantisation_config(request.param, torch.float32),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    made.save_pretrained(folder / "quantised")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, adapter in ADAPTERS.items():
            tuned: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "plain"), adapter)
            generator = torch.Generator().manual_seed(3)
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            tuned.save_pretrained(folder / "adapters" / name)
    return request.param, folder


def stored(folder: Path) -> Any:
    module = AutoModelForCausalLM.from_pretrained(
        folder / "quantised", device_map={"": "cpu"}, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    adopt_float8(module)
    return module


def base(folder: Path) -> Any:
    """Plain layers of the weights it stands for: bitsandbytes would round inputs too, of int8 and on CPUs of NF4."""
    module = stored(folder)
    if module.config.quantization_config.quant_method != "torchao":
        return module.dequantize()
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", attn_implementation="eager").eval()
    for name, weight in module.named_parameters():
        if name.endswith("_proj.weight"):
            plain.get_parameter(name).data = weight.qdata.float() * weight.scale  # type: ignore[attr-defined]
    return plain


@torch.inference_mode()
def expected(folder: Path, name: str) -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = base(folder)
        model = PeftModel.from_pretrained(module, folder / "adapters" / name) if name else module
    return [model.eval()(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in IDS]


def table(answer: Any) -> torch.Tensor:
    rows = torch.full((len(answer.prompt_logprobs) - 1, VOCABULARY), torch.nan)
    for row, entry in zip(rows, answer.prompt_logprobs[1:], strict=True):
        ids, values = zip(*entry.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return rows


@pytest.mark.parametrize("kept", [True, False], ids=["stored", "while loading"])
async def test_adapters_over_a_quantised_base(quantised: Any, kept: bool) -> None:
    name, folder = quantised
    names = ["", *ADAPTERS]
    config = EngineConfig(
        model=str(folder / ("quantised" if kept else "plain")),
        quantization=None if kept else name,
        adapters_root=str(folder / "adapters"),
        dtype="float32",
        num_threads=1,
    )
    engine = await start_engine(config, NullObserver())
    try:
        for adapter in names[1:]:
            await load(engine, adapter)
        jobs = [(adapter, ids) for adapter in names for ids in IDS]
        answers = await ask_all(engine, [request(ids, a, 1, prompt_logprobs=VOCABULARY) for a, ids in jobs])
        wanted = [logprobs for adapter in names for logprobs in expected(folder, adapter)]
        for answer, logprobs, (adapter, _) in zip(answers, wanted, jobs, strict=True):
            apart = float((table(answer) - logprobs[:-1]).abs().max())
            assert apart < 1e-3, (adapter, apart)
            assert answer.ids[0] == int(logprobs[-1].argmax())
        assert (wanted[0] - wanted[len(IDS)]).abs().max() > 0.1, "the adapter would be invisible"
        for adapter in names[1:]:
            await engine.unload_adapter(adapter)
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)


def test_the_dequantised_weight_is_what_the_layer_computes_with(quantised: Any) -> None:
    _, folder = quantised
    module = stored(folder)
    layer = module.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    before = dequantised(layer)
    with torch.inference_mode():
        out = layer(x)  # on some CPUs this packs the weight for a kernel that rounds to bfloat16
    weight = dequantised(layer)
    assert weight.shape == (128, 64)
    torch.testing.assert_close(weight, before, rtol=0, atol=2e-3)  # packing rounds each block's scale to bfloat16
    torch.testing.assert_close(x @ weight.t(), out, rtol=0, atol=3e-2)
    site = TorchBase(module).linear_sites["model.layers.0.mlp.up_proj"]
    assert (site.in_features, site.out_features) == (64, 128)
