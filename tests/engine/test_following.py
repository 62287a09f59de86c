"""`--watch-adapters`: what appears in the adapter root is served, what changes is replaced, what goes is unloaded."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peftmux.runtime.engine import follow
from peftmux.runtime.engine.api import AdapterState
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.residency import folders
from peftmux.trainer.files.export import publish
from tests.engine.harness import adapters, ask, request, running, until

SOON = 0.02
PROMPT = [5, 9, 17, 33, 60, 7]


class Refusals(NullObserver):
    def __init__(self) -> None:
        self.count = 0

    def adapter_refused(self) -> None:
        self.count += 1


@asynccontextmanager
async def following(root: Path, observer: NullObserver | None = None) -> AsyncIterator[LocalEngine]:
    async with running(adapters_root=str(root), watch_seconds=SOON, observer=observer) as engine:
        yield engine


def put(root: Path, kind: str, name: str) -> Path:
    """Appears in one rename."""
    aside = root / f".{name.replace('/', '-')}"
    shutil.copytree(Path(adapters()) / kind, aside)
    (root / name).parent.mkdir(exist_ok=True)
    aside.rename(root / name)
    return root / name


def states(engine: LocalEngine) -> dict[str, AdapterState]:
    return {info.name: info.state for info in engine.list_adapters()}


async def test_what_appears_changes_and_goes(tmp_path: Path) -> None:
    put(tmp_path, "lora", "early")
    async with following(tmp_path) as engine:
        assert states(engine) == {"early": AdapterState.READY}, "what is there at the start is loaded before it ends"
        put(tmp_path, "prefix", "late")
        put(tmp_path, "lora_rslora", "team/late")
        await until(lambda: list(states(engine).values()) == [AdapterState.READY] * 3)
        assert {info.name: info.kind for info in engine.list_adapters()} == {
            "early": "lora",
            "late": "prefix",
            "team/late": "rslora",
        }
        before = engine.get_adapter("early").revision
        await engine.update_adapter("early", pinned=True)
        (tmp_path / ".elsewhere").mkdir()
        publish(put(tmp_path / ".elsewhere", "lora_dora", "early"), tmp_path)
        await until(lambda: engine.get_adapter("early").revision != before)
        info = engine.get_adapter("early")
        assert (info.kind, info.pinned, info.source) == ("dora", True, "early")
        assert (await ask(engine, request(PROMPT, "early", 4))).ids
        shutil.rmtree(tmp_path / "team")
        await until(lambda: "team/late" not in states(engine))
        assert set(states(engine)) == {"early", "late"}


async def test_a_bad_folder_is_reported_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="peftmux.runtime.engine.follow")
    refusals = Refusals()
    async with following(tmp_path, refusals) as engine:
        bad = put(tmp_path, "lora", "bad")
        (bad / "adapter_model.safetensors").write_bytes(b"short")
        (tmp_path / "two words").mkdir()
        shutil.copy(bad / "adapter_config.json", tmp_path / "two words")
        os.symlink(Path(adapters()) / "lora", tmp_path / "outside")
        (tmp_path / "notes").mkdir()
        put(tmp_path, "lora", "good")
        await until(lambda: len(states(engine)) == 3 and AdapterState.LOADING not in states(engine).values())
        assert states(engine) == {
            "bad": AdapterState.FAILED,
            "good": AdapterState.READY,
            "outside": AdapterState.FAILED,
        }
        assert "outside the adapter root" in engine.get_adapter("outside").error
        assert engine.get_adapter("bad").error
        await until(lambda: len(caplog.records) == 4)
        assert "adapter two words not loaded" in caplog.text
        assert refusals.count == 2
        (bad / "adapter_model.safetensors").unlink()
        shutil.copy(Path(adapters()) / "lora" / "adapter_model.safetensors", bad)
        await until(lambda: states(engine)["bad"] is AdapterState.READY)
        await until(lambda: len(caplog.records) > 4)
        assert len(caplog.records) == 5, "a folder that was refused is not tried again until it changes"


async def test_a_replacement_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    folder = put(tmp_path, "lora", "a")
    refusals = Refusals()
    async with following(tmp_path, refusals) as engine:
        before = engine.get_adapter("a")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
        await until(lambda: refusals.count == 1)
        after = engine.get_adapter("a")
        assert (after.state, after.revision) == (AdapterState.READY, before.revision)
        assert after.error
        shutil.rmtree(folder)
        await until(lambda: not engine.list_adapters())


async def test_a_folder_that_is_still_written_waits(tmp_path: Path) -> None:
    seen = {"a": (("adapter_config.json", 1, 2, 3),)}
    grown = {"a": (("adapter_config.json", 1, 2, 3), ("adapter_model.safetensors", 2, 5, 6))}
    put(tmp_path, "lora", "a")
    async with running(adapters_root=str(tmp_path)) as engine:
        follower = follow.Follower(engine._adapters, str(tmp_path), SOON)
        for found in (seen, grown):
            follower._act(found)
            follower._seen = found
            assert not follower._busy
        follower._act(grown)
        await until(lambda: states(engine) == {"a": AdapterState.READY} and not follower._busy)
        follower._act({})
        follower._seen = {}
        assert not follower._busy, "gone for one look may be a replacement"
        follower._act({})
        await until(lambda: not engine.list_adapters())


async def test_names_from_elsewhere_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "lora", "first")
    async with following(tmp_path) as engine:
        await engine.load_adapter("mine", "first")
        put(tmp_path, "prefix", "mine")
        await until(lambda: "is loaded from 'first'" in caplog.text)
        assert engine.get_adapter("mine").kind == "lora"
        shutil.rmtree(tmp_path / "mine")
        await engine.unload_adapter("first")
        shutil.rmtree(tmp_path / "first")
        put(tmp_path, "prefix", "last")
        await until(lambda: "last" in states(engine))
        assert states(engine)["mine"] is AdapterState.READY


async def test_a_root_that_is_away_unloads_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    root.mkdir()
    put(root, "lora", "a")
    async with following(root) as engine:
        root.rename(tmp_path / "away")
        await until(lambda: caplog.text.count("the adapter root cannot be read") >= 3)
        assert states(engine) == {"a": AdapterState.READY}
        (tmp_path / "away").rename(root)
        put(root, "prefix", "b")
        await until(lambda: states(engine).get("b") is AdapterState.READY)


async def test_memory_that_is_missing_now_may_be_there_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_RETRY_SECONDS", SOON)
    put(tmp_path, "lora", "a")
    async with running() as engine:
        size = (await engine.load_adapter("x", "lora")).bytes
    async with running(adapters_root=str(tmp_path), watch_seconds=SOON, adapter_memory=int(1.5 * size)) as engine:
        put(tmp_path, "lora_rslora", "b")
        await until(lambda: states(engine).get("b") is AdapterState.FAILED)
        assert "adapter memory" in engine.get_adapter("b").error
        shutil.rmtree(tmp_path / "a")
        await until(lambda: states(engine) == {"b": AdapterState.READY})
        info = engine.get_adapter("b")
        assert (info.kind, info.error) == ("rslora", "")
        assert len((await ask(engine, request(PROMPT, "b", 4))).ids) == 4


async def test_nothing_to_watch_is_refused(tmp_path: Path) -> None:
    for settings in ({"adapters_root": None}, {"adapters_root": str(tmp_path / "none")}):
        with pytest.raises(InvalidRequest, match="adapter root"):
            async with running(watch_seconds=SOON, **settings):
                pass


async def test_the_checkpoints_of_a_training_run_are_no_adapters(tmp_path: Path) -> None:
    """At any moment of their writing and removal; a library that saves whole adapters in its checkpoints is served."""
    names = ["adapter_state.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "run.json"]
    checkpoint = tmp_path / "mine.checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in names:
        (checkpoint / name).write_bytes(b"x")
        assert folders.scan(tmp_path) == {}, name
    for name in names:
        (checkpoint / name).unlink()
        assert folders.scan(tmp_path) == {}, name
    theirs = put(tmp_path, "lora", "mine.checkpoints/checkpoint-4")
    (theirs / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.bin").write_bytes(b"x")
    assert set(folders.scan(tmp_path)) == {"bare", "mine.checkpoints/checkpoint-4"}
