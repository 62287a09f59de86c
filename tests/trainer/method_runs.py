"""What every method's whole runs must do, by method and its options; called by the tests of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer import train
from peftmux.trainer.methods import METHODS
from tests.trainer.lowered import lowered_logits
from tests.trainer.tiny_models import copy_task, random_ids, write_rows

QUICK = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "disable_tqdm": True}
Config = dict[str, Any]


def with_dropout(method: str, config: Config | None = None) -> Config:
    fields = METHODS[method].config_class.__dataclass_fields__
    return {**({"lora_dropout": 0.1} if "lora_dropout" in fields else {}), **(config or {})}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of every tensor file in the folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{file.relative_to(folder)}/{name}": t for file in files for name, t in load_file(file).items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_learns(
    method: str,
    base: Path,
    rows: Path,
    folder: Path,
    config: Config | None = None,
    untrained: float = 0.8,
    trained: float = 0.1,
    held_out: Path | None = None,
    options: Config | None = None,
) -> None:
    """The base does it when told "up"; an adapter learns to do it untold, within 80 steps with its defaults."""
    held_out = held_out or write_rows(folder / "eval.jsonl", copy_task(32, seed=1))
    run: Config = {"model": base, "data": rows, "eval_data": held_out, "out": folder / "a", "config": config or {}}
    run |= options or {}
    losses = []
    for steps, rate in ((1, {"learning_rate": 0.0}), (80, {})):
        training = {"max_steps": steps, "per_device_train_batch_size": 16, "disable_tqdm": True, **rate}
        losses.append(train(method, **run, training=training, overwrite=True).metrics["eval_loss"])
    assert losses[0] > untrained, "untrained it cannot do it"
    assert losses[1] < trained, losses


def check_files_give_the_models_logits(
    method: str, kind: str, base: Path, plain: Any, rows: Path, folder: Path, config: Config | None = None
) -> None:
    """plain: the base, loaded once more."""
    result = train(method, model=base, data=rows, out=folder / "a", config=config or {}, training=QUICK)
    adapter = load_adapter(folder / "a", TorchBase(plain))
    assert (adapter.kind, adapter.digest) == (kind, result.digest)
    ids = random_ids()
    with torch.no_grad():
        ours = result.model(input_ids=ids).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(ours, lowered_logits(plain, adapter, ids), rtol=0, atol=1e-5)


def check_seeds(method: str, base: Path, rows: Path, folder: Path, config: Config | None = None) -> None:
    """The same seed gives the same bits, another one others."""
    own = with_dropout(method, config)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(method, model=base, data=rows, out=folder / name, config=own, training={**QUICK, "seed": seed})
    assert_equal(tensors(folder / "a"), tensors(folder / "b"))
    first, other = tensors(folder / "a"), tensors(folder / "c")
    assert first.keys() != other.keys() or not all(torch.equal(first[name], other[name]) for name in first)


def check_whole_runs(
    method: str, base: Path, plain: Any, rows: Path, folder: Path, config: Config | None = None
) -> None:
    """What is written gives the trained model's logits (plain: the base, loaded once more); seeds; interruptions."""
    for name in ("files", "seeds", "resumes"):
        (folder / name).mkdir()
    check_files_give_the_models_logits(method, method, base, plain, rows, folder / "files", config)
    check_seeds(method, base, rows, folder / "seeds", config)
    check_resumes(method, base, rows, folder / "resumes", config)


class StopAt(TrainerCallback):
    """Ends a run in the middle, as a lost machine would, after its checkpoint was written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def check_resumes(
    method: str, base: Path, rows: Path, folder: Path, config: Config | None = None, options: Config | None = None
) -> None:
    """Interrupted and resumed, it ends with the bits of a whole run."""
    run: Config = {"model": base, "data": rows, "config": with_dropout(method, config), **(options or {})}
    train(method, **run, out=folder / "whole", training=QUICK)
    saving = {**QUICK, "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        train(method, **run, out=folder / "cut", training=saving, callbacks=[StopAt()])
    assert not (folder / "cut").exists()
    result = train(method, **run, out=folder / "cut", training=saving, resume=True)
    assert result.steps == 6
    assert_equal(tensors(folder / "cut"), tensors(folder / "whole"))
