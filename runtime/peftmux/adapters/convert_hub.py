"""AdapterHub's pickles to its own safetensors: `pytorch_*.bin` of a folder, under the names that it reads them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import CONFIG_FILE
from peftmux.adapters.hub_fields import HEAD_CONFIG, INTERFACE

ADAPTER = "pytorch_adapter.bin"
_PARTS = {
    ADAPTER: (CONFIG_FILE, "adapter.safetensors"),
    "pytorch_model_head.bin": (HEAD_CONFIG, "model_head.safetensors"),
}
"""Pickle -> (its config, what its tensors are written to)."""


def gather_hub(source: Path, unpickle: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, bytes]:
    """The converted folder's files by name. Raises AdapterInvalid."""
    files: dict[str, bytes] = {}
    for pickled, (config, tensors) in _PARTS.items():
        if not (source / pickled).is_file():
            continue
        if not (source / config).is_file():
            raise AdapterInvalid(Reason.MISSING_FILE, f"expected {config} beside {pickled}, found none")
        files[config] = (source / config).read_bytes()
        own = {name: tensor.detach().contiguous().clone() for name, tensor in unpickle(source / pickled).items()}
        files[tensors] = save(own, metadata={"format": "pt"})
    if (source / INTERFACE).is_file():
        files[INTERFACE] = (source / INTERFACE).read_bytes()
    return files
