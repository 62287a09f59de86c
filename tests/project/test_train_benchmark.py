"""benchmarks/train.py with tiny sizes: its whole flow beside PEFT, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_whole_flow_dry(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/train.py", "--dry", "--methods", "ia3", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    (written,) = tmp_path.glob("*/train.json")
    results = json.loads(written.read_text())
    for compared in (results["methods"]["ia3"], results["packing"]):
        for library in ("peftmux", "peft"):
            assert compared[library]["tokens_per_second"] > 0
            assert compared[library]["peak_bytes"] > 0
        assert compared["speed_ratio"] == compared["speed_ratios"][0]
    for jobs in results["jobs"]:
        assert jobs["jobs"] == 3
        assert jobs["speed_ratio"] == jobs["in_sequence_seconds"][0] / jobs["together_seconds"][0]
    table = written.with_suffix(".md").read_text()
    assert table in result.stdout
    assert all(f"| {name} |" in table for name in ("ia3", "lora, packed, mixed lengths", "1 x 16", "2 x 32"))
