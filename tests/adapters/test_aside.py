"""What is written beside a place: a live process's stays, a killed one's goes, and nothing of another name does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftmux.adapters.aside import folder_aside, put_in_place, remove_leftovers
from peftmux.adapters.writer import write_adapter

HOLD = """
import sys, time
from pathlib import Path
from peftmux.adapters.aside import folder_aside
with folder_aside(Path(sys.argv[1])) as aside:
    (aside / "half").write_text("x")
    print(aside.name, flush=True)
    time.sleep(600)
"""


def writing(target: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that is writing for `target`, and its folder's name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


def test_a_killed_process_leftovers_go_and_a_live_ones_stay(tmp_path: Path) -> None:
    target = tmp_path / "a"
    dead, left = writing(target)
    kill(dead)
    live, kept = writing(target)
    try:
        assert hidden(tmp_path) == {kept}, "the next to write removes what is left"
        with folder_aside(target) as own:
            assert remove_leftovers(target) == []
            assert hidden(tmp_path) == {kept, own.name}
        assert hidden(tmp_path) == {kept}
        assert left != kept
    finally:
        kill(live)
    write_adapter(target, {"peft_type": "LORA"}, {"a": torch.ones(1)})
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_only_folders_of_the_same_name_and_form_are_leftovers(tmp_path: Path) -> None:
    others = [".b.0123456789ab.partial", ".a.b.0123456789ab.partial", ".a.partial", ".a.0123456789ab", ".a.sweep"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".a.0123456789ab.partial").symlink_to(tmp_path / "elsewhere")
    assert remove_leftovers(tmp_path / "a") == []
    (tmp_path / ".a.ba9876543210.partial").mkdir()
    assert [path.name for path in remove_leftovers(tmp_path / "a")] == [".a.ba9876543210.partial"]
    assert hidden(tmp_path) == {*others, ".a.0123456789ab.partial"}


@pytest.mark.parametrize("there", [True, False])
def test_what_was_moved_away_comes_back(there: bool, tmp_path: Path) -> None:
    """Killed between the two renames of a replacement: the old adapter is in the leftover only."""
    left = tmp_path / ".a.0123456789ab.partial"
    (left / "old").mkdir(parents=True)
    (left / "old" / "which").write_text("old")
    if there:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "which").write_text("new")
    remove_leftovers(tmp_path / "a")
    assert (tmp_path / "a" / "which").read_text() == ("new" if there else "old")
    assert hidden(tmp_path) == set()


def replace(target: Path) -> None:
    with folder_aside(target) as aside:
        (aside / "new").mkdir()
        put_in_place(aside, target)


@pytest.mark.parametrize("first", [True, False])
def test_a_replacement_that_is_interrupted_leaves_the_old_one(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, or between, its two renames."""
    rename, renames = os.rename, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if not first and renames == 1:
            rename(source, target)
        if renames == 1:
            raise KeyboardInterrupt
        rename(source, target)

    target = tmp_path / "a"
    target.mkdir()
    (target / "which").write_text("old")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(target)
    assert (target / "which").read_text() == "old"
    assert hidden(tmp_path) == set()


def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no locks here")

    (tmp_path / ".a.0123456789ab.partial").mkdir()
    monkeypatch.setattr("fcntl.flock", refused)
    with folder_aside(tmp_path / "a") as aside:
        os.rename(aside, tmp_path / "a")
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.0123456789ab.partial"}
