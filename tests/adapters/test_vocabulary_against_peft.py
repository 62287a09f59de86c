"""LoRA on the vocabulary and activated LoRA, on untied and tied models: PEFT's logits, PEFT's files."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import EmbeddingPart, LoweredAdapter, ReplacedRows
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.peft_models import logits_of, lora, make_model, save

pytestmark = pytest.mark.filterwarnings("ignore")

TIED = {"qwen2_tied", "gpt2", "opt"}
EMBEDDING = {"gpt2": "wte"}
INNER = {"gpt2": "c_attn", "phi": "q_proj"}
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def check(name: str, folder: Any, adapted_logits: Any, ids: torch.Tensor = IDS) -> Any:
    """Loaded back by PEFT and lowered by us, the folder gives the same logits."""
    expected = logits_of(name, folder, ids)
    model = make_model(name)
    adapter = load_adapter(folder, TorchBase(model))
    torch.testing.assert_close(adapted_logits(model, adapter, ids), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2, "the adapter would be invisible"
    return adapter


def has(adapter: LoweredAdapter, kind: type) -> bool:
    return any(type(part) is kind for _, part in adapter.parts.placed())


def names(name: str, *wanted: str) -> list[str]:
    """ "emb", "inner" and the like as the model names them."""
    known = {"emb": EMBEDDING.get(name, "embed_tokens"), "inner": INNER.get(name, "v_proj"), "head": "lm_head"}
    return [known[w] for w in wanted]


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gpt2", "opt"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"embed_tokens": 2, "wte": 2}}],
    ids=lambda fields: "-".join(fields) or "lora",
)
@pytest.mark.parametrize("targets", [("emb",), ("emb", "inner"), ("emb", "inner", "head"), ("inner", "head")])
def test_targets(name, fields, targets, tmp_path, adapted_logits):
    """The tied head is another site than the embedding, on a copy of the same weight."""
    save(name, lora(target_modules=names(name, *targets), **fields), tmp_path)
    adapter = check(name, tmp_path, adapted_logits)
    assert has(adapter, EmbeddingPart) is ("emb" in targets)
    assert ("lm_head" in adapter.parts.linear) is ("head" in targets)
    assert not has(adapter, ReplacedRows)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("saved", [("emb",), ("head",), ("emb", "head")])
@pytest.mark.parametrize("targets", ["all-linear", ("inner", "head")])
def test_modules_to_save(name, saved, targets, tmp_path, adapted_logits):
    """Each alone also where they are tied; a module that is saved is no target."""
    target_modules = targets if isinstance(targets, str) else names(name, *targets)
    save(name, lora(target_modules=target_modules, modules_to_save=names(name, *saved)), tmp_path)
    adapter = check(name, tmp_path, adapted_logits)
    assert has(adapter, EmbeddingPart) is ("emb" in saved)
    assert has(adapter, ReplacedRows) is ("head" in saved)
    assert ("lm_head" in adapter.parts.linear) is (targets != "all-linear" and "head" not in saved)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gpt2", "opt"])
@pytest.mark.parametrize("tie", [False, True])
def test_trainable_tokens(name, tie, tmp_path, adapted_logits):
    tokens = sorted({*IDS[0, ::3].tolist(), 40, 63})
    target_modules = names(name, "inner")
    save(name, lora(target_modules=target_modules, trainable_token_indices=tokens, ensure_weight_tying=tie), tmp_path)
    adapter = check(name, tmp_path, adapted_logits)
    assert has(adapter, EmbeddingPart)
    assert has(adapter, ReplacedRows) is (name in TIED)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gpt2"])
@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({"emb": [5, 9, 12]}, 1),
        ({"head": [5, 9, 12]}, 1),
        ({"emb": [5, 9, 12], "head": [5, 9, 12]}, 1),
        ({"emb": [5, 9, 12], "head": [3, 5]}, 2),
        ({"emb": [5, 9, 12], "head": [12, 9, 5]}, 2),
    ],
)
def test_trainable_tokens_by_module(name, given, stored, tmp_path, adapted_logits):
    """Tied ends with the same ids share one tensor; PEFT takes other ids for a wish to untie them."""
    indices = {names(name, module)[0]: ids for module, ids in given.items()}
    save(name, lora(target_modules=names(name, "inner"), trainable_token_indices=indices), tmp_path)
    ids = torch.tensor([[5, 9, 12, 3, 4, 5, 30, 9]])
    adapter = check(name, tmp_path, adapted_logits, ids)
    tensors = [t for t in load_file(tmp_path / "adapter_model.safetensors") if "trainable_tokens" in t]
    assert len(tensors) == (stored if name in TIED else len(given))
    assert has(adapter, EmbeddingPart) is ("emb" in given)
    assert has(adapter, ReplacedRows) is ("head" in given or name in TIED)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=lambda f: "-".join(f) or "lora")
@pytest.mark.parametrize("targets", [("inner",), ("inner", "head")])
def test_activated(name, fields, targets, tmp_path, adapted_logits):
    """From the last of several occurrences on; a row without one, or with half of one at its end, is the base's."""
    invocation = [7, 7, 8]
    save(name, lora(target_modules=names(name, *targets), alora_invocation_tokens=invocation, **fields), tmp_path)
    ids = torch.tensor([[7, 7, 8, 20, 7, 7, 7, 8, 30, 31], [9, 10, 11, 12, 13, 14, 15, 16, 7, 7]])
    ids = torch.cat([ids, torch.tensor([[40, 41, 42, 43, 44, 45, 46, 7, 7, 8], [7, 7, 8, 7, 8, 1, 2, 3, 4, 5]])])
    adapter = check(name, tmp_path, adapted_logits, ids)
    assert adapter.invocation == (7, 7, 8)


def test_untied_tying_is_nothing(tmp_path, adapted_logits):
    save("llama", lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), tmp_path)
    check("llama", tmp_path, adapted_logits)


def refused(name: str, folder: Any) -> tuple[str, str]:
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(folder, TorchBase(make_model(name)))
    return refusal.value.reason, str(refusal.value)


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["v_proj", "embed_tokens"]}, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}],
    ids=["targets", "modules_to_save"],
)
def test_tied_adapters_are_refused(fields, tmp_path):
    save("qwen2_tied", lora(ensure_weight_tying=True, **fields), tmp_path)
    reason, message = refused("qwen2_tied", tmp_path)
    assert reason == "UNSUPPORTED_FIELD"
    assert "ensure_weight_tying" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["v_proj"], "trainable_token_indices": [5]},
    ],
)
def test_an_embedding_that_scales(fields, tmp_path, adapted_logits):
    """Gemma multiplies what it looks up."""
    save("gemma3", lora(**fields), tmp_path)
    adapter = check("gemma3", tmp_path, adapted_logits)
    assert "model.embed_tokens" in adapter.parts.others


def test_tokens_of_a_head_with_a_bias_are_refused(tmp_path):
    """PEFT computes such a head without its bias."""
    save("phi", lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [4]}), tmp_path)
    reason, message = refused("phi", tmp_path)
    assert reason == "UNSUPPORTED_FIELD"
    assert "without bias" in message


@pytest.mark.parametrize(("name", "saved"), [("llama", "norm"), ("llama", "q_proj"), ("gpt2", "c_fc"), ("opt", "fc1")])
def test_other_modules_to_save(name, saved, tmp_path, adapted_logits):
    """Linear and normalisation layers, biases included, Conv1D too."""
    save(name, lora(target_modules=names(name, "head"), modules_to_save=[saved]), tmp_path)
    adapter = check(name, tmp_path, adapted_logits)
    assert any(place.endswith(saved) for place in adapter.parts.others)


@pytest.mark.parametrize("saved", ["mlp"])
def test_modules_of_modules_to_save_are_refused(saved, tmp_path):
    save("llama", lora(target_modules=["v_proj"], modules_to_save=["lm_head", saved]), tmp_path)
    reason, message = refused("llama", tmp_path)
    assert reason == "UNSUPPORTED_SITE"
    assert saved in message


@pytest.mark.parametrize("fields", [{"target_modules": ["v_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_a_resized_vocabulary_is_refused(fields, tmp_path):
    save("llama", lora(**{"target_modules": ["v_proj"], **fields}), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        name: torch.cat([t, t[:, :3]], 1)
        if "embedding_A" in name
        else torch.cat([t, t[:3]])
        if name.endswith(("lm_head.weight", "embed_tokens.base_layer.weight"))
        else t
        for name, t in load_file(path).items()
    }
    save_file(tensors, path)
    reason, message = refused("llama", tmp_path)
    assert reason == "SHAPE_MISMATCH"
    assert "64" in message
    assert "67" in message


def test_embeddings_that_the_config_does_not_name_are_refused(tmp_path):
    """PEFT loads them over the base's own."""
    tuned = peft.get_peft_model(make_model("llama"), lora(target_modules=["v_proj"]))
    tuned.save_pretrained(tmp_path, save_embedding_layers=True)
    reason, message = refused("llama", tmp_path)
    assert reason == "UNUSED_TENSOR"
    assert "modules_to_save" in message
