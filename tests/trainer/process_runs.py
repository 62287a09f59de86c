"""Started by `accelerate launch`: argv[1] is a file of JSON, a list of `train` options; what each process was left with
goes to RANK.json beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peftmux.trainer import train


def main() -> None:
    path = Path(sys.argv[1])
    results = [train(**run) for run in json.loads(path.read_text())]
    found = [{"digest": r.digest, "steps": r.steps, "eval_loss": r.metrics.get("eval_loss")} for r in results]
    path.with_name(f"{os.environ['RANK']}.json").write_text(json.dumps(found))


main()
