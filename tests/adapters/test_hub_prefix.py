"""AdapterHub's prefix, a pickle: converted offline, then served with its first real token at position 0."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from peftmux.adapters.convert import convert_adapter
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from tests.engine.harness import ask_all, load, request, running
from tests.parity.test_parity_served import table

FOLDER = "adapterhub/llama/prefix_tuning_flat"
SIZE = 5


@pytest.fixture
def converted(fixtures: Path, tmp_path: Path) -> Path:
    convert_adapter(fixtures / FOLDER, tmp_path / "root" / "prefix")
    return tmp_path / "root" / "prefix"


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"] |= fields
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> None:
    path = folder / "adapter.safetensors"
    tensors = {n: change(t) if n.startswith(only) else t for n, t in load_file(path).items()}
    save_file({n: t.clone() for n, t in tensors.items()}, path)


@torch.no_grad()
def by_hand(module: Any, stored: torch.Tensor, ids: torch.Tensor, first_position: int) -> torch.Tensor:
    """[rows, T, V] with keys and values [n, layers, (key, value), heads, dim] in a cache of transformers' own."""
    config, (rows, length) = module.config, ids.shape
    view = stored.view(SIZE, config.num_hidden_layers, 2, config.num_key_value_heads, -1)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        k, v = (view[:, layer, i].transpose(0, 1).expand(rows, -1, -1, -1).contiguous() for i in (0, 1))
        cache.update(k, v, layer)
    positions = torch.arange(first_position, first_position + length).expand(rows, -1)
    mask = torch.ones(rows, SIZE + length, dtype=torch.long)
    logits: torch.Tensor = module(
        input_ids=ids, past_key_values=cache, position_ids=positions, attention_mask=mask
    ).logits
    return logits


def test_the_fixture_computes_the_expected_logits(converted, fixtures, llama, load_base, adapted_logits):
    adapter = load_adapter(converted, llama)
    expected = load_file(fixtures / FOLDER / "expected.safetensors")
    logits = adapted_logits(load_base("llama"), adapter, expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=5e-5, rtol=0)
    assert adapter.kind == "prefix"
    assert adapter.tensors == 5  # four copies, and the output projection that AdapterHub saves with every adapter
    assert {p.name for p in converted.iterdir()} == {
        "adapter_config.json",
        "adapter.safetensors",
        "head_config.json",
        "model_head.safetensors",
    }


async def test_real_tokens_start_at_position_zero(converted, load_base):
    """With values that matter: the fixture's are those of an untrained prefix."""
    rewrite(converted, lambda t: t * 60)
    stored = next(iter(load_file(converted / "adapter.safetensors").values()))
    prompts = [[5, 9, 17, 33, 60, 7, 8], [44, 12, 80]]
    module = load_base("llama")
    async with running(adapters_root=str(converted.parent), block_size=4) as engine:
        await load(engine, "prefix")
        wanted = [request(ids, "prefix", 1, prompt_logprobs=96) for ids in prompts * 2]
        for ids, answer in zip(prompts * 2, await ask_all(engine, wanted), strict=True):
            at = {p: by_hand(module, stored, torch.tensor([ids]), p)[0].log_softmax(-1)[:-1] for p in (0, SIZE)}
            torch.testing.assert_close(table(answer), at[0], atol=3e-4, rtol=0)
            assert (at[0] - at[SIZE]).abs().max() > 1e-2, "the position would be invisible"


@pytest.mark.parametrize(
    ("change", "reason", "piece"),
    [
        (lambda f: edit(f, prefix_length=4), "SHAPE_MISMATCH", "expected shape [384]"),
        (lambda f: edit(f, flat=False), "UNSUPPORTED_FIELD", "flat"),
        (lambda f: edit(f, use_gating=True), "UNSUPPORTED_FIELD", "use_gating"),
        (lambda f: edit(f, leave_out=[1]), "UNSUPPORTED_FIELD", "leave_out"),
        (lambda f: edit(f, architecture="union", configs=[{}]), "UNSUPPORTED_METHOD", "UniPELT"),
        (lambda f: rewrite(f, lambda t: t + 1, "model.layers.1"), "UNUSED_TENSOR", "copy"),
        (lambda f: rewrite(f, lambda t: t[:-1]), "SHAPE_MISMATCH", "[480]"),
        (lambda f: rewrite(f, lambda t: t / 0), "NOT_FINITE", "control_trans"),
        (lambda f: save_file({"x": torch.zeros(480)}, f / "adapter.safetensors"), "MISSING_TENSOR", "control_trans"),
    ],
)
def test_broken_ones_are_refused(change, reason, piece, converted, llama):
    change(converted)
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(converted, llama)
    assert (refusal.value.reason, piece in str(refusal.value)) == (reason, True), str(refusal.value)


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


def test_only_tensors_are_converted(fixtures, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(fixtures / FOLDER, source)
    (source / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": _Runs()}))
    with pytest.raises(AdapterInvalid, match="expected a pickle of tensors"):
        convert_adapter(source, tmp_path / "out")
    assert "it ran" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    (source / "adapter_config.json").unlink()
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json beside pytorch_adapter\.bin"):
        convert_adapter(source, tmp_path / "out")
