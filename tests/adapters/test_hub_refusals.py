"""AdapterHub's folders that contradict themselves, or say what is not served: each is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.files import MAX_CONFIG_BYTES
from peftmux.adapters.lower import load_adapter
from tests.adapters.damage import Damage, check_refused

CONFIG, HEAD, FUSION = "adapter_config.json", "head_config.json", "fusion/adapter_fusion_config.json"
DOWN = "model.layers.1.mlp.down_proj.loras.a"


def outer(file: str = CONFIG, **fields: Any) -> Damage:
    """Other fields around the config of a file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def inner(file: str = CONFIG, **fields: Any) -> Damage:
    """Other fields in the config of a file."""

    def change(folder: Path) -> None:
        path = folder / file
        whole = json.loads(path.read_text())
        path.write_text(json.dumps(whole | {"config": whole["config"] | fields}))

    return change


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def change(folder: Path) -> None:
        found = load_file(folder / file)
        edit(found)
        save_file(found, folder / file)

    return change


def also(*damages: Damage) -> Damage:
    def change(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return change


def gone(*names: str) -> Damage:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def with_head(place: str, scale: float = 1.0, **fields: Any) -> Damage:
    """A classification head in a sub-folder; named as what stands there."""
    source = Path(__file__).parent.parent / "fixtures/adapterhub/llama/pfeiffer_with_head"

    def change(folder: Path) -> None:
        for name in (HEAD, "model_head.safetensors"):
            shutil.copy(source / name, folder / place / name)
        tensors(f"{place}/model_head.safetensors", lambda found: [t.mul_(scale) for t in found.values()])(folder)
        inner(f"{place}/{HEAD}", **fields)(folder)

    return change


def bare_head(place: str) -> Damage:
    return also(with_head(place), gone(f"{place}/{HEAD}"))


MALFORMED, FIELD, UNSUPPORTED = Reason.MALFORMED_CONFIG, Reason.INVALID_FIELD, Reason.UNSUPPORTED_FIELD
UNUSED, MISSING = Reason.UNUSED_TENSOR, Reason.MISSING_TENSOR

LORA: dict[str, tuple[Reason, str, Damage]] = {
    "one matrix less": (UNUSED, "v_proj.loras.a.lora_B: expected none", inner(attn_matrices=["q"])),
    "one matrix more": (MISSING, "attn_matrices ['q', 'k', 'v'] in block 0", inner(attn_matrices=["q", "k", "v"])),
    "no attention": (Reason.NO_SITES, "intermediate_lora or output_lora", inner(selfattn_lora=False)),
    "no matrix": (Reason.NO_SITES, "attn_matrices", inner(attn_matrices=[])),
    "intermediate": (MISSING, "intermediate_lora True in block 0", inner(intermediate_lora=True)),
    "output": (MISSING, "output_lora True in block 0", inner(output_lora=True)),
    "a block left out": (UNUSED, "layers.1.self_attn.q_proj", inner(leave_out=[1])),
    "a rank": (Reason.SHAPE_MISMATCH, "expected shape [32, 5]", inner(r=5)),
    "half of a pair": (
        MISSING,
        "lora_A",
        tensors("adapter.safetensors", lambda found: found.pop("model.layers.0.self_attn.q_proj.loras.a.lora_A")),
    ),
    "a layer that no field names": (
        Reason.UNKNOWN_SITE,
        "self_attn.o_proj",
        tensors(
            "adapter.safetensors",
            lambda found: found.update(
                {
                    "model.layers.0.self_attn.o_proj.loras.a.lora_A": torch.ones(4, 32),
                    "model.layers.0.self_attn.o_proj.loras.a.lora_B": torch.ones(32, 4),
                }
            ),
        ),
    ),
    "matrices as a text": (FIELD, "attn_matrices", inner(attn_matrices="qv")),
    "matrices as a number": (FIELD, "attn_matrices", inner(attn_matrices=2)),
    "nested matrices": (FIELD, "attn_matrices", inner(attn_matrices=[["q"], ["v"]])),
    "another matrix": (FIELD, "attn_matrices", inner(attn_matrices=["q", "v", "o"])),
    "a rank as a text": (FIELD, "field r:", inner(r="4")),
    "no alpha": (FIELD, "field alpha:", inner(alpha=None)),
    "dora": (UNSUPPORTED, "use_dora", inner(use_dora=True)),
    "gating": (UNSUPPORTED, "use_gating", inner(use_gating=True)),
    "vera": (UNSUPPORTED, "vera_d", inner(vera_d=0.1)),
    "an unknown field": (UNSUPPORTED, "from_the_future", inner(from_the_future=3)),
    "an unknown field around": (UNSUPPORTED, "from_the_future of adapter_config.json", outer(from_the_future=3)),
    "a version that says nothing": (FIELD, "field version", outer(version="adapters.next")),
    "another base's width": (FIELD, "hidden_size of adapter_config.json: expected 32", outer(hidden_size=64)),
}
IA3: dict[str, tuple[Reason, str, Damage]] = {
    "a rank": (FIELD, "field r: expected 1 with composition_mode scale, got 2", inner(r=2)),
    "as a sum": (MISSING, "lora_A", inner(composition_mode="add")),
    "no intermediate": (UNUSED, "down_proj", inner(intermediate_lora=False)),
    "output for intermediate": (UNUSED, "down_proj", inner(intermediate_lora=False, output_lora=True)),
    "another mode": (FIELD, "composition_mode", inner(composition_mode="both")),
    "a block less": (
        MISSING,
        "intermediate_lora True in block 1",
        tensors("adapter.safetensors", lambda found: found.pop(f"{DOWN}.lora_B")),
    ),
}
BOTTLENECK: dict[str, tuple[Reason, str, Damage]] = {
    "another size": (FIELD, "reduction_factor: expected 32 / 4 in layer 0", inner(reduction_factor=2)),
    "another size in one layer": (
        FIELD,
        "reduction_factor: expected 32 / 4 in layer 1",
        inner(reduction_factor={"default": 8, "1": 4}),
    ),
    "no size for a layer": (FIELD, "in layer 1", inner(reduction_factor={"0": 8})),
    "a size as a text": (FIELD, "reduction_factor", inner(reduction_factor="8")),
    "no size": (FIELD, "reduction_factor", inner(reduction_factor=0)),
    "a flag as a number": (FIELD, "field mh_adapter: expected true or false", inner(mh_adapter=0)),
    "after the addition": (UNSUPPORTED, "residual_before_ln", inner(residual_before_ln="post_add")),
    "across": (UNSUPPORTED, "cross_adapter", inner(cross_adapter=True)),
    "no config": (MALFORMED, "field config of adapter_config.json: expected an object", outer(config="pfeiffer")),
}
CLASSES: dict[str, tuple[Reason, str, Damage]] = {
    "no config beside the head": (UNUSED, "model_head.safetensors (expected head_config.json", gone(HEAD)),
    "no head beside its config": (Reason.MISSING_FILE, "model_head.safetensors", gone("model_head.safetensors")),
    "a pickled head alone": (
        UNUSED,
        "pytorch_model_head.bin (expected head_config.json",
        also(gone(HEAD, "model_head.safetensors"), lambda f: (f / "pytorch_model_head.bin").write_bytes(b"\x80")),
    ),
    "another name": (MISSING, "heads.zz.1.weight", outer(HEAD, name="zz")),
    "no name": (MALFORMED, "field name of head_config.json", outer(HEAD, name=None)),
    "a list": (MALFORMED, "field config of head_config.json", outer(HEAD, config=[1])),
    "no object": (MALFORMED, "head_config.json: expected an object, got list", lambda f: (f / HEAD).write_text("[]")),
    "an unknown field": (UNSUPPORTED, "from_the_future of head_config.json", inner(HEAD, from_the_future=3)),
    "an unknown field around": (UNSUPPORTED, "from_the_future of head_config.json", outer(HEAD, from_the_future=3)),
    "several labels at once": (UNSUPPORTED, "head_type", inner(HEAD, head_type="multilabel_classification")),
    "one layer": (UNUSED, "heads.a.4.weight", inner(HEAD, layers=1, num_labels=32, label2id=None)),
    "one label less": (Reason.SHAPE_MISMATCH, "heads.a.4.weight", inner(HEAD, num_labels=2, label2id=None)),
    "labels twice": (FIELD, "label2id", inner(HEAD, label2id={"a": 0, "b": 0, "c": 2})),
    "no bias": (UNUSED, "heads.a.4.bias", inner(HEAD, bias=False)),
    "a pooler": (UNSUPPORTED, "use_pooler", inner(HEAD, use_pooler=True)),
    "an activation": (UNSUPPORTED, "activation_function", inner(HEAD, activation_function="tanhx")),
    "its base's width": (FIELD, "hidden_size of head_config.json", outer(HEAD, hidden_size=64)),
    "a fusion without config": (
        UNUSED,
        "model_adapter_fusion.safetensors",
        lambda f: shutil.copy(f / "adapter.safetensors", f / "model_adapter_fusion.safetensors"),
    ),
}
FUSED: dict[str, tuple[Reason, str, Damage]] = {
    "parallel adapters": (
        UNSUPPORTED,
        "is_parallel: expected false in a fusion",
        also(*(inner(f"{n}/{CONFIG}", is_parallel=True, original_ln_before=False) for n in "ab")),
    ),
    "what they read": (UNSUPPORTED, "to read the same", inner(f"b/{CONFIG}", original_ln_before=False)),
    "where they stand": (
        UNSUPPORTED,
        "at the same branches",
        also(
            inner(f"b/{CONFIG}", leave_out=[0]),
            tensors(
                "b/adapter.safetensors",
                lambda found: [found.pop(name) for name in list(found) if name.startswith("model.layers.0.")],
            ),
        ),
    ),
    "another method": (
        Reason.UNSUPPORTED_METHOD,
        "architecture",
        inner(f"b/{CONFIG}", architecture="lora"),
    ),
    "an unknown field of an adapter": (UNSUPPORTED, "from_the_future", inner(f"b/{CONFIG}", from_the_future=3)),
    "an unknown field": (UNSUPPORTED, "from_the_future of adapter_fusion_config", inner(FUSION, from_the_future=3)),
    "an unknown field around": (UNSUPPORTED, "from_the_future", outer(FUSION, from_the_future=3)),
    "a config by name": (MALFORMED, "field config of adapter_fusion_config", outer(FUSION, config="dynamic")),
    "a config as a list": (MALFORMED, "field config of adapter_fusion_config", outer(FUSION, config=[1])),
    "a config as a number": (MALFORMED, "field config of adapter_fusion_config", outer(FUSION, config=7)),
    "no config": (MALFORMED, "field config of adapter_fusion_config", outer(FUSION, config=None)),
    "a temperature": (UNSUPPORTED, "temperature of adapter_fusion_config", inner(FUSION, temperature=True)),
    "no values": (UNSUPPORTED, "field value of adapter_fusion_config", inner(FUSION, value=False)),
    "a flag as a text": (FIELD, "field query of adapter_fusion_config", inner(FUSION, query="yes")),
    "no name": (MALFORMED, "field name of adapter_fusion_config", outer(FUSION, name=5)),
    "another order": (MISSING, "adapter_fusion_layer.b,a", outer(FUSION, name="b,a")),
    "an adapter twice": (MALFORMED, "adapter_names", outer(FUSION, adapter_names=["a", "a"])),
    "an adapter's other name": (MALFORMED, "field name of b/adapter_config.json", outer(f"b/{CONFIG}", name="c")),
    "two heads": (UNUSED, "of adapter a and adapter b", also(with_head("a"), with_head("b", -1.0))),
    "two heads of other labels": (
        UNUSED,
        "of adapter a and adapter b",
        also(with_head("a"), with_head("b", label2id={"x": 0, "y": 1, "z": 2})),
    ),
    "its head without a config": (UNUSED, "fusion/model_head.safetensors", bare_head("fusion")),
    "an adapter's head without a config": (UNUSED, "b/model_head.safetensors", bare_head("b")),
    "an adapter in the folder itself": (
        UNUSED,
        "nothing reads adapter_config.json",
        lambda f: shutil.copy(f / "a" / CONFIG, f),
    ),
}
FOLDERS = {
    "lora": LORA,
    "ia3": IA3,
    "pfeiffer_seq_bn": BOTTLENECK,
    "pfeiffer_with_head": CLASSES,
    "fusion": FUSED,
}


@pytest.mark.parametrize(("folder", "case"), [(folder, case) for folder, cases in FOLDERS.items() for case in cases])
def test_refused(folder, case, fixtures, llama, tmp_path):
    check_refused(fixtures / "adapterhub/llama" / folder, tmp_path / "broken", llama, FOLDERS[folder][case])


@pytest.mark.parametrize(
    ("file", "content"),
    [("adapter.safetensors", b"[" * 100), ("head_config.json", b" " * (MAX_CONFIG_BYTES + 1))],
    ids=["tensors", "config"],
)
def test_the_file_that_is_broken_is_named(file, content, fixtures, llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(fixtures / "adapterhub/llama/pfeiffer_with_head", broken)
    (broken / file).write_bytes(content)
    with pytest.raises(AdapterInvalid, match=rf"^{file}: "):
        load_adapter(broken, llama)
