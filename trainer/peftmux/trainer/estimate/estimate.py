"""`--dry-run`: a few steps of the run itself, on its model with its method, tell what the whole run will take.

First tiny steps, whose tensors tell those of every batch that the run will have (`fit`). Then, on Linux, in one process
on a CPU, and where memory allows it, some of the run's own steps with the largest of these batches among them, in a
process of its own (`fresh`), because a process holds more than its tensors (`resident`): the estimate is what the
system counts above a process that has only imported things.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Bytes, of one process. `peak` is of the largest batch: what the parts below add up to. It may be one without
    gradients, of an evaluation or of pairs that the base itself scores.

    weights: of the base. trained, gradients, optimizer: of the adapter's tensors. activations: all other tensors that
    are alive at the peak; these five are `alive`. overhead: what else the process holds then, beside what it held
    before it had the base: holes of the C library's heap, workspaces of kernels, code that is loaded when it is first
    needed; less the weights that no batch reads (of an embedding that lies in a mapped file, the rows of other words).
    None where it is not known, as on other devices than a CPU or of several processes: then `peak` is `alive`. Over
    many steps it grows somewhat, above all in bfloat16 where batches have ever new sizes.

    steps: optimiser steps of the run; seconds: of one of them, None where it was not tried because memory would not
    have been enough, and without evaluations. Not counted: what callbacks and loggers hold.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int | None
    batch: Shape
    gradient: bool
    """Of the largest batch."""
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
        kind = "" if self.gradient else ", one without gradients"
        lines.append(f"at the largest batch{kind}: {b} x {t} tokens, logits at {k} positions of each row")
        if self.seconds is not None:
            whole = self.steps * self.seconds
            lines.append(f"time: {self.steps:,} steps of about {self.seconds:.3g} s: {whole / 60:,.1f} min")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What passes of one kind hold, and their largest batch."""

    memory: StepMemory
    batch: Shape

    @classmethod
    def of(cls, line: Callable[[Shape], tuple[Shape, list[int]]], shapes: Sequence[Shape]) -> _Pass:
        """line: tries a small batch. shapes: the run's."""
        small = SINGLE if all(shape.rows == 1 for shape in shapes) else SMALL
        memory = StepMemory(*zip(*map(line, small), strict=True))
        return cls(memory, memory.largest(shapes))

    @property
    def alive(self) -> int:
        return self.memory.peak(self.batch)

    def fitting(self, room: float) -> _Pass | None:
        """With fewer rows where all of them do not fit; None where one does not."""
        tried = self.batch
        while self.memory.peak(tried) * _ROOM > room:
            if tried.rows == 1:
                return None
            tried = tried._replace(rows=tried.rows // 2)
        return _Pass(self.memory, tried)


def estimate_run(ready: Prepared) -> Estimate:
    """Run a few steps, here and in a process of its own, and put the adapter back as it was."""
    before = {name: tensor.clone() for name, tensor in ready.adapter.state().items()}
    probe = Probe(ready)
    try:
        passes = [_Pass.of(probe.line, probe.shapes)]
        if probe.evaluated:
            passes.append(_Pass.of(probe.evaluation_line, probe.evaluated))
        highest = max(passes, key=lambda one: one.alive)
        seconds = probe.seconds() if highest.alive < available(ready.model.device) else None
        overhead = _overhead(probe.weights, passes, ready, seconds)
    finally:
        ready.adapter.restore(before)
        ready.model.zero_grad(set_to_none=True)
    trained = sum(t.nbytes for t in ready.adapter.state().values())
    gradients = sum(p.nbytes for p in ready.adapter.parameters.values()) if highest is passes[0] else 0
    optimizer = probe.optimizer_bytes()
    return Estimate(
        weights=probe.weights - trained,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=max(highest.alive - probe.weights - gradients - optimizer, 0),
        overhead=overhead,
        batch=highest.batch,
        gradient=highest is passes[0],
        steps=probe.steps,
        seconds=seconds,
        exact=highest.memory.exact,
    )


def _overhead(weights: int, passes: Sequence[_Pass], ready: Prepared, seconds: float | None) -> int | None:
    """What the process holds at its peak beside tensors; from fewer rows where all of them do not fit."""
    device = ready.model.device
    if device.type != "cpu" or ready.args.world_size > 1:
        return None
    tried = [fitting for one in passes if (fitting := one.fitting(available(device))) is not None]
    if len(tried) < len(passes):
        return None
    least, most, wanted = _TRIED
    count = max(least, min(most, round(wanted / (seconds or wanted))))
    measured = fresh_peak(ready, tried[0].batch, tried[1].batch if tried[1:] else None, count)
    if measured is None:
        return None
    whole, part = (max(one.alive for one in these) for these in (passes, tried))
    return round((measured - part) * (whole - weights) / max(part - weights, 1))
