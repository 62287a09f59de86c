"""An adapter that replaces another: killed anywhere, one of them is whole for whoever writes or clears up next."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from peftmux.adapters.aside import folder_aside, in_use, remove_leftovers
from peftmux.adapters.hub_fields import INTERFACE
from peftmux.adapters.writer import write_files

Files = Mapping[str, bytes]
KEPT = {"notes.txt": b"mine", "runs/events": b"mine", "h1/mine": b"mine"}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LORA = {"README.md": b"lora", TENSORS: b"lora", CONFIG: b"lora"}
OTHER = {"README.md": b"other", TENSORS: b"other", CONFIG: b"other"}
HEADED = {
    "README.md": b"headed",
    CONFIG: b"headed",
    "adapter.safetensors": b"headed",
    "head_config.json": b"headed",
    INTERFACE: b"headed",
}
FUSION = {
    "README.md": b"fusion",
    "fusion/adapter_fusion_config.json": json.dumps({"name": "h1,h2"}).encode(),
    "fusion/model_adapter_fusion.safetensors": b"fusion",
    **{f"h{i}/{name}": b"fusion" for i in (1, 2) for name in (CONFIG, "adapter.safetensors")},
}
PAIRS = {
    "lora by lora": (LORA, OTHER),
    "lora by one with a head": (LORA, HEADED),
    "head by lora": (HEADED, LORA),
    "fusion by lora": (FUSION, LORA),
    "lora by fusion": (LORA, FUSION),
    "fusion by fusion": (FUSION, {**FUSION, "h1/adapter.safetensors": b"new"}),
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def killed(at: int, action: Callable[[], object]) -> bool:
    """In a process of its own that is killed before its change number `at` to the file system; False: it has ended."""
    child = os.fork()
    if child == 0:
        left = at

        def counted(operation: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return operation(*args, **kwargs)

            return call

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def everywhere(folder: Path, old: Files, action: Callable[[], object]) -> Iterator[int]:
    """Each end of a process that was killed in `action` on a folder that held `old`."""
    for at in range(1000):
        target = folder / str(at) / "a"
        put(target, {**KEPT, **old})
        os.chdir(target)
        if not killed(at, action):
            return
        yield at


@pytest.fixture(autouse=True)
def _back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_of_two_is_whole_wherever_the_process_is_killed(pair: str, tmp_path: Path):
    old, new = PAIRS[pair]
    found, ends = [], 0
    for _ in everywhere(tmp_path, old, lambda: write_files(".", new)):
        ends += 1
        here = Path.cwd()
        visible = {name for name in content(here) if not name.startswith(".")}
        assert KEPT.keys() <= visible
        remove_leftovers(here)
        found.append(content(here))
        assert found[-1] in ({**KEPT, **old}, {**KEPT, **new})
        assert [path.name for path in here.parent.iterdir()] == ["a"]
    assert ends > 10
    assert found[0] == {**KEPT, **old}
    assert found[-1] == {**KEPT, **new}
    assert content(Path.cwd()) == {**KEPT, **new}
    assert sorted(path.name for path in Path.cwd().iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("pair", ["fusion by lora", "lora by one with a head"])
def test_clearing_up_can_be_killed_too(pair: str, tmp_path: Path):
    old, new = PAIRS[pair]
    for first in everywhere(tmp_path, old, lambda: write_files(".", new)):
        for second in range(0, 100, 3):
            if not killed(second, lambda: remove_leftovers(Path.cwd())):
                break
        remove_leftovers(Path.cwd())
        assert content(Path.cwd()) in ({**KEPT, **old}, {**KEPT, **new}), first


def test_the_next_to_write_puts_what_was_cut_off_in_place(tmp_path: Path):
    for _ in everywhere(tmp_path, LORA, lambda: write_files(".", OTHER)):
        with folder_aside(Path.cwd()):  # as a sweep
            assert content(Path.cwd()) in ({**KEPT, **LORA}, {**KEPT, **OTHER})
        write_files(".", FUSION)
        assert content(Path.cwd()) == {**KEPT, **FUSION}


def test_a_fusions_members_go_with_it(tmp_path: Path):
    put(tmp_path / "a", {**FUSION, "h1/mine": b"mine", "h3/adapter_config.json": b"another's"})
    put(tmp_path, {"elsewhere/adapter_config.json": b"another's"})
    config = json.dumps({"name": "h1,h2,link,..", "adapter_names": ["h1", "h2", "link"]}).encode()
    put(tmp_path / "a", {"fusion/adapter_fusion_config.json": config})
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    write_files(tmp_path / "a", LORA)
    assert content(tmp_path / "elsewhere") == {"adapter_config.json": b"another's"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*LORA, "h1", "h3", "link"}
    assert {name for name in content(tmp_path / "a") if "/" in name} >= {"h1/mine", "h3/adapter_config.json"}


@pytest.mark.parametrize("config", [b"", b"{}", b'{"name": "../b,b"}', b"\xff", b'{"adapter_names": ["../b"]}'])
def test_what_only_looks_like_a_fusion_loses_nothing_else(config: bytes, tmp_path: Path):
    put(tmp_path, {"b/adapter_config.json": b"another's", "a/b/adapter_config.json": b"another's"})
    put(tmp_path / "a", {"adapter_fusion_config.json": config})
    write_files(tmp_path / "a", LORA)
    assert content(tmp_path / "b") == {"adapter_config.json": b"another's"}
    assert content(tmp_path / "a") == {**LORA, "b/adapter_config.json": b"another's"}


def test_a_folder_that_is_there_stays_itself(tmp_path: Path):
    for files in ({}, LORA):
        put(tmp_path / "a", files)
        (tmp_path / "a").mkdir(exist_ok=True)
        inode = (tmp_path / "a").stat().st_ino
        write_files(tmp_path / "a", OTHER)
        assert (tmp_path / "a").stat().st_ino == inode
        assert content(tmp_path / "a") == OTHER
        assert os.listdir(tmp_path) == ["a"]


def test_a_folder_where_a_file_is_to_be_is_not_lost(tmp_path: Path):
    put(tmp_path / "a", {**LORA, "x/mine": b"mine"})
    before = content(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"expected a file or nothing at .*/a/x"):
        write_files(tmp_path / "a", {**OTHER, "x": b""})
    assert content(tmp_path) == before


def test_what_cannot_be_put_back_now_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path / "a", LORA)
    replace, moved = os.replace, 0

    def full(source: Path, target: Path) -> None:
        nonlocal moved
        moved += 1
        if moved > 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_files(tmp_path / "a", OTHER)
    assert len(remove_leftovers(tmp_path / "a")) == 0
    monkeypatch.undo()
    assert len(remove_leftovers(tmp_path / "a")) == 1
    assert content(tmp_path) == {f"a/{name}": data for name, data in LORA.items()}


def test_who_is_replacing_files_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path / "a", LORA)
    rename, seen = os.rename, []

    def look(source: Path, target: Path) -> None:
        seen.append((in_use(tmp_path / "a"), remove_leftovers(tmp_path / "a"), in_use(tmp_path / "b")))
        rename(source, target)

    monkeypatch.setattr(os, "rename", look)
    write_files(tmp_path / "a", OTHER)
    assert seen == [(True, [], False)]
    assert not in_use(tmp_path / "a")
