"""benchmarks/attention.py without a GPU: its flow, what it counts, and that opponents compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention


@pytest.mark.parametrize("window", [None, 7])
def test_keys_and_pairs_are_those_that_are_seen(window: int | None) -> None:
    rows = ((1, 40), (1, 3), (20, 20), (5, 30))
    scenario = attention.Scenario("", attention.Heads(4, 2, 32, window=window), rows)
    seen = pairs = 0
    for queries, context in rows:
        visible = [
            [j for j in range(at + 1) if window is None or at - j < window] for at in range(context - queries, context)
        ]
        seen += len({j for keys in visible for j in keys})
        pairs += sum(map(len, visible))
    assert (scenario.seen(), scenario.pairs()) == (seen, pairs)


def test_dry_run_writes_figures(tmp_path: Path) -> None:
    assert attention.main(["--dry", "--out", str(tmp_path), "--dtype", "float32", "--opponent", "some=path"]) == 0
    figures = json.loads((tmp_path / "attention.json").read_text())
    results = figures["results"]
    assert all(result["us"] > 0 and result["floor_us"] > 0 for result in results.values())
    compared = [result["torch_sdpa"]["differs_by"] for result in results.values() if "us" in result["torch_sdpa"]]
    assert compared
    assert max(compared) < 1e-5
    assert all(name in (tmp_path / "attention.md").read_text() for name in results)


def test_a_spent_budget_is_said(tmp_path: Path) -> None:
    assert attention.main(["--dry", "--out", str(tmp_path), "--budget", "0"]) == 0
    results = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert {result["note"] for result in results.values()} == {"cut by the budget"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_device_is_said(tmp_path: Path) -> None:
    assert attention.main(["--out", str(tmp_path)]) == 3
