"""Broken and unservable adapters: each is refused with its reason, saying expected and got, at once."""

from __future__ import annotations

import copy
import json
import shutil
import struct

import pytest
import torch

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import AdapterFiles, read_adapter
from peftmux.adapters.lower import load_adapter, lower, plan_adapter
from peftmux.adapters.torch_base import TorchBase
from tests.adapters.damage import (
    Damage,
    add,
    check_refused,
    container,
    edit_config,
    entry,
    nan,
    pickled,
    pickled_in_disguise,
    pipe,
    remove,
    rename,
    set_tensor,
    truncate,
    write_config,
    write_tensors,
)

Q = "base_model.model.model.layers.1.self_attn.q_proj"
MANY = {f"t{i}": entry([0], 0, 0) for i in range(100_000)}
NESTED = b"[" * 100_000

# id: (reason, a piece of the message, how a good LoRA folder is broken)
LORA: dict[str, tuple[Reason, str, Damage]] = {
    # the folder
    "no config": (Reason.MISSING_FILE, "adapter_config.json", lambda f: (f / "adapter_config.json").unlink()),
    "no tensors": (
        Reason.MISSING_FILE,
        "adapter_model.safetensors",
        lambda f: (f / "adapter_model.safetensors").unlink(),
    ),
    "pickle .bin": (Reason.PICKLE, "peftmux adapters convert", pickled("adapter_model.bin")),
    "pickle .pt": (Reason.PICKLE, "peftmux adapters convert", pickled("adapter_model.pt")),
    "pickle named safetensors": (Reason.PICKLE, "peftmux adapters convert", pickled_in_disguise),
    "named pipe": (Reason.MISSING_FILE, "regular file", pipe),
    # the config file
    "config empty": (Reason.MALFORMED_CONFIG, "not valid JSON", write_config(b"\n")),
    "config cut": (Reason.MALFORMED_CONFIG, "not valid JSON", write_config(b'{"peft_type": "LO')),
    "config not UTF-8": (Reason.MALFORMED_CONFIG, "not valid JSON", write_config(b'{"peft_type": "\xff"}')),
    "config a list": (Reason.MALFORMED_CONFIG, "expected an object, got list", write_config(b"[]")),
    "config NaN": (Reason.MALFORMED_CONFIG, "NaN", write_config(b'{"lora_alpha": NaN}')),
    "config nested without end": (Reason.MALFORMED_CONFIG, "", write_config(b'{"a": ' + NESTED)),
    "config nested deep": (Reason.MALFORMED_CONFIG, "levels", edit_config(revision=json.loads("[" * 50 + "]" * 50))),
    "config of 2 MB": (Reason.TOO_LARGE, "expected at most", write_config(b" " * (2 << 20))),
    # the tensor file
    "tensors empty": (Reason.MALFORMED_TENSORS, "expected at least 8 bytes, got 0", write_tensors(b"")),
    "header longer than the file": (
        Reason.MALFORMED_TENSORS,
        "claims",
        write_tensors(struct.pack("<Q", 1 << 62) + b"{}"),
    ),
    "header not JSON": (Reason.MALFORMED_TENSORS, "not valid JSON", write_tensors(container(b"{nope}"))),
    "header of many lists": (
        Reason.MALFORMED_TENSORS,
        "expected at most 16384 tensors",
        write_tensors(container(b'{"a":[' + b"[]," * 600_000 + b"[]]}")),
    ),
    "config of many lists": (
        Reason.MALFORMED_CONFIG,
        "brackets",
        write_config(b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
    ),
    "header nested": (Reason.MALFORMED_TENSORS, "", write_tensors(container(NESTED))),
    "header a list": (Reason.MALFORMED_TENSORS, "expected the header to be an object", write_tensors(container([]))),
    "header of 100,000 entries": (
        Reason.MALFORMED_TENSORS,
        "expected a header of at most",
        write_tensors(container(MANY)),
    ),
    "header names a tensor twice": (
        Reason.MALFORMED_TENSORS,
        "twice",
        write_tensors(
            container(
                b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
                b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
            )
        ),
    ),
    "truncated": (Reason.MALFORMED_TENSORS, "the file has", truncate(100)),
    "trailing bytes": (
        Reason.MALFORMED_TENSORS,
        "the file has 5",
        write_tensors(container({"a": entry([1], 0, 4)}, b"x" * 5)),
    ),
    "hole": (
        Reason.MALFORMED_TENSORS,
        "should begin at byte 0",
        write_tensors(container({"a": entry([1], 4, 8)}, b"x" * 8)),
    ),
    "overlap": (
        Reason.MALFORMED_TENSORS,
        "should begin",
        write_tensors(container({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"x" * 12)),
    ),
    "shape does not fit its bytes": (
        Reason.MALFORMED_TENSORS,
        "need 400 bytes",
        write_tensors(container({"a": entry([100], 0, 4)}, b"x" * 4)),
    ),
    "shape overflows": (
        Reason.MALFORMED_TENSORS,
        "need",
        write_tensors(container({"a": entry([1 << 40, 1 << 40], 0, 4)}, b"x" * 4)),
    ),
    "negative shape": (
        Reason.MALFORMED_TENSORS,
        "natural",
        write_tensors(container({"a": entry([-1, -1], 0, 4)}, b"x" * 4)),
    ),
    "offsets backwards": (
        Reason.MALFORMED_TENSORS,
        "span -4",
        write_tensors(container({"a": entry([1], 4, 0)}, b"x" * 4)),
    ),
    "offsets not numbers": (
        Reason.MALFORMED_TENSORS,
        "offsets",
        write_tensors(container({"a": entry([1], "0", 4)}, b"x" * 4)),
    ),
    "entry without dtype": (
        Reason.MALFORMED_TENSORS,
        "expected exactly",
        write_tensors(container({"a": {"shape": []}})),
    ),
    "unprintable name": (Reason.MALFORMED_TENSORS, "printable", write_tensors(container({"\ud800": entry([0], 0, 0)}))),
    "int64": (Reason.UNSUPPORTED_DTYPE, "got 'I64'", set_tensor(f"{Q}.lora_A.weight", lambda t: t.long())),
    "float8": (
        Reason.UNSUPPORTED_DTYPE,
        "F8_E4M3",
        set_tensor(f"{Q}.lora_A.weight", lambda t: t.to(torch.float8_e4m3fn)),
    ),
    "NaN": (Reason.NOT_FINITE, f"{Q}.lora_A.weight", set_tensor(f"{Q}.lora_A.weight", nan)),
    "infinity": (Reason.NOT_FINITE, f"{Q}.lora_B.weight", set_tensor(f"{Q}.lora_B.weight", lambda t: t / 0)),
    "infinite in float32": (
        Reason.NOT_FINITE,
        f"{Q}.lora_A.weight",
        set_tensor(f"{Q}.lora_A.weight", lambda t: t.double() * 1e300),
    ),
    # names and shapes
    "unused tensor": (Reason.UNUSED_TENSOR, "surprise", add("base_model.model.surprise", 2)),
    "unused head": (Reason.UNSUPPORTED_SITE, "model.norm", add("base_model.model.model.norm.bias", 32)),
    "magnitude without use_dora": (Reason.UNUSED_TENSOR, "magnitude", add(f"{Q}.lora_magnitude_vector", 32)),
    "bias with bias none": (Reason.UNUSED_TENSOR, "base_layer.bias", add(f"{Q}.base_layer.bias", 32)),
    "adapter name in the key": (
        Reason.UNUSED_TENSOR,
        "lora_A.default.weight",
        rename(f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight"),
    ),
    "LoRA where nothing targets": (
        Reason.UNUSED_TENSOR,
        "lm_head",
        add("base_model.model.lm_head.lora_A.weight", 4, 32),
    ),
    "layer not in this base": (
        Reason.UNKNOWN_SITE,
        "layers.7",
        add("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", 4, 32),
    ),
    "embedding": (
        Reason.UNUSED_TENSOR,
        "lora_embedding_A",
        add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 96),
    ),
    "another base's head copy": (
        Reason.BASE_WEIGHT_DIFFERS,
        "q_proj.base_layer.weight",
        add(f"{Q}.base_layer.weight", 32, 32),
    ),
    "tensor missing": (Reason.MISSING_TENSOR, f"{Q}.lora_B.weight [32, any]", remove(f"{Q}.lora_B.weight")),
    "site missing": (Reason.MISSING_TENSOR, f"{Q}.lora_A.weight", remove(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")),
    "no tensors at all": (Reason.MISSING_TENSOR, "lora_A.weight", write_tensors(container({}))),
    "wrong width": (
        Reason.SHAPE_MISMATCH,
        "expected shape [any, 32] for this base, got [4, 48]",
        set_tensor(f"{Q}.lora_A.weight", lambda t: torch.zeros(4, 48)),
    ),
    "B transposed": (
        Reason.SHAPE_MISMATCH,
        "expected shape [32, any]",
        set_tensor(f"{Q}.lora_B.weight", lambda t: t.T),
    ),
    "three dimensions": (Reason.SHAPE_MISMATCH, "got [1, 4, 32]", set_tensor(f"{Q}.lora_A.weight", lambda t: t[None])),
    "zero rank": (Reason.SHAPE_MISMATCH, "got [0, 32]", set_tensor(f"{Q}.lora_A.weight", lambda t: t[:0])),
    "rank of one tensor": (
        Reason.RANK_MISMATCH,
        "expected rank 4 as the config says, got 3",
        set_tensor(f"{Q}.lora_A.weight", lambda t: t[:3]),
    ),
    "rank in the config": (Reason.RANK_MISMATCH, "expected rank 16", edit_config(r=16)),
    "rank by pattern": (Reason.RANK_MISMATCH, "expected rank 8", edit_config(rank_pattern={"q_proj": 8})),
    # fields
    "no method": (Reason.UNSUPPORTED_FORMAT, "field peft_type: expected ", edit_config(peft_type=None)),
    "unknown method": (Reason.UNSUPPORTED_METHOD, "got 'SORA'", edit_config(peft_type="SORA")),
    "method of lower case": (Reason.UNSUPPORTED_METHOD, "got 'lora'", edit_config(peft_type="lora")),
    "encoder-decoder": (Reason.UNSUPPORTED_TASK, "SEQ_2_SEQ_LM", edit_config(task_type="SEQ_2_SEQ_LM")),
    "unknown field": (Reason.UNSUPPORTED_FIELD, "field use_magic", edit_config(use_magic=True)),
    "unknown field of 0": (Reason.UNSUPPORTED_FIELD, "field magic", edit_config(magic=0)),
    "experts": (
        Reason.NO_SITES,
        "field target_parameters",
        edit_config(target_parameters=["experts.down_proj"]),
    ),
    "replicated layers": (Reason.UNSUPPORTED_FIELD, "field layer_replication", edit_config(layer_replication=[[0, 2]])),
    "weights replaced": (
        Reason.UNSUPPORTED_FIELD,
        "field init_lora_weights",
        edit_config(init_lora_weights="pissa_niter_4"),
    ),
    "DoRA without magnitudes": (Reason.MISSING_TENSOR, "lora_magnitude_vector [32]", edit_config(use_dora=True)),
    "bias of another kind": (Reason.INVALID_FIELD, "field bias: expected none, all", edit_config(bias="some")),
    "DoRA with lora_bias": (Reason.INVALID_FIELD, "lora_bias", edit_config(use_dora=True, lora_bias=True)),
    "rank 0": (Reason.INVALID_FIELD, "field r: expected a positive integer, got 0", edit_config(r=0)),
    "rank a text": (Reason.INVALID_FIELD, "got '4'", edit_config(r="4")),
    "rank true": (Reason.INVALID_FIELD, "got True", edit_config(r=True)),
    "alpha infinite": (Reason.INVALID_FIELD, "field lora_alpha", edit_config(lora_alpha=10**400)),
    "use_dora a number": (
        Reason.INVALID_FIELD,
        "field use_dora: expected true or false, got 1",
        edit_config(use_dora=1),
    ),
    "targets numbers": (Reason.INVALID_FIELD, "field target_modules", edit_config(target_modules=[1])),
    "targets nothing here": (Reason.NO_SITES, "c_attn", edit_config(target_modules="c_attn")),
    "targets an embedding without tensors": (
        Reason.MISSING_TENSOR,
        "embed_tokens.lora_embedding_A [any, 96]",
        edit_config(target_modules=["embed_tokens"]),
    ),
    "targets a norm": (Reason.UNSUPPORTED_SITE, "model.norm", edit_config(target_modules=["model.norm"])),
    "not a regular expression": (Reason.INVALID_FIELD, "regular expression", edit_config(target_modules="(q_proj")),
    "regular expression without end": (
        Reason.INVALID_FIELD,
        "too long",
        edit_config(target_modules=r"(.|.)*[A-Z]"),
    ),
    "pattern without end": (
        Reason.INVALID_FIELD,
        "too long",
        edit_config(rank_pattern={r"(.|.)*[A-Z]": 4}),
    ),
    "pattern of 1 MB": (Reason.INVALID_FIELD, "expected at most", edit_config(target_modules="a" * 900_000)),
    "500 patterns without end": (
        Reason.INVALID_FIELD,
        "too long",
        edit_config(alpha_pattern={rf"(.|.)*[A-Z]{i}": 4 for i in range(500)}),
    ),
    "20,000 patterns": (
        Reason.INVALID_FIELD,
        "at most 4096 positive integers",
        edit_config(rank_pattern={f"layers.{i}.q_proj": 4 for i in range(20_000)}),
    ),
    "layers with a regular expression": (
        Reason.INVALID_FIELD,
        "layers_to_transform",
        edit_config(target_modules=".*q_proj", layers_to_transform=[0]),
    ),
    "layers_pattern alone": (Reason.INVALID_FIELD, "layers_to_transform", edit_config(layers_pattern="layers")),
    "a field name that cannot be encoded": (Reason.UNSUPPORTED_FIELD, "\\ud800", edit_config(**{"\ud800": 1})),
}

PREFIX: dict[str, tuple[Reason, str, Damage]] = {
    "another length": (Reason.SHAPE_MISMATCH, "expected shape [6, 96]", edit_config(num_virtual_tokens=6)),
    "no length": (Reason.INVALID_FIELD, "num_virtual_tokens", edit_config(num_virtual_tokens=None)),
    "another depth": (Reason.SHAPE_MISMATCH, "num_layers: expected 3 for this base, got 4", edit_config(num_layers=4)),
    "other heads": (Reason.SHAPE_MISMATCH, "num_attention_heads: expected 2", edit_config(num_attention_heads=4)),
    "another width": (Reason.SHAPE_MISMATCH, "token_dim: expected 16", edit_config(token_dim=32)),
    "narrow": (Reason.SHAPE_MISMATCH, "got [5, 48]", set_tensor("prompt_embeddings", lambda t: t[:, :48])),
    "a head beside it": (Reason.UNSUPPORTED_TASK, "base_model.score.weight", add("base_model.score.weight", 3, 32)),
    "missing": (Reason.MISSING_TENSOR, "prompt_embeddings", write_tensors(container({}))),
    "two sides": (Reason.UNSUPPORTED_FIELD, "submodules", edit_config(num_transformer_submodules=2)),
    "NaN": (Reason.NOT_FINITE, "prompt_embeddings", set_tensor("prompt_embeddings", nan)),
    "LoRA's field": (Reason.UNSUPPORTED_FIELD, "field r ", edit_config(r=8)),
}


@pytest.mark.parametrize("case", LORA)
def test_broken_lora_is_refused(case, fixtures, llama, tmp_path):
    check_refused(fixtures / "peft/llama/lora", tmp_path / "adapter", llama, LORA[case])


@pytest.mark.parametrize("case", PREFIX)
def test_broken_prefix_is_refused(case, fixtures, llama, tmp_path):
    check_refused(fixtures / "peft/llama/prefix", tmp_path / "adapter", llama, PREFIX[case])


def test_dora_of_a_zero_row_is_refused(fixtures, load_base):
    """The norm has no epsilon: where W + s BA is zero, as in a padded vocabulary, PEFT itself computes NaN."""
    module = copy.deepcopy(load_base("llama"))
    files = read_adapter(fixtures / "peft/llama/lora_dora")
    module.get_parameter("model.layers.1.self_attn.q_proj.weight").data[3] = 0
    tensors = dict(files.tensors)
    tensors[f"{Q}.lora_B.weight"] = tensors[f"{Q}.lora_B.weight"].index_fill(0, torch.tensor([3]), 0.0)
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.self_attn\.q_proj") as refusal:
        lower(AdapterFiles(files.config, tensors, files.digest), TorchBase(module))
    assert refusal.value.reason == "NOT_FINITE"


def test_another_base_is_refused_before_its_tensors_are_read(fixtures, llama, tmp_path, monkeypatch):
    shutil.copytree(fixtures / "peft/qwen2/lora_bias_lora_only", tmp_path / "adapter")
    monkeypatch.setattr("peftmux.adapters.files.read_tensors", lambda *_: pytest.fail("the tensors were read"))
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(tmp_path / "adapter", llama)
    assert refusal.value.reason == "UNUSED_TENSOR"  # llama has no biases to replace


@pytest.mark.parametrize("value", [None, False, "", [], {}])
@pytest.mark.parametrize(
    "name", ["use_magic", "modules_to_save", "lora_alpha", "r", "bias", "task_type", "rank_pattern"]
)
def test_unset_values_are_accepted_whatever_the_name(name, value, fixtures, llama, tmp_path):
    """Each means PEFT's default; r's and alpha's are 8, so the ranks are spelled out."""
    shutil.copytree(fixtures / "peft/llama/lora_pissa", tmp_path / "adapter")
    edit_config(**{name: value})(tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter", llama).ranks == (8, 8)


def test_absent_fields_take_pefts_defaults(fixtures, llama, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(fixtures / "peft/llama/lora_pissa", folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    adapter = load_adapter(folder, llama)
    assert adapter.kind == "lora"
    assert adapter.applied_sites == 21
    assert {part.scale for part in adapter.parts.linear.values()} == {1.0}  # 8 / 8
    assert "target_modules" in adapter.warnings[0]


@pytest.mark.parametrize(
    "field",
    [
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": "someone/else"},
        {"lora_dropout": 0.3},
        {"inference_mode": False},
        {"peft_version": "9"},
        {"qalora_group_size": 16},
        {"runtime_config": {"x": 1}},
    ],
    ids=str,
)
def test_fields_without_effect_are_accepted(field, fixtures, llama, tmp_path):
    shutil.copytree(fixtures / "peft/llama/lora", tmp_path / "adapter")
    edit_config(**field)(tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter", llama).applied_sites == 21


def test_a_folder_is_planned_once(fixtures, llama, monkeypatch):
    planned = []

    def count(*arguments):
        planned.append(arguments)
        return plan_adapter(*arguments)

    monkeypatch.setattr("peftmux.adapters.lower.plan_adapter", count)
    load_adapter(fixtures / "peft/llama/lora", llama)
    assert len(planned) == 1
