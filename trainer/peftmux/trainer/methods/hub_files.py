"""Adapters in the folders of AdapterHub's library, as `peftmux.adapters.hub` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from peftmux.adapters.files import CONFIG_FILE
from peftmux.trainer.methods.task_head import TaskHead

VERSION = "adapters.1.3.0"
"""Whose form it is."""
_HEAD_TYPES = {"sequence": "classification", "token": "tagging"}


def hub_files(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], base: Mapping[str, object], head: TaskHead | None
) -> dict[str, bytes]:
    """One adapter's files by name. config: the outer one; base: what both configs say of the base model."""
    files = {CONFIG_FILE: _json({**base, **config, "version": VERSION}), "adapter.safetensors": _tensors(tensors)}
    return files if head is None else {**files, **head_files(str(config["name"]), base, head)}


def head_files(name: str, base: Mapping[str, object], head: TaskHead) -> dict[str, bytes]:
    own = {
        "activation_function": None,
        "bias": head.bias is not None,
        "dropout_prob": None,
        "head_type": _HEAD_TYPES[head.kind],
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "layers": 1,
        "num_labels": len(head.labels),
        "use_pooler": False,
    }
    tensors = {f"heads.{name}.1.{part}": parameter for part, parameter in head.named_parameters()}
    return {
        "head_config.json": _json({**base, "config": own, "name": name, "version": VERSION}),
        "model_head.safetensors": _tensors(tensors),
    }


def fusion_files(
    names: list[str], tensors: Mapping[str, Tensor], base: Mapping[str, object], head: TaskHead | None
) -> dict[str, bytes]:
    own = {
        "dropout_prob": None,
        **dict.fromkeys(("key", "query", "value", "value_before_softmax"), True),
        **dict.fromkeys(("query_before_ln", "residual_before", "temperature"), False),
        **dict.fromkeys(("regularization", "value_initialized"), True),
    }
    config = {**base, "adapter_names": names, "config": own, "name": ",".join(names), "version": VERSION}
    files = {"adapter_fusion_config.json": _json(config), "model_adapter_fusion.safetensors": _tensors(tensors)}
    if head is not None:
        files |= head_files(",".join(names), base, head)
    return {f"fusion/{name}": data for name, data in files.items()}


def base_fields(model: Any, base_model: str) -> dict[str, object]:
    """What the library's configs say of the base."""
    config = model.config.get_text_config()
    return {
        "hidden_size": config.hidden_size,
        "model_class": type(model).__name__,
        "model_name": base_model,
        "model_type": model.config.model_type,
    }


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()})


def _json(config: Mapping[str, object]) -> bytes:
    return json.dumps(dict(sorted(config.items())), indent=2, allow_nan=False).encode()
