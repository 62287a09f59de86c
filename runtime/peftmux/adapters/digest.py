"""An adapter's identity: sha256 over its canonical config and its tensors, never over paths, times or file layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftmux.adapters.tensorfile import byte_view

_UNORDERED = ("target_modules", "exclude_modules", "modules_to_save")
"""Lists that PEFT holds as sets, so that saving the same adapter twice may order them differently."""


def adapter_digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256. Tensors count by name, dtype, shape and bytes; nested objects by order (the first pattern wins)."""
    digest = hashlib.sha256(b"peftmux adapter 1")
    _add(digest, canonical_config(config).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        _add(digest, name.encode())
        _add(digest, f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        _add(digest, byte_view(tensor))
    return digest.hexdigest()


def canonical_config(config: Mapping[str, Any]) -> str:
    """The config as JSON, top-level fields sorted; the order inside a field is kept unless it has no meaning."""
    fields = {name: _canonical_field(name, config[name]) for name in sorted(config)}
    return json.dumps(fields, separators=(",", ":"))


def _canonical_field(name: str, value: Any) -> Any:
    if name in _UNORDERED and isinstance(value, list):
        return sorted(value, key=json.dumps)
    return value


def _add(digest: Any, data: bytes | memoryview) -> None:
    """Length first, so that no two different sequences of pieces give the same bytes."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
