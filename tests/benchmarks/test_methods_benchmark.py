"""The comparison of methods: what it runs, that it goes on where it was, and what its page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import methods
from benchmarks.methods_cases import BATCH, CLASSES, HELD_OUT, NEW, TOLD, Case, cases, held_out, write_rows
from benchmarks.methods_change import change_of
from benchmarks.methods_report import low, write_report
from peftmux.demo import BASE
from peftmux.demo.tasks import TASKS, is_held_out
from peftmux.trainer import train
from peftmux.trainer.methods import METHODS

RECORD = {"accuracy": 0.9, "cpu_seconds": 8.0, "peak_bytes": 5e7, "trained": 900, "changed": 800, "rank": 8.0}


def named(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def record(base: str, case: str, task: str, **fields: Any) -> dict[str, Any]:
    return {"base": base, "case": case, "task": task, **RECORD, "full": 128.0, **fields}


def test_every_method_is_compared_once_with_its_defaults() -> None:
    plain = [case.method for case in cases() if case.name == case.method and not case.config]
    assert sorted(plain) == sorted(METHODS.keys() - {"vora"})
    assert len({case.name for case in cases()}) == len(cases())


@pytest.mark.parametrize(("name", "task"), [("lora", NEW), ("head", CLASSES), ("multitask-prompt", TOLD)])
def test_rows_and_held_out_inputs_do_not_meet(name: str, task: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_rows(named(name), task, 10, tmp_path).read_text().splitlines()]
    inputs = {row["text"] if "text" in row else row["messages"][0]["content"] for row in rows}
    out = held_out(task)
    assert len(rows) == 10 * BATCH
    assert len(out) == HELD_OUT == len({example.prompt for example in out})
    assert not any(map(is_held_out, inputs))
    assert all(is_held_out(example.prompt) for example in out)
    if "task" in rows[0]:
        assert {row["task"] for row in rows} == {TOLD, "sort"}
        assert all(
            TASKS[row["task"]].answer(row["messages"][0]["content"]) == row["messages"][1]["content"] for row in rows
        )


def test_classes_are_the_place_of_the_earliest_letter() -> None:
    found = {example.prompt: example.completion for example in held_out(CLASSES)}
    places = ("first", "second", "third", "later")
    assert all(places[min(text.index(sorted(text)[0]), 3)] == label for text, label in found.items())
    assert set(found.values()) == set(places)


def test_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ran: list[tuple[str, str, str]] = []

    def measured(run: methods.Run) -> dict[str, Any]:
        ran.append(run.key)
        fails = run.case.name == "ln" and len(ran) < 3
        whole = record(*run.key)
        return {key: whole[key] for key in ("base", "case", "task")} | {"failed": "out of luck"} if fails else whole

    monkeypatch.setattr(methods, "measured", measured)
    paths = ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    some = [*paths, "--bases", "small", "--tasks", TOLD, "--cases", "lora", "ln"]
    assert methods.main(some) == 1, "one failed"
    assert methods.main(some) == 0, "and is run again, alone"
    assert ran == [("small", "lora", TOLD), ("small", "ln", TOLD), ("small", "ln", TOLD)]
    assert methods.main([*some, "--force"]) == 0
    assert len(ran) == 5
    (file,) = (tmp_path / "results").glob("*/methods/*.jsonl")
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()] == ["lora", "ln"]
    assert "| lora | 90.0 % | 1.00 |" in capsys.readouterr().out


def test_page_names_what_stays_behind(tmp_path: Path) -> None:
    found = [record("small", "lora", TOLD), record("small", "ln", TOLD, accuracy=0.45, rank=None, changed=None)]
    records = {(r["base"], r["case"], r["task"]): r for r in found}
    table = write_report(records, "some machine", tmp_path)
    page = (tmp_path / "methods.md").read_text()
    assert "| ln | 45.0 % | 0.50 |  |  | 900 | beside |  | 8 | 50 |" in table
    assert table in page
    assert "Measured on: some machine." in page
    assert low(records) == {"ln": [("small", TOLD, 0.45)]}
    assert "`ln` 45 % (small, reverse)" in page
    picture = ElementTree.fromstring((tmp_path / "methods.svg").read_text())
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 2


@pytest.mark.parametrize(
    ("method", "config", "changed", "rank"),
    [
        ("lora", {"r": 3, "target_modules": ["q_proj"]}, 4 * 256 * 256, 3.0),
        ("ln", {}, 9 * 256, None),
        ("prompt", {}, None, None),
    ],
)
def test_change_is_counted_from_the_file(
    method: str, config: dict[str, Any], changed: int | None, rank: float | None, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "ABCD", "completion": "DCBA"}) + "\n")
    training = {"max_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    train(method, model=BASE, data=rows, out=tmp_path / "a", config=config, training=training, dtype="float32")
    found = change_of(BASE, tmp_path / "a")
    assert (found["changed"], found["rank"]) == (changed, rank)
