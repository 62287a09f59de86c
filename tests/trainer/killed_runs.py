"""Run as a process of its own: runs that end by signals at steps drawn at random, each resumed until it is done.

argv: a base's folder, a file of rows, a folder to write to, how many runs; the last line of stdout: a JSON list of
{"signal", "status", "wrote" (whether the adapter was there), "left", "after" (the next run), "resumed",
"status_again", "same"}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from peftmux.trainer.cli import main as train
from peftmux.trainer.run.checkpoints import newest_checkpoint

TENSORS = "adapter_model.safetensors"


def start(words: Sequence[str]) -> int:
    """Forked, as everything is imported and nothing has been computed."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(train(words))
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait(checkpoints: Path, count: int) -> None:
    """Until so many have been begun."""
    while len(list(checkpoints.glob("checkpoint-*"))) < count:
        time.sleep(0.002)


def main() -> None:
    base, rows, folder, count = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    common = ["lora", "--model", base, "--data", rows, "--lora-dropout", "0.1", "--max-steps", "12", "--disable-tqdm"]
    common += ["true", "--save-strategy", "steps", "--save-steps", "1", "--per-device-train-batch-size", "4"]
    assert finish(start([*common, "--out", str(folder / "whole")])) == 0
    whole = load_file(folder / "whole" / TENSORS)
    draw, found = random.Random(0), []
    for number in range(count):
        here = folder / str(number)
        here.mkdir()
        out, kind = here / "a", (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[number % 3]
        child = start([*common, "--out", str(out)])
        wait(here / "a.checkpoints", draw.randrange(1, 13))
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, kind)
        status = finish(child)
        left = sorted(path.name for path in here.iterdir())
        wrote = out.exists()
        resumed = newest_checkpoint(here / "a.checkpoints") is not None
        again = 0 if wrote else finish(start([*common, "--out", str(out), *["--resume"] * resumed]))
        after = sorted(path.name for path in here.iterdir())
        tensors = load_file(out / TENSORS)
        same = tensors.keys() == whole.keys() and all(bool((tensors[name] == t).all()) for name, t in whole.items())
        found.append(
            {"signal": kind, "status": status, "wrote": wrote, "left": left, "after": after, "resumed": resumed}
            | {"status_again": again, "same": same}
        )
    print(f"\n{json.dumps(found)}")


main()
