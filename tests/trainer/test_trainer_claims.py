"""One run at a time writes to a folder, and one that is killed holds nothing and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from transformers import TrainerCallback

from peftmux.trainer import OptionError, train
from peftmux.trainer.cli import main
from peftmux.trainer.files.outputs import claimed
from peftmux.trainer.jobs.file import Changes, read_jobs
from peftmux.trainer.jobs.run import JobRun
from tests.trainer.method_runs import QUICK

KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from peftmux.trainer import train
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
base, rows, out = sys.argv[1:]
train("lora", model=base, data=rows, out=out, max_steps=2, callbacks=[Kill()])
"""


def refused(out: Path) -> bool:
    try:
        with claimed(out):
            return False
    except OptionError as error:
        return str(error) == f"out: another run is writing to {out.resolve()}"


def test_a_place_is_claimed_once_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    with claimed("a"):
        assert [refused(Path(out)) for out in ("a", "link", "b/../a", "b")] == [True, True, True, False]
    assert not refused(Path("a"))
    with contextlib.suppress(KeyError), claimed("a"):
        raise KeyError
    assert not refused(Path("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_forked_process_that_lives_longer_holds_nothing(tmp_path: Path):
    """As a data loader's worker may."""
    reads, writes = os.pipe()
    with claimed(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(writes, b"x")
            time.sleep(60)
            os._exit(0)
        assert os.read(reads, 1) == b"x"
        held = refused(tmp_path)
    held_after = refused(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (held, held_after) == (True, False)
    os.close(reads)
    os.close(writes)


def test_a_run_that_is_killed_leaves_nothing(qwen2: Path, rows: Path, tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, qwen2, rows, tmp_path / "a"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert not refused(tmp_path / "a")


class Others:
    """All kinds of runs that write to `out`, each of which must be refused, also with --overwrite."""

    def __init__(self, base: Path, rows: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._words = ["lora", "--model", str(base), "--data", str(rows), "--max-steps", "1", "--disable-tqdm", "true"]
        self._words += ["--out", str(out), "--eval-data", str(rows), "--overwrite"]
        job = {"name": "a", "method": "lora", "model": str(base), "data": str(rows), "out": str(out), "max_steps": 1}
        self._jobs = out.parent / "other.yaml"
        self._jobs.write_text(yaml.safe_dump({"jobs": [{**job, "overwrite": True}]}))
        self._capsys = capsys
        self.tried = 0

    def are_refused(self) -> None:
        """Asked in this process: the run that is under way keeps what accelerate knows of it."""
        shared = AcceleratorState._shared_state
        before = dict(shared)
        several: list[list[str]] = [[], ["--sweep", "r=2,4"], ["--ensemble", "2"]]
        for words in ([*self._words, *more] for more in several):
            self._is_refused(words)
        self._is_refused(["--jobs", str(self._jobs)])
        shared.clear()
        shared.update(before)
        self.tried += 1

    def a_dry_run_is_not(self) -> None:
        assert main([*self._words, "--dry-run"]) == 0

    def _is_refused(self, words: list[str]) -> None:
        self._capsys.readouterr()
        assert main(words) == 1
        assert "another run is writing to" in self._capsys.readouterr().err


@pytest.fixture
def others(qwen2: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Others]:
    others = Others(qwen2, rows, tmp_path / "a", capsys)
    yield others
    assert others.tried == 1
    assert not refused(tmp_path / "a")


def test_a_run_holds_its_place(qwen2: Path, rows: Path, tmp_path: Path, others: Others):
    class Meanwhile(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                others.a_dry_run_is_not()
                others.are_refused()

    training = {**QUICK, "max_steps": 2}
    train("lora", model=qwen2, data=rows, out=tmp_path / "a", r=3, training=training, callbacks=[Meanwhile()])
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 3


def job(base: Path, rows: Path, out: Path, steps: int, **more: Any) -> JobRun:
    """A run of one job, "long", beside a short one with a place of its own."""
    common = {"method": "lora", "model": str(base), "data": str(rows)}
    jobs = [{**common, "name": "long", "out": str(out), "max_steps": steps}]
    jobs += [{**common, "name": "short", "out": f"{out}-short", "max_steps": 1}]
    path = out.parent / "jobs.yaml"
    path.write_text(yaml.safe_dump({"jobs": jobs}))
    return JobRun(read_jobs(path), **more)


def test_jobs_hold_their_places_until_each_ends(qwen2: Path, rows: Path, tmp_path: Path, others: Others):
    held: list[tuple[bool, bool]] = []

    def changes() -> Changes:
        held.append((refused(tmp_path / "a"), refused(tmp_path / "a-short")))
        if len(held) == 2:
            others.are_refused()
        return Changes(left={"long"}) if len(held) == 4 else Changes()

    run = job(qwen2, rows, tmp_path / "a", 50, changes=changes)
    run.run()
    assert held == [(True, False)] * 4, "the short one has ended"
    assert run.failed.keys() == {"long"}


@pytest.mark.parametrize("several", [["--sweep", "r=2,4"], ["--ensemble", "2"]])
def test_sweeps_and_ensembles_hold_their_place(
    several: list[str],
    qwen2: Path,
    rows: Path,
    tmp_path: Path,
    others: Others,
    monkeypatch: pytest.MonkeyPatch,
):
    run = JobRun.run

    def meanwhile(self: JobRun) -> Any:
        monkeypatch.setattr(JobRun, "run", run)
        assert refused(tmp_path / "a")
        others.are_refused()
        return run(self)

    monkeypatch.setattr(JobRun, "run", meanwhile)
    words = ["lora", "--model", str(qwen2), "--data", str(rows), "--eval-data", str(rows), "--max-steps", "1"]
    assert main([*words, "--out", str(tmp_path / "a"), "--disable-tqdm", "true", *several]) == 0


def test_what_is_refused_later_holds_nothing(rows: Path, tmp_path: Path):
    with pytest.raises(OptionError, match="no-base"):
        train("lora", model=tmp_path / "no-base", data=rows, out=tmp_path / "a", training=QUICK)
    assert not refused(tmp_path / "a")
