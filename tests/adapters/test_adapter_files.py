"""Reading and writing adapter folders: identity, atomicity, and files that are not what they were a moment ago."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from peftmux.adapters.digest import adapter_digest
from peftmux.adapters.errors import AdapterInvalid, Reason, SourceForbidden, SourceNotFound
from peftmux.adapters.files import open_adapter, read_adapter
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.writer import write_adapter

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"], "rank_pattern": {"b": 1, "a": 2}}
TENSORS = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def folder(fixtures, tmp_path):
    return Path(shutil.copytree(fixtures / "peft/llama/lora", tmp_path / "adapter"))


def test_reads_what_safetensors_reads(fixtures):
    for path in fixtures.glob("peft/*/*/adapter_model.safetensors"):
        files = read_adapter(path.parent)
        expected = load_file(path)
        assert files.tensors.keys() == expected.keys()
        assert all(torch.equal(files.tensors[name], expected[name]) for name in expected)
        assert files.config == json.loads((path.parent / "adapter_config.json").read_text())


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle(length, tmp_path):
    """0x80 and a protocol's number: small adapters have such lengths."""
    write_adapter(tmp_path, CONFIG, TENSORS)
    path = tmp_path / "adapter_model.safetensors"
    raw = path.read_bytes()
    (old,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(struct.pack("<Q", length) + raw[8 : 8 + old].ljust(length) + raw[8 + old :])
    assert read_adapter(tmp_path).tensors.keys() == TENSORS.keys()


def test_digest_is_the_contents(folder, tmp_path):
    digest = read_adapter(folder).digest
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    os.utime(moved / "adapter_model.safetensors", (0, 0))
    config = json.loads((moved / "adapter_config.json").read_text())
    config["target_modules"].reverse()  # PEFT holds it as a set
    (moved / "adapter_config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert read_adapter(moved).digest == digest
    config["lora_alpha"] += 1
    (moved / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(moved).digest != digest


def test_digest_keeps_the_order_of_patterns():
    """The first pattern that matches wins, so their order is content."""
    swapped = CONFIG | {"rank_pattern": {"a": 2, "b": 1}}
    assert adapter_digest(CONFIG, TENSORS) != adapter_digest(swapped, TENSORS)


small = st.integers(1, 3)
tensor_sets = st.dictionaries(
    st.sampled_from(["a", "b", "ab", "c.d"]),
    st.tuples(small, small, st.sampled_from([torch.float32, torch.float16]), st.integers(0, 3)),
    max_size=3,
)
configs = st.dictionaries(
    st.sampled_from(["r", "bias", "x"]), st.one_of(st.integers(0, 3), st.text(max_size=2)), max_size=3
)


def build(spec):
    return {
        name: torch.full((rows, columns), float(v), dtype=dtype) for name, (rows, columns, dtype, v) in spec.items()
    }


@settings(max_examples=200, deadline=None)
@given(configs, tensor_sets, configs, tensor_sets)
def test_digest_equal_exactly_when_content_is(config, spec, other_config, other_spec):
    digest, other = adapter_digest(config, build(spec)), adapter_digest(other_config, build(other_spec))
    assert (digest == other) == ((config, spec) == (other_config, other_spec))
    assert digest == adapter_digest(dict(reversed(config.items())), dict(reversed(build(spec).items())))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_corruption_raises_anything_else(data, fixtures, tmp_path_factory, llama):
    """Any bytes changed anywhere in either file: still the same adapter in kind, or one documented error."""
    source = fixtures / "peft/llama/prefix"
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    raw = bytearray((source / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 300)))
        raw[at] = data.draw(st.integers(0, 255))
    damaged = tmp_path_factory.getbasetemp() / "corrupt"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(source, damaged)
    (damaged / name).write_bytes(raw)
    try:
        outcome = load_adapter(damaged, llama).kind
    except AdapterInvalid as error:
        outcome = error.reason
    assert outcome in ["prefix", *Reason]


def test_write_then_read(tmp_path):
    strided = {"x": torch.arange(6.0).view(3, 2).T, "shared": TENSORS["x"], "y": TENSORS["y"]}
    config = CONFIG | {"target_modules": {"v", "q"}}
    digest = write_adapter(tmp_path / "a" / "b", config, strided, extra_files={"README.md": "hello"})
    files = read_adapter(tmp_path / "a" / "b")
    assert files.digest == digest
    assert files.config == CONFIG
    assert list(files.config["rank_pattern"]) == ["b", "a"]
    assert torch.equal(files.tensors["x"], strided["x"])
    assert (tmp_path / "a/b/README.md").read_text() == "hello"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b"]


def test_writing_over_keeps_other_files_and_replaces_the_adapter(tmp_path):
    write_adapter(tmp_path / "a", CONFIG, TENSORS)
    (tmp_path / "a/train.log").write_text("kept")
    write_adapter(tmp_path / "a", CONFIG | {"r": 3}, {"x": TENSORS["x"] + 1})
    files = read_adapter(tmp_path / "a")
    assert files.config["r"] == 3
    assert files.tensors.keys() == {"x"}
    assert (tmp_path / "a/train.log").read_text() == "kept"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails_at", range(8))
def test_a_failed_write_leaves_the_old_adapter_or_none(fails_at, existing, tmp_path, monkeypatch):
    """Whichever file operation fails, a reader finds the old content, the new, or no adapter: never a mixture."""
    folder = tmp_path / "a"
    old = write_adapter(folder, CONFIG, TENSORS) if existing else None
    new = adapter_digest(CONFIG | {"r": 9}, {"x": TENSORS["x"] * 2})
    calls = 0

    def sometimes(operation):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                raise OSError(28, "No space left on device")
            return operation(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, sometimes(getattr(os, name)))
    with contextlib.suppress(OSError):
        write_adapter(folder, CONFIG | {"r": 9}, {"x": TENSORS["x"] * 2})
    monkeypatch.undo()
    try:
        found = read_adapter(folder).digest
    except AdapterInvalid as error:
        found = error.reason
    except SourceNotFound:
        found = "no folder"
    assert found in ({old, new, "MISSING_FILE"} if existing else {new, "no folder"})
    assert [p.name for p in tmp_path.iterdir() if p.name != "a"] == []


@pytest.mark.parametrize("name", ["../x", "a/b", "adapter_config.json", "", ".."])
def test_extra_files_stay_in_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match="plain file name"):
        write_adapter(tmp_path / "a", CONFIG, TENSORS, extra_files={name: "x"})
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.replace(path.parent / "new", path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("change", [rewrite, replace, Path.unlink, lambda p: os.truncate(p, 9)], ids=range(4))
def test_changed_while_loading(name, change, folder):
    with open_adapter(folder) as adapter:
        change(folder / name)
        with pytest.raises(AdapterInvalid) as refusal:
            adapter.read()
    assert refusal.value.reason == "CHANGED_WHILE_LOADING"


def test_links_inside_are_followed_and_links_out_are_not(folder, tmp_path):
    os.rename(folder / "adapter_model.safetensors", folder / "blob")
    os.symlink("blob", folder / "adapter_model.safetensors")  # as Kubernetes and the Hugging Face cache lay files out
    assert len(read_adapter(folder).tensors) == 42
    os.rename(folder / "blob", tmp_path / "blob")
    os.unlink(folder / "adapter_model.safetensors")
    os.symlink(tmp_path / "blob", folder / "adapter_model.safetensors")
    with pytest.raises(SourceForbidden, match="leaves"):
        read_adapter(folder)
    assert len(read_adapter(folder, root=tmp_path).tensors) == 42


def test_no_such_folder(tmp_path):
    with pytest.raises(SourceNotFound):
        read_adapter(tmp_path / "nothing")


def test_size_limit_holds_before_anything_is_read(folder):
    with (
        pytest.raises(AdapterInvalid, match="expected at most 1000 bytes") as refusal,
        open_adapter(folder, max_bytes=1000),
    ):
        pass
    assert refusal.value.reason == "TOO_LARGE"


def test_a_huge_file_for_another_base_costs_no_memory(fixtures, llama, tmp_path):
    """Ten sparse gigabytes with a header to match: refused by shape before any of them is read."""
    folder = Path(shutil.copytree(fixtures / "peft/llama/prefix", tmp_path / "adapter"))
    entry = {"dtype": "F32", "shape": [5, 1 << 29], "data_offsets": [0, 5 << 31]}
    header = json.dumps({"prompt_embeddings": entry}).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + (5 << 31))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterInvalid, match=r"expected shape \[5, 96\] for this base, got \[5, 536870912\]"):
        load_adapter(folder, llama)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
