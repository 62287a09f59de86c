"""A trained adapter as PEFT's files, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from peftmux.adapters.aside import folder_aside, put_in_place
from peftmux.adapters.errors import AdapterError
from peftmux.adapters.files import read_adapter
from peftmux.adapters.writer import write_adapter, write_files
from peftmux.trainer.files.outputs import adapter_name, published_place
from peftmux.trainer.methods import AttachedAdapter

_LORA_FIELDS: Mapping[str, object] = {
    "alora_invocation_tokens": None,
    "bias": "none",
    "exclude_modules": None,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "target_parameters": None,
    "trainable_token_indices": None,
}
_FIELDS: Mapping[object, Mapping[str, object]] = {"LORA": _LORA_FIELDS, "ADALORA": _LORA_FIELDS}
"""What PEFT writes for a peft_type beside what the method decides."""


def adapter_config(adapter: AttachedAdapter, base_model: str) -> dict[str, object]:
    """adapter_config.json as PEFT reads it. Which layers are adapted is spelled out in `target_modules`."""
    own = adapter.peft_config()
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM",
        **_FIELDS.get(own["peft_type"], {}),
        **own,
    }


def export_adapter(adapter: AttachedAdapter, base_model: str, folder: str | Path, card: str) -> str:
    """Write the folder in one step, `card` as its README.md. Returns the digest of config and tensors."""
    files = adapter.folder(base_model)
    if files is not None:
        write_files(folder, {**files, "README.md": card.encode()})
        return read_adapter(folder).digest
    return write_adapter(
        folder, adapter_config(adapter, base_model), adapter.tensors(), extra_files={"README.md": card}
    )


def is_published(folder: str | Path, directory: str | Path) -> bool:
    """Whether `publish` has put what is in `folder` into `directory`, under its own last name."""
    target = published_place(directory, adapter_name(folder))
    return target.is_dir() and _digest(target) == _digest(Path(folder))


def _digest(folder: Path) -> str:
    try:
        return read_adapter(folder).digest
    except AdapterError:
        return ""


def publish(folder: str | Path, directory: str | Path, name: str = "") -> Path:
    """Copy a finished adapter into `directory`, under `name` or its own last name: a watcher sees all of it or nothing.

    An older adapter of that name is replaced, and nothing else. The copy is made beside it, under a name that begins
    with a dot. Raises OptionError for a name that no server takes.
    """
    source, target = Path(folder), published_place(directory, name or adapter_name(folder))
    if target.resolve() == source.resolve():  # it was written where it is to be
        return target
    with folder_aside(target) as aside:
        shutil.copytree(source, aside / "new")
        put_in_place(aside, target)
    return target
