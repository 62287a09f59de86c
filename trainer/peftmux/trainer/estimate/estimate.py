"""`--dry-run`: a few steps of the run itself, on its model with its method, tell what the whole run will take.

First tiny steps, whose tensors tell those of every batch that the run will have (`fit`). Then, on Linux, in one process
on a CPU, and where memory allows it, some of the run's own steps with the largest of these batches among them, in a
process of its own (`fresh`), because a process holds more than its tensors (`resident`): the estimate is what the
system counts above a process that has only imported things.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftmux.trainer.estimate.fit import SINGLE, SMALL, Shape, StepMemory
from peftmux.trainer.estimate.fresh import fresh_peak
from peftmux.trainer.estimate.probe import Probe
from peftmux.trainer.estimate.resident import available
from peftmux.trainer.run.prepared import Prepared

_ROOM = 1.6
"""Times the tensors' bytes that must be free before a step is tried."""
_TRIED = (6, 10, 6.0)
"""Of the run's steps at least and at most so many, and within these bounds so many seconds."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, of one process. `peak` is of the largest batch: what the parts below add up to.

    weights: of the base. trained, gradients, optimizer: of the adapter's tensors. activations: all other tensors that
    are alive at the peak; these five are `alive`. overhead: what else the process holds then, beside what it held
    before it had the base: holes of the C library's heap, workspaces of kernels, code that is loaded when it is first
    needed; less the weights that no batch reads (of an embedding that lies in a mapped file, the rows of other words).
    None where it is not known, as on other devices than a CPU or of several processes: then `peak` is `alive`. Over
    many steps it grows somewhat, above all in bfloat16 where batches have ever new sizes.

    steps: optimiser steps of the run; seconds: of one of them, None where it was not tried because memory would not
    have been enough. Not counted: an evaluation's larger batches, and what callbacks and loggers hold.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int | None
    batch: Shape
    steps: int
    seconds: float | None
    exact: bool

    @property
    def alive(self) -> int:
        return self.weights + self.trained + self.gradients + self.optimizer + self.activations

    @property
    def peak(self) -> int:
        return self.alive + (self.overhead or 0)

    def metrics(self) -> dict[str, float]:
        names = ("weights", "trained", "gradients", "optimizer", "activations", "alive", "peak")
        return {f"{name}_bytes": float(getattr(self, name)) for name in names}

    def text(self) -> str:
        rows = [("base model", self.weights), ("trained tensors", self.trained), ("gradients", self.gradients)]
        rows += [("optimiser state", self.optimizer), ("activations", self.activations)]
        if self.overhead is not None:
            rows.append(("beside tensors", self.overhead))
        of = "memory of one process, beside the idle process" if self.overhead is not None else "tensors of one process"
        lines = [of + ("" if self.exact else ", roughly") + ":"]
        lines += [f"  {name:<16} {size / 2**20:>10,.1f} MiB" for name, size in [*rows, ("peak", self.peak)]]
        b, t, k = self.batch
        lines.append(f"at the largest batch: {b} x {t} tokens, logits at {k} positions of each row")
        if self.seconds is not None:
            whole = self.steps * self.seconds
            lines.append(f"time: {self.steps:,} steps of about {self.seconds:.3g} s: {whole / 60:,.1f} min")
        return "\n".join(lines)


def estimate_run(ready: Prepared) -> Estimate:
    """Run a few steps, here and in a process of its own, and put the adapter back as it was."""
    before = {name: tensor.clone() for name, tensor in ready.adapter.state().items()}
    probe = Probe(ready)
    try:
        small = SINGLE if all(shape.rows == 1 for shape in probe.shapes) else SMALL
        memory = StepMemory(*zip(*map(probe.line, small), strict=True))
        batch = memory.largest(probe.shapes)
        alive = memory.peak(batch)
        seconds = probe.seconds() if alive < available(ready.model.device) else None
        overhead = _overhead(probe, memory, batch, ready, seconds)
    finally:
        ready.adapter.restore(before)
        ready.model.zero_grad(set_to_none=True)
    trained = sum(t.nbytes for t in ready.adapter.state().values())
    gradients = sum(p.nbytes for p in ready.adapter.parameters.values())
    optimizer = probe.optimizer_bytes()
    return Estimate(
        weights=probe.weights - trained,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(alive - probe.weights - gradients - optimizer, 0),
        overhead=overhead,
        batch=batch,
        steps=probe.steps,
        seconds=seconds,
        exact=memory.exact,
    )


def _overhead(probe: Probe, memory: StepMemory, batch: Shape, ready: Prepared, seconds: float | None) -> int | None:
    """What the process holds at its peak beside tensors; from fewer rows where all of them do not fit."""
    device = ready.model.device
    if device.type != "cpu" or ready.args.world_size > 1:
        return None
    tried = batch
    while memory.peak(tried) * _ROOM > available(device):
        if tried.rows == 1:
            return None
        tried = tried._replace(rows=tried.rows // 2)
    least, most, wanted = _TRIED
    measured = fresh_peak(ready, tried, max(least, min(most, round(wanted / (seconds or wanted)))))
    if measured is None:
        return None
    share = (memory.peak(batch) - probe.weights) / max(memory.peak(tried) - probe.weights, 1)
    return round((measured - memory.peak(tried)) * share)
