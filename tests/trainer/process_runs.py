"""Started by `accelerate launch`: argv[1] is a file of JSON, a list of `train` options; what each process was left with
goes to RANK.json beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from peftmux.trainer import train


class Rewards(TrainerCallback):
    """What a preference loss has logged."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "reward_margin" in logs:
            self.seen.append((logs["reward_margin"], logs["reward_accuracy"]))


def main() -> None:
    path = Path(sys.argv[1])
    found = []
    for run in json.loads(path.read_text()):
        rewards = Rewards()
        result = train(**run, callbacks=[rewards])
        known = {"digest": result.digest, "steps": result.steps, "metrics": dict(result.metrics)}
        found.append({**known, "rewards": rewards.seen})
    path.with_name(f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
