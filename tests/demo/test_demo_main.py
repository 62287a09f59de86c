"""The whole demo on the real base, the real trainer and a real server, with training cut to a few steps."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from peftmux.demo import main as demo
from peftmux.demo import scenes
from peftmux.demo.main import main
from peftmux.demo.process import ServerFailed, serving
from peftmux.demo.recipes import RECIPES


def test_every_scene_runs_and_a_missed_bound_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tuple(dataclasses.replace(recipe, training={**recipe.training, "max_steps": 2}) for recipe in RECIPES)
    monkeypatch.setattr(demo, "RECIPES", short)
    monkeypatch.setattr(scenes, "HELD_OUT", 6)
    assert main(["--work", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "missed: " in out
    for recipe in short:
        assert (tmp_path / "adapters" / recipe.name / "adapter_model.safetensors").is_file()
        assert re.search(rf"\+ {recipe.name} \({recipe.method}\) \d+k parameters", out)
    assert re.search(r"one batch: \d+ rows = ", out)
    assert "32 requests" in out
    assert "server drained and stopped" in out
    assert max(map(len, out.splitlines())) <= 110


async def test_a_server_that_cannot_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ServerFailed, match=r"expected the server's ready line, got ''\n.+"):
        async with serving(tmp_path, tmp_path, tmp_path / "server.log"):
            pass
