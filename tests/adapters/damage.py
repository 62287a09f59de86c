"""Ways to break an adapter folder, and the check that a broken one is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.lower import load_adapter

SECONDS = 2.0
"""Of this process, so that a busy machine does not count."""
Damage = Callable[[Path], object]
"""Breaks the adapter folder it is given."""


def edit_config(**fields: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps(config))

    return change


def write_config(raw: bytes) -> Damage:
    return lambda folder: (folder / "adapter_config.json").write_bytes(raw)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "adapter_model.safetensors")

    return rewrite


def set_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: make(tensors[name])}))


def write_tensors(raw: bytes) -> Damage:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(raw)


def container(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def truncate(by: int) -> Damage:
    def cut(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-by])

    return cut


def pickled(name: str) -> Damage:
    def replace(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / name)

    return replace


def pickled_in_disguise(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.safetensors")


def pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def nan(t: torch.Tensor) -> torch.Tensor:
    return t.index_fill(0, torch.tensor([0]), float("nan"))


def remove(*names: str) -> Damage:
    return edit_tensors(lambda tensors: [tensors.pop(name) for name in names])


def add(name: str, *shape: int) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))


def rename(old: str, new: str) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def check_refused(good: Path, folder: Path, base: Any, case: tuple[Reason, str, Damage]) -> None:
    reason, piece, damage = case
    shutil.copytree(good, folder)
    damage(folder)
    start = time.process_time()
    with pytest.raises(AdapterInvalid) as refusal:
        load_adapter(folder, base)
    assert time.process_time() - start < SECONDS
    message = str(refusal.value)
    assert (refusal.value.reason, piece in message) == (reason, True), message
    assert len(message) < 1100
    message.encode()
    assert str(folder) not in message
