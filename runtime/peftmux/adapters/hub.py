"""AdapterHub's folders, opened as one adapter: its files under names of ours, one config over all of them.

One adapter: `adapter_config.json` {"config": {...}, "name": ...}, `adapter.safetensors`, and its head's
`head_config.json` and `model_head.safetensors` where there is one. A fusion: `adapter_fusion_config.json` and
`model_adapter_fusion.safetensors`, perhaps with a head's files, in the folder itself or in `fusion/`, beside one folder
for each adapter. A file of these names that nothing would read is refused.

The config that follows is {"peft_type": "ADAPTERHUB", "adapters": {name: ...}, "heads": {name: ...}, "interfaces":
{name: ...}, "fusion": ..., "fusion_head": ...}; tensors are named `adapter/NAME/...`, `head/NAME/...`, `fusion/...` and
`fusion_head/...`.
"""

from __future__ import annotations

import re
from typing import Any

from peftmux.adapters.config import show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import CONFIG_FILE, FolderReader, OpenAdapter, OpenFile
from peftmux.adapters.hub_fields import FUSION_CONFIG, HEAD_CONFIG, INTERFACE, in_todays_names

PEFT_TYPE = "ADAPTERHUB"
_TENSORS, _HEAD_TENSORS, _FUSION_TENSORS = (
    "adapter.safetensors",
    "model_head.safetensors",
    "model_adapter_fusion.safetensors",
)
CONFIGS = (CONFIG_FILE, HEAD_CONFIG, FUSION_CONFIG)
TENSORS = (_TENSORS, _HEAD_TENSORS, _FUSION_TENSORS)
"""Which nothing but this reads: none may stand in a folder unread."""
_HEAD_PICKLE = "pytorch_model_head.bin"
_FUSION_FOLDERS = ("", "fusion/")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MAX_FUSED = 64


def is_hub_config(config: dict[str, Any]) -> bool:
    return "peft_type" not in config and "config" in config


def find_fusion(reader: FolderReader) -> str | None:
    """Where the fusion's files are in the folder; None where it has none."""
    return next((place for place in _FUSION_FOLDERS if reader.has(f"{place}{FUSION_CONFIG}")), None)


def open_single(reader: FolderReader, config_file: OpenFile, config: dict[str, Any]) -> OpenAdapter:
    opened = _Opened(reader)
    opened.adapter("", _name(config.get("name"), CONFIG_FILE), config_file, config)
    return opened.close()


def open_fusion(reader: FolderReader, place: str) -> OpenAdapter:
    opened = _Opened(reader)
    opened.fusion(place)
    for name in fused_names(opened.config["fusion"]):
        file, config = reader.config(f"{name}/{CONFIG_FILE}")
        if config.get("name") != name:
            raise AdapterInvalid(
                Reason.MALFORMED_CONFIG,
                f"field name of {name}/{CONFIG_FILE}: expected {name!r}, got {show(config.get('name'))}",
            )
        opened.adapter(f"{name}/", name, file, config)
    return opened.close()


class _Opened:
    """The files of a folder as they are opened, one after the other."""

    def __init__(self, reader: FolderReader) -> None:
        self._reader = reader
        self._members: list[Any] = []
        self._read: set[str] = set()
        self._places = dict.fromkeys(_FUSION_FOLDERS)
        self.config: dict[str, Any] = {"peft_type": PEFT_TYPE, "adapters": {}, "heads": {}, "interfaces": {}}

    def adapter(self, place: str, name: str, file: OpenFile, config: dict[str, Any]) -> None:
        self.config["adapters"][name] = in_todays_names(config)
        self._member(f"adapter/{name}/", file, place, CONFIG_FILE, _TENSORS)
        if self._reader.has(f"{place}{INTERFACE}"):
            self.config["interfaces"][name] = self._reader.config(f"{place}{INTERFACE}")[1]
        if (head := self._head(place, f"head/{name}/")) is not None:
            self.config["heads"][name] = head

    def fusion(self, place: str) -> None:
        file, self.config["fusion"] = self._reader.config(f"{place}{FUSION_CONFIG}")
        self._member("fusion/", file, place, FUSION_CONFIG, _FUSION_TENSORS)
        if (head := self._head(place, "fusion_head/")) is not None:
            self.config["fusion_head"] = head

    def close(self) -> OpenAdapter:
        """Raises AdapterInvalid where a file stands that nothing has read."""
        for place in self._places:
            left = [name for name in (*CONFIGS, *TENSORS) if self._left(f"{place}{name}")]
            if self._reader.has(f"{place}{_HEAD_PICKLE}") and f"{place}{HEAD_CONFIG}" not in self._read:
                left.append(_HEAD_PICKLE)
            if left:
                beside = f" (expected {HEAD_CONFIG} beside it)" if left[0] in (_HEAD_TENSORS, _HEAD_PICKLE) else ""
                raise AdapterInvalid(
                    Reason.UNUSED_TENSOR, f"expected every file to be used, but nothing reads {place}{left[0]}{beside}"
                )
        return OpenAdapter(self.config, tuple(self._members))

    def _left(self, path: str) -> bool:
        return path not in self._read and self._reader.has(path)

    def _head(self, place: str, prefix: str) -> dict[str, Any] | None:
        if not self._reader.has(f"{place}{HEAD_CONFIG}"):
            return None
        file, config = self._reader.config(f"{place}{HEAD_CONFIG}")
        self._member(prefix, file, place, HEAD_CONFIG, _HEAD_TENSORS)
        return config

    def _member(self, prefix: str, file: OpenFile, place: str, config: str, tensors: str) -> None:
        self._members.append(self._reader.member(prefix, file, f"{place}{tensors}"))
        self._read |= {f"{place}{config}", f"{place}{tensors}"}
        self._places[place] = None


def fused_names(fusion: dict[str, Any]) -> list[str]:
    """The names of the fused adapters, in their order, by a fusion's config. Each is a plain folder's name. Raises
    AdapterInvalid."""
    whole = fusion.get("name")
    if not isinstance(whole, str) or not whole:
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG, f"field name of {FUSION_CONFIG}: expected a text, got {show(whole)}"
        )
    names = fusion.get("adapter_names", whole.split(","))
    if not isinstance(names, list) or not 1 <= len(names) <= _MAX_FUSED:
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG,
            f"field adapter_names of {FUSION_CONFIG}: expected 1 to {_MAX_FUSED} names, got {show(names)}",
        )
    checked = [_name(name, FUSION_CONFIG, "adapter_names") for name in names]
    if len(set(checked)) != len(checked):
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG,
            f"field adapter_names of {FUSION_CONFIG}: expected each adapter once, got {show(names)}",
        )
    return checked


def _name(name: Any, file: str, field: str = "name") -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG,
            f"field {field} of {file}: expected letters, digits, _, . and -, got {show(name)}",
        )
    return name
