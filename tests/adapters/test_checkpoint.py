"""A base whose checkpoint lacks weights is refused, not filled with random numbers; pickles are converted offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftmux.adapters.checkpoint import UnusableCheckpoint, load_checkpoint
from peftmux.adapters.convert import convert_adapter
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import read_adapter
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.load import load_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
GONE = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(FIXTURES / "base" / "llama", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[GONE]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_weight_is_named(lacking: Path) -> None:
    with pytest.raises(UnusableCheckpoint, match=GONE.replace(".", r"\.")):
        load_checkpoint(str(lacking))
    with pytest.raises(UnsupportedModel, match=GONE.replace(".", r"\.")):
        load_model(str(lacking), device=torch.device("cpu"))


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_whole_checkpoints_load_tied_or_not(base: str) -> None:
    assert load_checkpoint(str(FIXTURES / "base" / base)).num_parameters() > 0


def test_a_folder_that_is_not_there_is_said() -> None:
    with pytest.raises(UnusableCheckpoint, match="no folder"):
        load_checkpoint("./no/such/base")


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_a_base_without_a_tokenizer_has_none(base: str, tmp_path: Path) -> None:
    """transformers makes one of special tokens alone of Qwen's kind, which would read every text as nothing."""
    folder = tmp_path / "base"
    shutil.copytree(FIXTURES / "base" / base, folder, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    assert load_model(str(folder), device=torch.device("cpu")).tokenizer is None


def test_a_converted_pickle_is_the_adapter(tmp_path: Path) -> None:
    origin = FIXTURES / "peft" / "llama" / "lora"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(origin / "adapter_config.json", pickled)
    torch.save(load_file(origin / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    digest = convert_adapter(pickled, tmp_path / "converted")
    assert digest == read_adapter(origin).digest == read_adapter(tmp_path / "converted").digest


class _Anything:
    pass


@pytest.mark.parametrize("content", [{"a": _Anything()}, [1, 2], {"a": 3}])
def test_other_pickles_are_not_converted(tmp_path: Path, content: object) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save(content, pickled / "adapter_model.bin")
    with pytest.raises(AdapterInvalid) as caught:
        convert_adapter(pickled, tmp_path / "converted")
    assert caught.value.reason == Reason.MALFORMED_TENSORS
    assert not (tmp_path / "converted").exists()
