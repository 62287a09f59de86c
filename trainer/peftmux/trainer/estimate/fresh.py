"""The peak of a few steps of a run in a process of its own, which holds what the run's process will and nothing else.

In the process that makes the estimate it would be wrong: oneDNN keeps the kernels it has compiled for each size of a
batch, some MB for each, and the estimate's tiny batches have many sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile

from peftmux.trainer.estimate.fit import Shape
from peftmux.trainer.run.prepared import Prepared


def fresh_peak(ready: Prepared, step: Shape, evaluation: Shape | None, count: int) -> int | None:
    """Resident bytes above the process that has only imported things, over so many of the run's steps, of which one has
    a batch of this size, and so many of its batches without gradients; None where they cannot be had.

    The process loads the base once more.
    """
    job = (ready.method.name, ready.options, ready.config, dict(ready.training), step, evaluation, count)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps(job),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    words = done.stdout.split()
    return int(words[-1]) if not done.returncode and words and words[-1].isdigit() else None


def main() -> None:
    """The other side, up to an adapter that nobody keeps: the job from stdin, the bytes to stdout."""
    from peftmux.trainer.errors import TrainerError
    from peftmux.trainer.estimate.probe import Probe
    from peftmux.trainer.estimate.resident import resident
    from peftmux.trainer.methods import get_method
    from peftmux.trainer.run.base_model import load_base
    from peftmux.trainer.run.loop import finish, prepare

    name, options, config, training, step, evaluation, count = pickle.load(sys.stdin.buffer)
    idle = resident()
    with tempfile.TemporaryDirectory() as out:
        options = dataclasses.replace(options, out=out, publish=None)
        ready = prepare(get_method(name), options, config, training, lambda: load_base(options, training))
        Probe(ready).some_of_all(step, evaluation, count)
        ready.adapter.training_ended()
        with contextlib.suppress(TrainerError):  # of steps that diverged
            finish(ready, {})
    peak = resident("VmHWM")
    print("\n", "unknown" if peak is None or idle is None else peak - idle)


if __name__ == "__main__":
    main()
