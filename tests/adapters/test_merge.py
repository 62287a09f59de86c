"""A merged checkpoint, loaded by transformers alone, computes what PEFT does with the adapter; or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.merged import merge_checkpoint
from peftmux.adapters.torch_base import TorchBase
from peftmux.adapters.writer import write_adapter
from tests.adapters.peft_models import MODELS, logits_of, lora, make_model, save

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
ALL = "all-linear"


def task(kind: Any, **fields: Any) -> Any:
    return kind(task_type="CAUSAL_LM", **fields)


def base(name: str, folder: Path) -> str:
    make_model(name).save_pretrained(folder / "base")
    return str(folder / "base")


@torch.no_grad()
def merged_logits(folder: Path) -> Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    model, info = loaded
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def check(name: str, config: Any, folder: Path) -> None:
    save(name, config, folder / "adapter")
    merge_checkpoint(folder / "adapter", base(name, folder), folder / "merged")
    expected, got = logits_of(name, folder / "adapter", IDS), merged_logits(folder / "merged")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (got - make_model(name)(input_ids=IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_low_ranks_on_every_shape_of_base(name: str, tmp_path: Path) -> None:
    check(name, lora(target_modules=ALL, use_dora=name not in ("gpt2", "mixtral", "qwen3_moe")), tmp_path)


KINDS: dict[str, Any] = {
    "rslora": lora(target_modules=ALL, use_rslora=True),
    "biases": lora(target_modules=["q_proj", "k_proj", "v_proj"], bias="all"),
    "lora_bias": lora(target_modules=["q_proj", "v_proj"], lora_bias=True),
    "adalora": task(peft.AdaLoraConfig, target_modules=["q_proj", "up_proj"], total_step=10),
    "vera": task(peft.VeraConfig, target_modules=["q_proj"], r=4),
    "loha": task(peft.LoHaConfig, target_modules=["q_proj", "down_proj"], r=4),
    "lokr": task(peft.LoKrConfig, target_modules=["q_proj", "down_proj"], r=2),
    "ia3": task(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln": task(peft.LNTuningConfig, target_modules=["input_layernorm", "norm"]),
    "shira": task(peft.ShiraConfig, target_modules=["q_proj", "up_proj"], r=2),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "saved": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lora(target_modules=["q_proj"], trainable_token_indices=[3, 7, 9]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_kind(kind: str, tmp_path: Path) -> None:
    check("qwen2", KINDS[kind], tmp_path)


@pytest.mark.parametrize("kind", ["embedding", "tokens", "saved"])
def test_one_of_two_tied_weights(kind: str, tmp_path: Path) -> None:
    """Of the embedding and the head only one may change: the checkpoint then has both."""
    config = KINDS[kind] if kind != "saved" else lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    check("qwen2_tied", config, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_experts(name: str, tmp_path: Path) -> None:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    check(name, lora(target_modules=[], target_parameters=targets), tmp_path)


def test_layers_and_biases_of_our_own_files(tmp_path: Path) -> None:
    folder, model = base("gpt2", tmp_path), make_model("gpt2")
    for kind, names in (("LAYERS", ("weight", "bias")), ("BITFIT", ("bias",))):
        modules = ["transformer.h.1.mlp.c_fc", "transformer.h.1.ln_2"]
        new = {f"{m}.{n}": torch.randn_like(model.get_parameter(f"{m}.{n}")) for m in modules for n in names}
        tensors = {f"base_model.model.{name}": value for name, value in new.items()}
        write_adapter(tmp_path / kind, {"peft_type": kind, "task_type": "CAUSAL_LM"}, tensors)
        merge_checkpoint(tmp_path / kind, folder, tmp_path / f"{kind}-merged")
        with torch.no_grad():
            expected = torch.func.functional_call(make_model("gpt2"), new, kwargs={"input_ids": IDS}).logits
        torch.testing.assert_close(merged_logits(tmp_path / f"{kind}-merged"), expected, rtol=1e-5, atol=1e-5)


def test_the_checkpoint_keeps_the_bases_dtype_unless_told(tmp_path: Path) -> None:
    make_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    save("llama", lora(target_modules=ALL), tmp_path / "adapter")
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        merge_checkpoint(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / dtype, dtype)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert {p.dtype for p in model.parameters()} == {expected}
    card = (tmp_path / "float32" / "README.md").read_text()
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert load_adapter(tmp_path / "adapter", TorchBase(module)).digest in card


REFUSED: dict[str, tuple[Any, str]] = {
    "prefix": (task(peft.PrefixTuningConfig, num_virtual_tokens=3), "virtual tokens are no weights"),
    "prompt": (task(peft.PromptTuningConfig, num_virtual_tokens=3), "virtual tokens are no weights"),
    "alora": (lora(target_modules=["q_proj"], alora_invocation_tokens=[5]), "from its invocation tokens on"),
    "head": (peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), "its head is no part"),
    "bias": (lora(target_modules=["o_proj"], lora_bias=True), "o_proj, where the base's layer has none"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_change_of_weights_is_refused(kind: str, tmp_path: Path) -> None:
    config, message = REFUSED[kind]
    folder = base("qwen2", tmp_path)
    if kind == "head":
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    else:
        save("qwen2", config, tmp_path / "adapter")
    with pytest.raises(AdapterInvalid, match=message) as refusal:
        merge_checkpoint(tmp_path / "adapter", folder, tmp_path / "merged")
    assert refusal.value.reason == Reason.NOT_MERGEABLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    with pytest.raises(AdapterInvalid, match="new or empty folder"):
        merge_checkpoint(tmp_path / "adapter", "/none", tmp_path / "merged")
