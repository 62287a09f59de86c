"""benchmarks/lowrank.py on a machine without a GPU: its order, its arithmetic, its opponents and its whole flow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lowrank import Bench, main, opponents
from benchmarks.lowrank_cases import DRY, FULL, Case, Rates, cases, segments
from benchmarks.lowrank_forms import opponent

ROOT = Path(__file__).parents[2]
GOOD = """
import torch

def build(problem):
    def run():
        for i, slot in enumerate(problem.slots.tolist()):
            if slot:
                outs = problem.y[i].split(problem.slices)
                for y, a, b in zip(outs, problem.a[slot], problem.b[slot], strict=True):
                    y += problem.scale * (b @ (a @ problem.x[i]))
    run.metadata = lambda: None
    return run
"""


def test_the_most_important_case_comes_first_and_none_is_missing() -> None:
    every = cases(FULL)
    assert len(set(every)) == len(every) == 8 * 4 * 4 * 3
    assert every[0].name == "64 tokens, distinct, r=16, single"
    assert {c.tokens for c in every[:20]} >= {64, 1, 2048}
    assert {c.site.name for c in every[:20]} == {"single", "qkv", "gate_up"}


def test_mixes() -> None:
    single = FULL.sites[0]

    def step(tokens: int, mix: str, shift: int = 0) -> tuple[int, int]:
        made = segments(Case(tokens, 16, mix, single), shift, FULL, torch.device("cpu"))
        assert made.num_tokens == tokens
        return len(made.slots), sum(end - start for _, start, end in made.runs)

    assert step(64, "distinct") == (64, 64)
    assert step(2048, "distinct") == (64, 2048)
    assert step(128, "identical") == (1, 128)
    assert step(128, "half") == (64, 64)
    distinct, tokens = step(64, "zipf")
    assert 1 < distinct < 40
    assert tokens == 64
    first, second = (segments(Case(8, 16, "distinct", single), n, FULL, torch.device("cpu")) for n in (0, 1))
    assert first.slots != second.slots, "adapters take turns"


def test_floors_are_those_of_the_bytes_that_must_move() -> None:
    """4.3 us for 64 adapters of rank 16 at 4096 x 4096 and 4.3 TB/s; the base's product 7.8 us: worked out by hand."""
    rates = Rates(4.3e12, 790e12)
    case = Case(64, 16, "distinct", FULL.sites[0])
    step = segments(case, 0, FULL, torch.device("cpu"))
    assert rates.lowrank(case, step, 2) == pytest.approx(4.27e-6, rel=0.01)
    assert rates.base(case, 2) == pytest.approx(8.05e-6, rel=0.01)
    long = Case(8192, 16, "identical", FULL.sites[0])
    assert rates.base(long, 2) == pytest.approx(348e-6, rel=0.01), "bound by arithmetic"


@pytest.mark.parametrize(
    ("named", "message"),
    [("alone", "expected NAME=PATH"), ("x=", "expected NAME=PATH"), ("x=/no/such.py", "expected a Python file")],
)
def test_an_opponent_that_is_none(named: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opponent(named)


def test_an_opponent_without_build(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="expected a function `build`"):
        opponent(f"x={tmp_path / 'empty.py'}")


def test_the_whole_flow_dry(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text("def build(problem):\n    raise RuntimeError('no such kernel')\n")
    opponents = [f"--opponent=good={tmp_path / 'good.py'}", f"--opponent=bad={tmp_path / 'bad.py'}"]
    command = [sys.executable, "-m", "benchmarks.lowrank", "--dry", "--out", str(tmp_path), "--budget", "60"]
    result = subprocess.run([*command, *opponents], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "lowrank.json").read_text())
    assert list(written["results"]) == [case.name for case in cases(DRY)]
    for case in written["results"].values():
        assert case["base_us"] > 0
        for name in ("ours", "torch loop", "good"):
            assert case["forms"][name]["error"] < 1e-5
            assert case["forms"][name]["repeatable"]
        assert case["forms"]["bad"] == {"failed": "RuntimeError: no such kernel"}
    assert "| 6 tokens, distinct, r=4, single |" in (tmp_path / "lowrank.md").read_text()


def test_an_opponent_that_cannot_be_used_leaves_the_others_theirs(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "lacks.py").write_text("import no_such_package\n")
    (tmp_path / "exits.py").write_text("raise SystemExit('no device')\n")
    named = [f"{name}={tmp_path / name}.py" for name in ("lacks", "exits", "absent", "good")]
    forms, unusable = opponents(named)
    assert list(forms) == ["good"]
    assert unusable == {
        "lacks": "ModuleNotFoundError: No module named 'no_such_package'",
        "exits": "SystemExit: no device",
        "absent": f"ValueError: --opponent absent: expected a Python file, got '{tmp_path / 'absent'}.py'",
    }


def test_what_is_measured_stays_when_the_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Bench.run
    ran: list[str] = []

    def stopped(self: Bench, case: Case, forms: Any) -> Any:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(case.name)
        return measured(self, case, forms)

    monkeypatch.setattr(Bench, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(["--dry", "--out", str(tmp_path), "--opponent", "absent=/no/such.py"])
    written = json.loads((tmp_path / "lowrank.json").read_text())
    assert list(written["results"]) == ran
    assert written["cut_by_the_budget"] == [case.name for case in cases(DRY)][2:]
    assert list(written["unusable_opponents"]) == ["absent"]
    summary = (tmp_path / "lowrank.md").read_text()
    assert f"| {ran[1]} |" in summary
    assert "absent cannot be used: ValueError" in summary


def test_what_the_budget_cuts_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lowrank", "--dry", "--out", str(tmp_path), "--budget", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "lowrank.json").read_text())
    assert not written["results"]
    assert written["cut_by_the_budget"] == [case.name for case in cases(DRY)]
