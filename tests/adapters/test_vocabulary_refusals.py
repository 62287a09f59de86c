"""Broken and unservable adapters of the vocabulary, and of activated LoRA: each refused with its reason."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftmux.adapters.errors import Reason
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.damage import Damage, add, check_refused, edit_config, nan, remove, rename, set_tensor

EMBEDDING = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
A, B, COPY = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B", f"{EMBEDDING}.base_layer.weight"
DELTA = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
INNER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def changed(t: torch.Tensor) -> torch.Tensor:
    """One value of it, by its smallest step."""
    t = t.clone()
    t[-1, -1] = t[-1, -1].nextafter(torch.tensor(9.0))
    return t


def both(*damages: Damage) -> Damage:
    def change(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return change


def indices(value: object) -> Damage:
    return edit_config(trainable_token_indices=value)


def saved(value: object) -> Damage:
    return edit_config(modules_to_save=value)


# id: (reason, a piece of the message, how the good folder is broken)
Cases = dict[str, tuple[Reason, str, Damage]]

EMBED: Cases = {
    "copy differs": (Reason.BASE_WEIGHT_DIFFERS, "model.embed_tokens.base_layer.weight", set_tensor(COPY, changed)),
    "copy of another vocabulary": (
        Reason.SHAPE_MISMATCH,
        "expected shape [96, 32] for this base, got [97, 32]",
        set_tensor(COPY, lambda t: torch.cat([t, t[:1]])),
    ),
    "another vocabulary": (
        Reason.SHAPE_MISMATCH,
        "expected shape [any, 96] for this base, got [4, 95]",
        set_tensor(A, lambda t: t[:, 1:]),
    ),
    "A transposed": (Reason.SHAPE_MISMATCH, "got [96, 4]", set_tensor(A, lambda t: t.T)),
    "another width": (Reason.SHAPE_MISMATCH, "expected shape [32, any]", set_tensor(B, lambda t: t[1:])),
    "rank of one tensor": (Reason.RANK_MISMATCH, "rank 4 as the config says, got 3", set_tensor(B, lambda t: t[:, :3])),
    "rank by pattern": (
        Reason.RANK_MISMATCH,
        "model.embed_tokens: expected",
        edit_config(rank_pattern={"embed_tokens": 2}),
    ),
    "A missing": (Reason.MISSING_TENSOR, f"{A} [any, 96]", remove(A)),
    "B missing": (Reason.MISSING_TENSOR, f"{B} [32, any]", remove(B)),
    "a linear layer's names": (Reason.MISSING_TENSOR, A, rename(A, f"{EMBEDDING}.lora_A.weight")),
    "not targeted": (Reason.UNUSED_TENSOR, "embed_tokens", edit_config(target_modules=INNER)),
    "excluded": (Reason.UNUSED_TENSOR, "embed_tokens", edit_config(exclude_modules=["embed_tokens"])),
    "all linear layers": (Reason.UNUSED_TENSOR, "embed_tokens", edit_config(target_modules="all-linear")),
    "magnitude without use_dora": (Reason.UNUSED_TENSOR, "magnitude", add(f"{EMBEDDING}.lora_magnitude_vector", 32)),
    "lora_bias": (Reason.INVALID_FIELD, "lora_bias: expected false", edit_config(lora_bias=True)),
    "NaN": (Reason.NOT_FINITE, B, set_tensor(B, nan)),
    "activated": (Reason.UNSUPPORTED_SITE, "model.embed_tokens", edit_config(alora_invocation_tokens=[9, 10])),
    "saved as well": (Reason.MISSING_TENSOR, f"{EMBEDDING}.weight [96, 32]", saved(["embed_tokens"])),
    "tokens as well": (
        Reason.INVALID_FIELD,
        "expected no module that is replaced as well, got model.embed_tokens",
        both(indices([3, 5]), add(DELTA, 2, 32)),
    ),
}

EMBED_DORA: Cases = {
    "magnitude missing": (
        Reason.MISSING_TENSOR,
        "lora_magnitude_vector [32]",
        remove(f"{EMBEDDING}.lora_magnitude_vector"),
    ),
    "magnitude of the vocabulary": (
        Reason.SHAPE_MISMATCH,
        "expected shape [32] for this base, got [96]",
        set_tensor(f"{EMBEDDING}.lora_magnitude_vector", lambda t: t.repeat(3)),
    ),
}

EMBED_HEAD: Cases = {
    "copy differs": (
        Reason.BASE_WEIGHT_DIFFERS,
        "lm_head.base_layer",
        set_tensor(f"{HEAD}.base_layer.weight", changed),
    ),
    "bias of a head without one": (Reason.UNUSED_TENSOR, "lm_head.base_layer.bias", add(f"{HEAD}.base_layer.bias", 96)),
    "saved as well": (Reason.MISSING_TENSOR, f"{HEAD}.weight [96, 32]", saved(["lm_head"])),
    "saved by half a name": (
        Reason.INVALID_FIELD,
        "replaced as well, got lm_head",
        both(saved(["head"]), add(f"{HEAD}.weight", 96, 32)),
    ),
}

SAVED: Cases = {
    "unknown": (Reason.UNKNOWN_SITE, "got 'score'", saved(["lm_head", "embed_tokens", "score"])),
    "a block": (Reason.UNSUPPORTED_SITE, "model.embed_tokens or lm_head", saved(["lm_head", "embed_tokens", "mlp"])),
    "a norm": (Reason.MISSING_TENSOR, "model.norm.weight [32]", saved(["lm_head", "embed_tokens", "model.norm"])),
    "everything": (Reason.UNSUPPORTED_SITE, "field modules_to_save", saved([""])),
    "not a list": (Reason.INVALID_FIELD, "field modules_to_save: expected a list", saved("lm_head")),
    "not texts": (Reason.INVALID_FIELD, "field modules_to_save", saved([["lm_head"]])),
    "not named": (Reason.UNUSED_TENSOR, "expected lm_head in modules_to_save", saved(["embed_tokens"])),
    "none named": (Reason.UNUSED_TENSOR, "expected model.embed_tokens in modules_to_save", saved(None)),
    "weight missing": (Reason.MISSING_TENSOR, f"{HEAD}.weight [96, 32]", remove(f"{HEAD}.weight")),
    "larger vocabulary": (
        Reason.SHAPE_MISMATCH,
        "expected shape [96, 32] for this base, got [192, 32]",
        set_tensor(f"{HEAD}.weight", lambda t: t.repeat(2, 1)),
    ),
    "larger vocabulary, not named": (
        Reason.SHAPE_MISMATCH,
        "expected shape [96, 32] for this base, got [192, 32]",
        both(set_tensor(f"{HEAD}.weight", lambda t: t.repeat(2, 1)), saved(["embed_tokens"])),
    ),
    "bias of a head without one": (Reason.UNUSED_TENSOR, "lm_head.bias", add(f"{HEAD}.bias", 96)),
    "NaN": (Reason.NOT_FINITE, f"{EMBEDDING}.weight", set_tensor(f"{EMBEDDING}.weight", nan)),
    "activated": (Reason.UNSUPPORTED_FIELD, "field modules_to_save", edit_config(alora_invocation_tokens=[9])),
    "tokens as well": (Reason.INVALID_FIELD, "got model.embed_tokens", indices([3])),
}

TOKENS: Cases = {
    "past the vocabulary": (Reason.INVALID_FIELD, "expected ids below this base's 96, got 96", indices([3, 5, 96])),
    "twice": (Reason.INVALID_FIELD, "expected each id once, got 5 twice", indices([5, 3, 5])),
    "negative": (Reason.INVALID_FIELD, "field trainable_token_indices", indices([3, 5, -1])),
    "true": (Reason.INVALID_FIELD, "field trainable_token_indices", indices([3, 5, True])),
    "a number": (Reason.INVALID_FIELD, "field trainable_token_indices", indices(3)),
    "an empty list in an object": (Reason.INVALID_FIELD, "trainable_token_indices", indices({"embed_tokens": []})),
    "fewer": (Reason.SHAPE_MISMATCH, "expected shape [2, 32] for this base, got [3, 32]", indices([3, 5])),
    "none": (Reason.UNUSED_TENSOR, "trainable_tokens_delta", indices(None)),
    "another width": (Reason.SHAPE_MISMATCH, "got [3, 16]", set_tensor(DELTA, lambda t: t[:, :16])),
    "missing": (Reason.MISSING_TENSOR, f"{DELTA} [3, 32]", remove(DELTA)),
    "unknown module": (Reason.UNKNOWN_SITE, "got 'wte'", indices({"wte": [3, 5, 90]})),
    "another module": (Reason.UNSUPPORTED_SITE, "self_attn.q_proj", indices({"q_proj": [3, 5, 90]})),
    "of the head": (Reason.MISSING_TENSOR, "lm_head.token_adapter", indices({"lm_head": [3, 5, 90]})),
    "by two names": (
        Reason.INVALID_FIELD,
        "expected model.embed_tokens once",
        indices({"embed_tokens": [3, 5, 90], "model.embed_tokens": [3, 5, 90]}),
    ),
    "NaN": (Reason.NOT_FINITE, DELTA, set_tensor(DELTA, nan)),
    "activated": (Reason.UNSUPPORTED_FIELD, "field trainable_token", edit_config(alora_invocation_tokens=[9])),
}

ACTIVATED: Cases = {
    "past the vocabulary": (
        Reason.INVALID_FIELD,
        "alora_invocation_tokens: expected ids below this base's 96, got 96",
        edit_config(alora_invocation_tokens=[9, 96]),
    ),
    "negative": (Reason.INVALID_FIELD, "alora_invocation_tokens", edit_config(alora_invocation_tokens=[-1])),
    "a text": (Reason.INVALID_FIELD, "alora_invocation_tokens", edit_config(alora_invocation_tokens="<think>")),
    "DoRA": (Reason.UNSUPPORTED_FIELD, "field use_dora", edit_config(use_dora=True)),
    "new base biases": (Reason.UNSUPPORTED_FIELD, "field bias", edit_config(bias="lora_only")),
    "no task": (Reason.UNSUPPORTED_TASK, "expected CAUSAL_LM", edit_config(task_type=None)),
}

ALL = {
    "lora_embed": EMBED,
    "lora_dora_embed": EMBED_DORA,
    "lora_embed_lmhead": EMBED_HEAD,
    "lora_modules_to_save": SAVED,
    "lora_trainable_tokens": TOKENS,
    "lora_alora": ACTIVATED,
}


@pytest.mark.parametrize(("folder", "case"), [(folder, case) for folder, cases in ALL.items() for case in cases])
def test_broken_folder_is_refused(folder, case, fixtures, llama, tmp_path):
    check_refused(fixtures / "peft/llama" / folder, tmp_path / "adapter", llama, ALL[folder][case])


def test_dora_of_a_zero_dimension_is_refused(fixtures, load_base, tmp_path):
    """As at linear layers, there is no epsilon in the norm."""
    module = copy.deepcopy(load_base("llama"))
    module.get_parameter("model.embed_tokens.weight").data[:, 3] = 0
    adapter = fixtures / "peft/llama/lora_dora_embed"
    broken = both(set_tensor(B, lambda t: t.index_fill(0, torch.tensor([3]), 0.0)), remove(COPY))
    case = (Reason.NOT_FINITE, "the out_scale that follows for model.embed_tokens", broken)
    check_refused(adapter, tmp_path / "adapter", TorchBase(module), case)


@pytest.mark.parametrize("name", ["lora_embed", "lora_dora_embed", "lora_embed_lmhead"])
def test_copies_may_be_left_out(name, fixtures, llama, tmp_path, adapted_logits):
    """GPT-2's `wte` has none, for one."""
    shutil.copytree(fixtures / "peft/llama" / name, tmp_path / "adapter")
    copies = [t for t in load_file(tmp_path / "adapter/adapter_model.safetensors") if ".base_layer." in t]
    assert copies
    remove(*copies)(tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter/expected.safetensors")
    logits = adapted_logits(llama.module, load_adapter(tmp_path / "adapter", llama), expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)


def test_tied_tokens_and_a_head_of_its_own_are_refused(fixtures, qwen2, tmp_path):
    """PEFT would put one wrapper into the other and fail."""
    tokens = both(indices([3, 5]), add(DELTA, 2, 32))
    targets = both(tokens, edit_config(target_modules=["q_proj", "lm_head"]))
    good = fixtures / "peft/qwen2/lora"
    case = (Reason.INVALID_FIELD, "replaced as well, got lm_head", targets)
    check_refused(good, tmp_path / "targets", qwen2, case)
    whole = both(tokens, saved(["lm_head"]), add(f"{HEAD}.weight", 96, 32))
    case = (Reason.INVALID_FIELD, "got lm_head", whole)
    check_refused(good, tmp_path / "saved", qwen2, case)
