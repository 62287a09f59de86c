"""Broken ladders: each is refused with its reason, saying expected and got; and what a good one costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.adapters.compose import obstacle
from peftmux.adapters.cost import cost
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.lower import load_adapter, plan_adapter, served_kinds
from tests.adapters.damage import Damage, add, check_refused, edit_config, nan, remove, rename, set_tensor
from tests.model.ladders import ladder_fields, ladder_tensors
from tests.model.mixtures import write

RUNG = "ladder.rungs.1."
ATTENTION = f"{RUNG}block.self_attn."
UP, GATE = "ladder.up.weight", f"{RUNG}gate"
FIELDS: dict[str, tuple[Reason, str, Damage]] = {
    "no heads": (Reason.INVALID_FIELD, "num_attention_heads", edit_config(num_attention_heads=None)),
    "heads a text": (Reason.INVALID_FIELD, "num_attention_heads", edit_config(num_attention_heads="2")),
    "a negative number of heads": (Reason.INVALID_FIELD, "num_attention_heads", edit_config(num_attention_heads=-2)),
    "key heads that do not divide": (Reason.INVALID_FIELD, "a divisor of 4", edit_config(num_key_value_heads=3)),
    "more key heads": (Reason.INVALID_FIELD, "num_key_value_heads", edit_config(num_key_value_heads=8)),
    "key heads of other files": (Reason.SHAPE_MISMATCH, "k_proj", edit_config(num_key_value_heads=1)),
    "heads that do not divide": (
        Reason.SHAPE_MISMATCH,
        "each of the 5 heads",
        edit_config(num_attention_heads=5, num_key_value_heads=None),
    ),
    "odd heads": (Reason.SHAPE_MISMATCH, "even", edit_config(num_attention_heads=8, num_key_value_heads=None)),
    "a layer the base lacks": (Reason.INVALID_FIELD, "layers below 3", edit_config(layers=[0, 3])),
    "a layer twice": (Reason.INVALID_FIELD, "distinct", edit_config(layers=[1, 1])),
    "one layer": (Reason.INVALID_FIELD, "a list of layer numbers", edit_config(layers=1)),
    "a negative layer": (Reason.INVALID_FIELD, "layers", edit_config(layers=[-1])),
    "fewer layers than files": (Reason.UNUSED_TENSOR, "rungs.1.", edit_config(layers=[0, 2])),
    "an activation": (Reason.INVALID_FIELD, "gelu", edit_config(hidden_act="swoosh")),
    "an activation in a list": (Reason.INVALID_FIELD, "hidden_act", edit_config(hidden_act=["silu"])),
    "a merge": (Reason.INVALID_FIELD, "merge", edit_config(merge="mean")),
    "a temperature of zero": (Reason.INVALID_FIELD, "temperature", edit_config(temperature=0)),
    "a negative temperature": (Reason.INVALID_FIELD, "temperature", edit_config(temperature=-0.1)),
    "an infinite temperature": (Reason.INVALID_FIELD, "temperature", edit_config(temperature=1e39)),
    "an epsilon of zero": (Reason.INVALID_FIELD, "rms_norm_eps", edit_config(rms_norm_eps=0)),
    "a theta of zero": (Reason.INVALID_FIELD, "rope_theta", edit_config(rope_theta=0)),
    "a gate that is not there": (Reason.MISSING_TENSOR, "ladder.merge_gate", edit_config(merge="gate")),
    "a scaled rotation": (Reason.UNSUPPORTED_FIELD, "rope_scaling", edit_config(rope_scaling={"factor": 2.0})),
    "another block": (Reason.UNSUPPORTED_FIELD, "block_type", edit_config(block_type="t5")),
    "saved modules": (Reason.UNSUPPORTED_FIELD, "modules_to_save", edit_config(modules_to_save=["lm_head"])),
    "a seq2seq task": (Reason.UNSUPPORTED_TASK, "SEQ_2_SEQ_LM", edit_config(task_type="SEQ_2_SEQ_LM")),
}
TENSORS: dict[str, tuple[Reason, str, Damage]] = {
    "no first projection": (Reason.MISSING_TENSOR, "ladder.first.weight", remove("ladder.first.weight")),
    "no gate": (Reason.MISSING_TENSOR, GATE, remove(GATE)),
    "no keys": (Reason.MISSING_TENSOR, "k_proj", remove(f"{ATTENTION}k_proj.weight")),
    "no norm": (Reason.MISSING_TENSOR, "input_layernorm", remove(f"{RUNG}block.input_layernorm.weight")),
    "no way up": (Reason.MISSING_TENSOR, UP, remove(UP)),
    "a bias without its weight": (
        Reason.MISSING_TENSOR,
        f"{RUNG}down.weight",
        rename(f"{RUNG}down.weight", f"{RUNG}down.bias"),
    ),
    "another stream": (
        Reason.SHAPE_MISMATCH,
        "[10, 32]",
        set_tensor(f"{RUNG}down.weight", lambda t: t[:, 1:]),
    ),
    "another first stream": (Reason.SHAPE_MISMATCH, "32]", set_tensor("ladder.first.weight", lambda t: t[:, 1:])),
    "another width": (Reason.SHAPE_MISMATCH, "[32, 9]", set_tensor("ladder.first.weight", lambda t: t[1:])),
    "another final state": (Reason.SHAPE_MISMATCH, "[32, 10]", set_tensor(UP, lambda t: t[1:])),
    "a gate for each value": (Reason.SHAPE_MISMATCH, GATE, set_tensor(GATE, lambda t: t.repeat(10))),
    "a gate that is a number": (Reason.SHAPE_MISMATCH, GATE, set_tensor(GATE, lambda t: t.squeeze())),
    "values that are not keys": (
        Reason.SHAPE_MISMATCH,
        "v_proj",
        set_tensor(f"{ATTENTION}v_proj.weight", lambda t: t.repeat(2, 1)),
    ),
    "queries turned round": (
        Reason.SHAPE_MISMATCH,
        "q_proj",
        set_tensor(f"{ATTENTION}q_proj.weight", lambda t: t.T[:, :9]),
    ),
    "no size at all": (Reason.SHAPE_MISMATCH, "gate_proj", add(f"{RUNG}block.mlp.gate_proj.weight", 0, 10)),
    "a bias too long": (Reason.SHAPE_MISMATCH, "ladder.first.bias", add("ladder.first.bias", 33)),
    "one bias alone": (Reason.UNUSED_TENSOR, "ladder.up.bias", add("ladder.up.bias", 32)),
    "one bias missing": (Reason.MISSING_TENSOR, "ladder.up.bias", add("ladder.first.bias", 10)),
    "a bias of a norm": (Reason.UNUSED_TENSOR, "ladder.norm.bias", add("ladder.norm.bias", 10)),
    "a gate that nothing merges": (Reason.UNUSED_TENSOR, "ladder.merge_gate", add("ladder.merge_gate", 1)),
    "a fourth rung": (Reason.UNUSED_TENSOR, "ladder.rungs.3.gate", add("ladder.rungs.3.gate", 1)),
    "a low rank": (Reason.UNUSED_TENSOR, "lora_A", add("base_model.model.lm_head.lora_A.weight", 2, 32)),
    "NaN": (Reason.NOT_FINITE, UP, set_tensor(UP, nan)),
    "an infinite gate": (Reason.NOT_FINITE, GATE, set_tensor(GATE, lambda t: t * torch.inf)),
}
LADDER = FIELDS | TENSORS


def save_ladder(folder: Path, **fields: Any) -> Path:
    """For the Llama fixture: a stream of 32 and three layers."""
    torch.manual_seed(1)
    config = ladder_fields(**{"num_attention_heads": 4, "num_key_value_heads": 2, **fields})
    return write(folder, config, ladder_tensors(config, 32, 32, [0, 1, 2]))


@pytest.mark.parametrize("case", LADDER)
def test_broken_ladders_are_refused(case: str, llama: Any, tmp_path: Path) -> None:
    good = save_ladder(tmp_path / "good")
    check_refused(good, tmp_path / "adapter", llama, LADDER[case])


def test_a_good_one_and_its_cost(llama: Any, tmp_path: Path) -> None:
    """Side width 10, 4 heads and 2 key heads of 6, a feed-forward of 14."""
    adapter = load_adapter(save_ladder(tmp_path / "good", temperature=0.2, dropout=0.1), llama)
    matrices = 10 * 32 + 3 * (10 * 32 + 10 * (24 + 12 + 12 + 24 + 3 * 14)) + 32 * 10
    vectors = 10 + 3 * (1 + 10 + 10)
    assert (adapter.kind, adapter.parameters) == ("ladder", matrices + vectors)
    assert "Ladder" in obstacle(adapter), "it is no term of a weighted sum"
    for dtype in (torch.float32, torch.bfloat16):
        needed = cost(adapter, dtype)
        assert needed.parts == {"Ladder": 1}
        assert needed.flops == 2 * matrices + vectors
        assert needed.cache == 3 * 2 * 2 * 6 * dtype.itemsize


class Unchained:
    """A base whose layers read something else than what the one before them gives."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self.stream_layers = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def test_a_base_without_a_stream(llama: Any, tmp_path: Path) -> None:
    config = ladder_fields(num_attention_heads=4)
    shapes = {name: tuple(t.shape) for name, t in ladder_tensors(config, 32, 32, [0, 1, 2]).items()}
    plan_adapter(config, shapes, llama)
    base: Any = Unchained(llama)
    with pytest.raises(AdapterInvalid, match="decoder layers") as error:
        plan_adapter(config, shapes, base)
    assert error.value.reason == Reason.UNSUPPORTED_SITE
    assert "ladder" in served_kinds(llama)
    assert "ladder" not in served_kinds(base)
