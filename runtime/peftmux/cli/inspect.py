"""`peftmux adapters inspect`: read, lowered and laid out for the device as by a server, without one."""

from __future__ import annotations

from typing import Any

import torch

from peftmux.adapters.cost import cost
from peftmux.adapters.errors import AdapterError, AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import LoweredAdapter
from peftmux.cli.errors import CommandError
from peftmux.runtime.engine.factory import BLOCK_SIZE
from peftmux.runtime.engine.placement import PreparedAdapter, prepare
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.load import load_model
from peftmux.runtime.model.loaded import LoadedModel


def inspect_adapter(path: str, name: str) -> dict[str, Any]:
    """What the folder is and costs over the base model `name`. CommandError where a server would refuse either."""
    try:
        model = load_model(name, device=torch.device("cpu"))
        lowered = load_adapter(path, model)
        return _describe(lowered, prepare(model, lowered, BLOCK_SIZE), model)
    except AdapterInvalid as error:
        raise CommandError(f"{error.reason}: {error}") from error
    except (AdapterError, UnsupportedModel) as error:
        raise CommandError(str(error)) from error


def _describe(adapter: LoweredAdapter, prepared: PreparedAdapter, model: LoadedModel) -> dict[str, Any]:
    low, high = adapter.ranks
    needed = cost(adapter, model.dtype)
    return {
        "loads": True,
        "kind": adapter.kind,
        "lowers_to": [f"{count} {part}" for part, count in sorted(needed.parts.items())],
        "bytes": prepared.size,
        "flops_per_token": needed.flops + needed.virtual_tokens * model.flops_per_key,
        "cache_bytes_per_token": needed.cache,
        "revision": adapter.digest,
        "min_rank": low,
        "max_rank": high,
        "virtual_tokens": needed.virtual_tokens,
        "labels": list(adapter.parts.head.labels) if adapter.parts.head else [],
        "applied_sites": adapter.applied_sites,
        "tensors": adapter.tensors,
        "parameters": adapter.parameters,
        "warnings": list(adapter.warnings),
        "sites": sorted(adapter.parts.places),
    }
