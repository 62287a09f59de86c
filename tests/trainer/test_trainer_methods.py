"""Each method against PEFT (values and gradients) and against the parts that its files lower to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer import train
from peftmux.trainer.data import Example
from peftmux.trainer.errors import OptionError
from peftmux.trainer.files.export import export_adapter
from peftmux.trainer.methods import METHODS, AttachContext, AttachedAdapter
from peftmux.trainer.settings.options import build_config
from tests.model.families import build
from tests.trainer.lowered import lowered_logits
from tests.trainer.tiny_models import CONFIGS, build_model, build_tokenizer, random_ids, scramble

PATTERNS = {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 7}, "alpha_pattern": {"o_proj": 3}}
IN_PEFT = (
    *("lora", "rslora", "lora-plus", "pissa", "dora", "adalora"),
    *("prefix", "prompt", "p-tuning", "ia3", "ln", "shira"),
)
"""The others are compared with plain torch, in files of their own."""
GENERATE = tuple(name for name in METHODS if name not in ("head", "fusion", "multitask-prompt", "vora"))
CASES = [
    ("lora", {}),
    ("lora", {**PATTERNS, "lora_dropout": 0.5}),
    ("lora", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    ("lora", {"target_modules": r".*\.(k|gate)_proj", "exclude_modules": ["layers.0.mlp.gate_proj"]}),
    ("rslora", {"r": 16}),
    ("dora", {}),
    ("dora", {**PATTERNS, "use_rslora": True}),
    ("prefix", {"num_virtual_tokens": 5}),
    ("prefix", {"num_virtual_tokens": 3, "prefix_init": "random"}),
]


def attach(method: str, model: Any, config: dict[str, Any] | None = None) -> AttachedAdapter:
    chosen = METHODS[method]
    return chosen.attach(model, build_config(chosen.config_class, config or {}), AttachContext(seed=0))


def peft_model(shape: str, folder: Path) -> Any:
    """The folder loaded by PEFT on a base of its own; any complaint of PEFT's about the files is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers to PEFT
        warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT of every norm it tunes
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # PEFT of its own AdaLoRA files
        return PeftModel.from_pretrained(build_model(shape), str(folder)).eval()


def trainable_peft_model(shape: str, folder: Path) -> Any:
    """As `peft_model`, with gradients. PEFT does not load a prefix for training: it gets the tensor by hand."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if config.peft_type not in ("PREFIX_TUNING", "PROMPT_TUNING"):
        return PeftModel.from_pretrained(build_model(shape), str(folder), is_trainable=True).eval()
    peft = get_peft_model(build_model(shape), config).eval()
    with torch.no_grad():
        peft.prompt_encoder.default.embedding.weight.copy_(
            load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        )
    return peft


def trained(shape: str, method: str, config: dict[str, Any], folder: Path) -> tuple[Any, AttachedAdapter]:
    """A live model with a scrambled adapter, also exported to `folder`."""
    model = build_model(shape)
    adapter = attach(method, model, config)
    scramble(adapter)
    export_adapter(adapter, "base", folder, card="")
    return model, adapter


def check_same_logits(shape: str, method: str, config: dict[str, Any], folder: Path) -> None:
    model, _ = trained(shape, method, config, folder)
    ids = random_ids()
    with torch.no_grad():
        ours = model(input_ids=ids).logits[:, -ids.shape[1] :]  # virtual tokens have logits of their own
        plain = build_model(shape)(input_ids=ids).logits
        theirs = peft_model(shape, folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    base = build_model(shape)
    lowered = lowered_logits(base, load_adapter(folder, TorchBase(base)), ids)
    assert (ours - plain).abs().max() > 1e-2, "the adapter must matter for the comparison to mean anything"
    torch.testing.assert_close(ours, theirs[:, -ids.shape[1] :], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, lowered, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("method", IN_PEFT)
def test_peft_and_the_lowered_parts_give_our_logits(shape: str, method: str, tmp_path: Path):
    if shape == "gpt2" and method in NOT_FOR_CONV1D:
        with pytest.raises(OptionError, match="Conv1D"):
            attach(method, build_model(shape))
        return
    check_same_logits(shape, method, {}, tmp_path / "a")


@pytest.mark.parametrize(("method", "config"), CASES)
def test_every_option_means_what_it_means_to_peft(method: str, config: dict[str, Any], tmp_path: Path):
    check_same_logits("llama-biased", method, config, tmp_path / "a")


OWN_START = {"pissa", "adalora", "p-tuning"}
"""PEFT changes the base to start a PiSSA, regularises AdaLoRA, and drops a P-Tuning's encoder from the file."""
NOT_FOR_CONV1D = {"shira"}


@pytest.mark.parametrize("shape", ["llama-biased", "gpt2", "phi3"])
@pytest.mark.parametrize("method", sorted(set(IN_PEFT) - OWN_START))
def test_gradients_equal_pefts(shape: str, method: str, tmp_path: Path):
    if shape == "gpt2" and method in NOT_FOR_CONV1D:
        return
    model, adapter = trained(shape, method, {}, tmp_path / "a")
    ids = random_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    ours = {
        name.replace("virtual tokens.embeddings", "prompt_embeddings"): p.grad for name, p in adapter.parameters.items()
    }
    peft = trainable_peft_model(shape, tmp_path / "a")
    peft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    theirs = {_file_name(name): p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        assert grad is not None
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def _file_name(parameter: str) -> str:
    """PEFT's parameter names as its file has them."""
    if parameter.startswith("prompt_encoder."):
        return "prompt_embeddings"
    return parameter.replace(".default.weight", "" if "magnitude" in parameter else ".weight").replace(".default", "")


@pytest.mark.parametrize("method", sorted(set(GENERATE) - {"prefix", "p-tuning-v2", "prompt", "p-tuning", "ladder"}))
def test_a_fresh_low_rank_adapter_starts_from_the_base(method: str):
    model, ids = build_model("qwen2"), random_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attach(method, model)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", CONFIGS)
def test_a_fresh_prefix_is_the_text_it_was_made_of(shape: str):
    model, ids = build_model(shape), random_ids(1)
    text = Example([7, 8, 9, 10], [7, 8, 9, 10])
    with torch.no_grad():
        whole = torch.cat([torch.tensor([[7, 8, 9, 10, 7, 8]]), ids], dim=1)
        expected = model(input_ids=whole).logits[:, 6:]
        chosen = METHODS["prefix"]
        chosen.attach(model, chosen.config_class(num_virtual_tokens=6), AttachContext(0, [text]))
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", GENERATE)
def test_padding_does_not_change_a_row(method: str):
    model = build_model("qwen2")
    scramble(attach(method, model))
    ids = random_ids(1)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        for extra in ({}, {"attention_mask": mask}):
            got = model(input_ids=padded, **extra).logits[:, : alone.shape[1]]
            torch.testing.assert_close(got, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", GENERATE)
def test_detaching_gives_the_base_back(method: str):
    model, ids = build_model("llama" if method in NOT_FOR_CONV1D else "gpt2"), random_ids()
    names = list(dict(model.named_modules()))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapter = attach(method, model)
        scramble(adapter)
        adapter.detach()
        assert torch.equal(model(input_ids=ids).logits, before)
    assert list(dict(model.named_modules())) == names


@pytest.mark.parametrize("method", GENERATE)
def test_only_the_adapter_is_trained_and_in_float32(method: str):
    model = build_model("qwen2", torch.bfloat16)
    adapter = attach(method, model)
    learned = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learned} == {id(p) for p in adapter.parameters.values()}
    assert {p.dtype for p in learned} == {torch.float32}
    assert model.dtype == torch.bfloat16
    out = model(input_ids=random_ids(), labels=random_ids())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learned)


def test_dora_leaves_the_norm_out_of_the_gradient():
    """The gradient to A and B is LoRA's times the fixed magnitude / norm, as the paper's section 4.3 has it."""
    grads: dict[str, dict[str, Tensor]] = {}
    for method in ("lora", "dora"):
        model = build_model("llama")
        adapter = attach(method, model, {"target_modules": ["model.layers.1.mlp.down_proj"]})
        model(input_ids=random_ids(), labels=random_ids()).loss.backward()
        grads[method] = {n: p.grad for n, p in adapter.parameters.items() if p.grad is not None}
    for name, grad in grads["lora"].items():  # a fresh DoRA's magnitude is the norm itself
        torch.testing.assert_close(grads["dora"][name], grad, rtol=1e-4, atol=1e-7)


def test_checkpointed_layers_keep_the_prefix_and_its_gradient():
    grads = []
    for checkpointed in (False, True):
        model = build_model("gpt2")
        adapter = attach("prefix", model)
        if checkpointed:
            assert adapter.checkpoint_activations()
        for module in model.modules():  # training mode without the dropout that would make the two differ
            module.training = not isinstance(module, torch.nn.Dropout)
        model(input_ids=random_ids(), labels=random_ids()).loss.backward()
        grads.append(adapter.parameters["prompt_embeddings"].grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r: expected 1 or more, got 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank-pattern q_proj: expected 1 or more, got 0"),
        ({"lora_dropout": 1.0}, "lora-dropout: expected 0 or more and below 1, got 1.0"),
        ({"target_modules": ["q_proj", "nope"]}, "no linear layer is named 'nope'; this base has down_proj"),
        ({"target_modules": "nope.*"}, "matches no linear layer"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "layers-to-transform: no layer 9 has such"),
    ],
)
def test_options_that_fit_nothing_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        attach("lora", build_model("llama"), config)


@pytest.mark.parametrize("alpha", [0, -8, float("inf"), float("nan")])
def test_adalora_trains_with_no_scale_that_a_reader_takes_from_the_pruned_rank(alpha: float):
    with pytest.raises(OptionError, match=r"lora-alpha: expected (more than 0|a finite number), got"):
        attach("adalora", build_model("llama"), {"lora_alpha": alpha})


_BRANCHES = "bottlenecks do not fit"
_BLOCKS = "expected projections of a feed-forward block"


@pytest.mark.parametrize(
    ("method", "families", "message"),
    [
        ("ln", ("olmo",), r"those of OlmoForCausalLM \(OlmoLayerNorm\) have none: train lora"),
        ("ln", ("nemotron",), "it changes no NemotronLayerNorm1P, which NemotronForCausalLM has: train lora"),
        ("houlsby", ("opt", "gemma2", "gemma3_text", "gpt_neox", "gptj", "phi"), _BRANCHES),
        ("pfeiffer", ("olmo2", "exaone4", "cohere2", "nemotron", "bloom", "falcon"), _BRANCHES),
        ("mixlora", ("opt", "gptj", "bloom", "falcon", "mpt"), _BLOCKS),
        ("mixlora", ("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), _BLOCKS),
        ("prefix", ("deepseek_v3",), "cannot store layer 0"),
        ("shira", ("gpt2",), "trains nn.Linear layers"),
        ("bitfit", ("llama",), "of which LlamaForCausalLM has none"),
    ],
)
def test_bases_that_docs_say_are_refused(method: str, families: tuple[str, ...], message: str):
    for family in families:
        with pytest.raises(OptionError, match=message):
            attach(method, build(family))


def test_expert_weights_left_out_are_said():
    (note,) = attach("lora", build_model("mixtral")).notes
    assert note.startswith("4 stacked expert weights, e.g. model.layers.0.mlp.experts.")
    assert attach("lora", build_model("llama")).notes == ()


def test_dora_refuses_a_weight_of_norm_zero():
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    with pytest.raises(OptionError, match="this base has a zero"):
        attach("dora", model)


def test_a_base_that_ignores_its_past_is_refused_for_prefixes():
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(OptionError, match="expected a base with attention layers"):
        attach("prefix", AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    ("method", "width", "least", "most"),
    [
        ("pfeiffer", 1024, 3e-5, 3e-3),  # what Houlsby et al. try on BERT large (arXiv 1902.00751)
        ("pfeiffer", 4096, 1e-4, 5e-4),  # 3e-4 in Hu et al. (arXiv 2304.01933)
        ("pfeiffer", 32, 1e-3, 1e-2),
        ("fusion", 768, 5e-5, 2e-4),  # AdapterHub's example has 5e-5
        ("fusion", 32, 1e-3, 5e-3),
        ("ln", 4096, 1e-3, 1e-2),
        ("ln", 32, 1e-2, 7e-2),
        ("diffpruning", 4096, 2e-5, 3e-4),
        ("diffpruning", 32, 1e-3, 1e-2),
    ],
)
def test_default_rates_of_wide_bases_are_the_literatures(method: str, width: int, least: float, most: float):
    """Narrow bases learn with more, up to what they bear."""
    chosen = METHODS[method]
    config = chosen.config_class(**({"adapters": ["a", "b"]} if method == "fusion" else {}))
    assert least <= chosen.default_rate(config, width) <= most
    assert chosen.default_rate(config, width) <= chosen.default_rate(config, width // 2)


def test_bases_with_layers_of_other_kinds(rows: Path, tmp_path: Path):
    """Routers that are linear layers with two outputs are left as they are; layers without keys have no prefix."""
    run: dict[str, Any] = {"data": rows, "max_steps": 1, "disable_tqdm": True}
    for family in ("llama4_text", "qwen3_next", "falcon"):
        build(family, vocab_size=128).save_pretrained(tmp_path / family)
        build_tokenizer().save_pretrained(tmp_path / family)
    found = train("lora", model=tmp_path / "llama4_text", out=tmp_path / "a", **run)
    assert found.adapter.changes
    assert not [name for name in found.adapter.changes if "router" in name]
    with pytest.raises(OptionError, match="prefix does not fit this base: 1 of its 4 layers keep keys and values"):
        train("prefix", model=tmp_path / "qwen3_next", out=tmp_path / "b", **run)
    own = train("lora", model=tmp_path / "falcon", out=tmp_path / "c", **run)  # linear layers of a class of its own
    assert {name.rpartition(".")[2] for name in own.adapter.changes} == {
        *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    }
