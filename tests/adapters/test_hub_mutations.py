"""Every field of every config of AdapterHub's, with values of every kind: the same parts, or a clean refusal."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from peftmux.adapters.convert import convert_adapter
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase

FOLDERS = ("fusion", "houlsby_double_seq_bn", "ia3", "lora", "pfeiffer_with_head", "prefix_tuning_flat")
ABSENT = object()
VALUES: tuple[Any, ...] = (
    *(ABSENT, None, True, False, 0, 1, -1, 2.5, 10**30),
    *("", "q", "gelu", "\ud83d", "adapters.1.0.0"),
    *([], [0], ["q"], ["b", "a"], [[1]], [None]),
    *({}, {"a": 1}, {"0": None}, {"q": {"q": []}}),
)
MEANT = {
    ("adapter_config.json", "config", name)
    for name in ("alpha", "scaling", "non_linearity", "original_ln_before", "is_parallel")
} | {
    ("adapter_config.json", "", "version"),
    ("head_config.json", "config", "activation_function"),
    ("head_config.json", "config", "label2id"),
    ("adapter_fusion_config.json", "", "adapter_names"),
}
"""What the parts depend on and the tensors do not tell: another value there may be another adapter, or, where it is a
fusion's names, the same in another order."""


def described(value: Any) -> Any:
    """Parts, comparable."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, Mapping):
        return {name: described(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    if dataclasses.is_dataclass(value):
        return [(f.name, described(getattr(value, f.name))) for f in dataclasses.fields(value)]
    return value


def places(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(the object's name, the field's) of every field, and of ones that are not there."""
    own = config["config"] if isinstance(config["config"], dict) else {}
    yield from (("", name) for name in (*config, "from_the_future", "peft_type", "adapter_names"))
    yield from (("config", name) for name in (*own, *(("from_the_future", "architecture") if own else ())))


def mutated(config: dict[str, Any], where: str, field: str, value: Any) -> dict[str, Any]:
    """A copy with another value; the same object where it would be no other."""
    inside = config[where] if where else config
    old = inside.get(field, ABSENT)
    if old is value or (type(old) is type(value) and old == value):
        return config
    rest = {name: kept for name, kept in inside.items() if name != field}
    changed = rest if value is ABSENT else {**rest, field: value}
    return {**config, where: changed} if where else changed


@pytest.fixture
def folder(request, fixtures: Path, tmp_path: Path) -> Path:
    source, copy = fixtures / "adapterhub/llama" / request.param, tmp_path / "copy"
    if any(source.glob("*.bin")):
        convert_adapter(source, copy)
    else:
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    return copy


def loaded(folder: Path, base: TorchBase) -> Any:
    """What the adapter is; None where it is refused."""
    try:
        adapter = load_adapter(folder, base)
    except AdapterInvalid as refusal:
        message = str(refusal)
        assert 0 < len(message) < 1100
        message.encode()
        return None
    return adapter.kind, described(adapter.parts)


@pytest.mark.parametrize("folder", FOLDERS, indirect=True)
def test_each_field(folder: Path, llama: TorchBase):
    expected, tried, refused = loaded(folder, llama), 0, 0
    assert expected is not None
    for path in sorted(folder.rglob("*_config.json")):
        if path.parent.name == "b":
            continue  # as the first of the fused adapters
        raw = path.read_bytes()
        config = json.loads(raw)
        for where, field in places(config):
            for value in VALUES:
                changed = mutated(config, where, field, value)
                if changed is config:
                    continue
                path.write_text(json.dumps(changed))
                found = loaded(folder, llama)
                tried, refused = tried + 1, refused + (found is None)
                if (path.name, where, field) not in MEANT:
                    assert found in (None, expected), (path.name, where, field, value)
        path.write_bytes(raw)
    assert loaded(folder, llama) == expected
    assert tried > 400
    assert refused > tried / 4


@pytest.mark.parametrize("folder", ["fusion", "pfeiffer_with_head", "lora"], indirect=True)
def test_several_at_once_are_no_crash(folder: Path, llama: TorchBase):
    draws = random.Random(7)
    configs = {path: json.loads(path.read_bytes()) for path in sorted(folder.rglob("*_config.json"))}
    for _ in range(150):
        for path, config in configs.items():
            changed = config
            for where, field in draws.sample(list(places(config)), 2):
                if isinstance(changed.get(where), dict) or not where:
                    changed = mutated(changed, where, field, draws.choice(VALUES))
            path.write_text(json.dumps(changed))
        loaded(folder, llama)
    for path, config in configs.items():
        path.write_text(json.dumps(config))
    assert loaded(folder, llama) is not None
