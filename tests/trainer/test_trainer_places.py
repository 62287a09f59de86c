"""Where a run may write, however the place is spelled: nothing that is not the run's own is replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftmux.adapters.files import read_adapter
from peftmux.trainer import OptionError
from peftmux.trainer.cli import main
from peftmux.trainer.files.export import publish
from peftmux.trainer.files.outputs import adapter_name
from peftmux.trainer.jobs.file import read_jobs


@pytest.fixture
def words(qwen2: Path, rows: Path) -> list[str]:
    return ["lora", "--model", str(qwen2), "--data", str(rows), "--max-steps", "1", "--disable-tqdm", "true"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, beside a folder `p` that holds another adapter."""
    folder, other = tmp_path / "mine", tmp_path / "p" / "other"
    folder.mkdir()
    other.mkdir(parents=True)
    (other / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


def no_base(words: list[str]) -> list[str]:
    """What is refused before the base is loaded is refused without it."""
    return [words[0], "--model", "no-base", *words[3:]]


@pytest.mark.parametrize(
    ("out", "name"),
    [("a/b", "b"), ("a/b/", "b"), (".", "mine"), ("../mine/.", "mine"), ("new/..", "mine"), ("./a", "a")],
)
def test_an_adapter_has_its_folders_name(out: str, name: str, here: Path):
    assert adapter_name(out) == name


def test_what_has_no_name_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    for out in ("/", "/.."):
        assert main([*no_base(words), "--overwrite", "--out", out]) == 1
        assert "out: expected a folder with a name, got /" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "new/.."])
def test_the_current_directory_is_written_and_published_by_its_name(out: str, here: Path, words: list[str]):
    inode = os.stat(".").st_ino
    assert main([*words, "--out", out, "--publish", "../p"]) == 0
    assert os.stat(here).st_ino == inode, "whoever stands there still does"
    assert {path.name for path in here.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in here.parent.iterdir()} == {"mine", "p"}
    assert {path.name for path in (here.parent / "p").iterdir()} == {"mine", "other"}
    assert read_adapter(here.parent / "p" / "mine").digest == read_adapter(here).digest


def test_a_sweep_writes_the_current_directory_as_a_single_run_does(here: Path, rows: Path, words: list[str]):
    inode = os.stat(".").st_ino
    (here / "notes.txt").write_text("mine")
    more = ["--sweep", "r=2,3", "--eval-data", str(rows), "--overwrite", "--out", ".", "--publish", "../p"]
    for _ in range(2):
        assert main([*words, *more]) == 0
        assert os.stat(here).st_ino == inode
        assert {path.name for path in here.parent.iterdir()} == {"mine", "p"}
        assert (here / "notes.txt").read_text() == "mine"
        assert read_adapter(here.parent / "p" / "mine").digest == read_adapter(here).digest


def test_an_adapter_that_lies_where_it_is_published_stays(here: Path, words: list[str]):
    inode = os.stat(".").st_ino
    assert main([*words, "--out", ".", "--publish", ".."]) == 0
    assert os.stat(here).st_ino == inode
    read_adapter(here)


@pytest.mark.parametrize("several", [[], ["--ensemble", "2"], ["--sweep", "r=2,4", "--eval-data", "x"]])
def test_publishing_into_what_is_written_is_refused(
    several: list[str], here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    (here / "a" / "p").mkdir(parents=True)
    (here.parent / "link").symlink_to(here / "a" / "p")
    for folder in ("a/p", "a", "../link", "a/../a"):
        assert main([*no_base(words), *several, "--overwrite", "--out", "a", "--publish", folder]) == 1
        assert "publish: expected a folder that does not lie in --out" in capsys.readouterr().err
    assert main([*no_base(words), *several, "--overwrite", "--out", ".", "--publish", "a/p"]) == 1
    suffix = "-0" if "--ensemble" in several else ""
    (here / f"b{suffix}").mkdir()
    assert main([*no_base(words), *several, "--out", f"b{suffix}/b", "--publish", "."]) == 1
    assert f"publish: would replace b{suffix}, in which --out lies" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "..", "sub/.."])
def test_an_ensemble_does_not_replace_the_current_directory(
    out: str, here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*no_base(words), "--ensemble", "2", "--overwrite", "--out", out]) == 1
    assert "out: an ensemble's folder is replaced as a whole" in capsys.readouterr().err


def test_an_ensemble_is_written_through_a_link(here: Path, words: list[str]):
    (here / "a").symlink_to(here / "disk")
    for _ in range(2):
        assert main([*words, "--ensemble", "2", "--overwrite", "--out", "a"]) == 0
        assert (here / "a").is_symlink()
        assert {path.name for path in here.iterdir()} == {"a", "disk"}
        assert {path.name for path in (here / "disk").iterdir()} == {"0", "1"}


@pytest.mark.parametrize("name", ["my adapter", "mine@v2", "a,b", ".hidden", "été", "-a", "a" * 129])
@pytest.mark.parametrize("several", [[], ["--ensemble", "2"], ["--sweep", "r=2,4", "--eval-data", "x"]])
def test_a_name_that_no_server_takes_is_not_published(
    name: str, several: list[str], here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*no_base(words), *several, f"--out={name}", "--publish", "../p"]) == 1
    assert "publish: no server takes the name " in capsys.readouterr().err
    assert list(here.iterdir()) == []
    with pytest.raises(OptionError, match="no server takes"):
        publish(here, here.parent / "p", name)


def test_a_members_name_is_an_ensembles_with_its_number(
    here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*no_base(words), "--ensemble", "2", "--out", "a" * 127, "--publish", "../p"]) == 1
    assert "publish: no server takes the name 'aaa" in capsys.readouterr().err


def test_a_job_is_published_by_a_name_that_a_server_takes(here: Path):
    job = "{name: a, method: lora, model: m, data: d, publish: p, out: %s}"
    for out, message in (("my a", r"job 1: publish: no server takes the name 'my a'"), ("/", "with a name, got /")):
        (here / "jobs.yaml").write_text(f"jobs: [{job % out}]")
        with pytest.raises(OptionError, match=message):
            read_jobs(here / "jobs.yaml")


def test_checkpoints_lie_beside_the_current_directory(here: Path, words: list[str]):
    assert main([*words, "--out", ".", "--save-strategy", "steps", "--save-steps", "1"]) == 0
    assert {path.name for path in here.parent.iterdir()} == {"mine", "mine.checkpoints", "p"}
