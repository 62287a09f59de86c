"""AdapterHub's folders, opened as one adapter: its files under names of ours, one config over all of them.

One adapter: `adapter_config.json` {"config": {...}, "name": ...}, `adapter.safetensors`, and its head's
`head_config.json` and `model_head.safetensors` where there is one. A fusion: `adapter_fusion_config.json` and
`model_adapter_fusion.safetensors`, in the folder itself or in `fusion/`, beside one folder for each adapter.

The config that follows is {"peft_type": "ADAPTERHUB", "adapters": {name: ...}, "heads": {name: ...}, "fusion": ...};
tensors are named `adapter/NAME/...`, `head/NAME/...` and `fusion/...`.
"""

from __future__ import annotations

import re
from typing import Any

from peftmux.adapters.config import show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import CONFIG_FILE, FolderReader, OpenAdapter, OpenFile

PEFT_TYPE = "ADAPTERHUB"
_TENSORS = "adapter.safetensors"
_HEAD_CONFIG, _HEAD_TENSORS = "head_config.json", "model_head.safetensors"
_FUSION_CONFIG, _FUSION_TENSORS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
_FUSION_FOLDERS = ("", "fusion/")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MAX_FUSED = 64


def is_hub_config(config: dict[str, Any]) -> bool:
    return "peft_type" not in config and isinstance(config.get("config"), dict)


def find_fusion(reader: FolderReader) -> str | None:
    """Where the fusion's files are in the folder; None where it has none."""
    return next((place for place in _FUSION_FOLDERS if reader.has(f"{place}{_FUSION_CONFIG}")), None)


def open_single(reader: FolderReader, config_file: OpenFile, config: dict[str, Any]) -> OpenAdapter:
    name = _name(config.get("name"))
    members = [reader.member(f"adapter/{name}/", config_file, _TENSORS)]
    heads = {}
    if reader.has(_HEAD_CONFIG):
        head_file, heads[name] = reader.config(_HEAD_CONFIG)
        members.append(reader.member(f"head/{name}/", head_file, _HEAD_TENSORS))
    return OpenAdapter({"peft_type": PEFT_TYPE, "adapters": {name: config}, "heads": heads}, tuple(members))


def open_fusion(reader: FolderReader, place: str) -> OpenAdapter:
    fusion_file, fusion = reader.config(f"{place}{_FUSION_CONFIG}")
    members = [reader.member("fusion/", fusion_file, f"{place}{_FUSION_TENSORS}")]
    names = fusion.get("adapter_names") or str(fusion.get("name") or "").split(",")
    if not isinstance(names, list) or not 1 <= len(names) <= _MAX_FUSED:
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{_FUSION_CONFIG}: expected adapter_names, got {show(names)}")
    adapters, heads = {}, {}
    for name in map(_name, names):
        file, adapters[name] = reader.config(f"{name}/{CONFIG_FILE}")
        members.append(reader.member(f"adapter/{name}/", file, f"{name}/{_TENSORS}"))
        if reader.has(f"{name}/{_HEAD_CONFIG}"):
            head_file, heads[name] = reader.config(f"{name}/{_HEAD_CONFIG}")
            members.append(reader.member(f"head/{name}/", head_file, f"{name}/{_HEAD_TENSORS}"))
    if len(adapters) != len(names):
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG, f"{_FUSION_CONFIG}: expected each adapter once, got {show(names)}"
        )
    config = {"peft_type": PEFT_TYPE, "adapters": adapters, "heads": heads, "fusion": fusion}
    return OpenAdapter(config, tuple(members))


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG, f"field name: expected letters, digits, _, . and -, got {show(name)}"
        )
    return name
