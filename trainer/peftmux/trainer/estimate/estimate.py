"""`--dry-run`: a few tiny steps of the run itself, on its model with its method, tell what the whole run will take."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from peftmux.trainer.data import Example
from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.data.preference import DESIRABLE, REFERENCE
from peftmux.trainer.estimate.fit import SINGLE, SMALL, Shape, StepMemory
from peftmux.trainer.estimate.live import LiveBytes, StepWatch
from peftmux.trainer.options import NEXT_TOKEN
from peftmux.trainer.prepared import Prepared, make_trainer, run_features

_BATCHES = 1000
"""Of the run's batches, in their order, as many are looked at."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, of one process. `peak` is of the largest batch: what the parts below add up to.

    activations: everything else that is alive at the peak. steps: optimiser steps of the run; seconds: of one of them,
    None where it was not tried because memory would not have been enough.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    batch: Shape
    steps: int
    seconds: float | None
    exact: bool

    def metrics(self) -> dict[str, float]:
        names = ("weights", "trained", "gradients", "optimizer", "activations", "peak")
        return {f"{name}_bytes": float(getattr(self, name)) for name in names}

    def text(self) -> str:
        rows = [("base model", self.weights), ("trained tensors", self.trained), ("gradients", self.gradients)]
        rows += [("optimiser state", self.optimizer), ("activations", self.activations), ("peak", self.peak)]
        lines = ["memory of one process, beside the idle process" + ("" if self.exact else ", roughly") + ":"]
        lines += [f"  {name:<16} {size / 2**20:>10,.1f} MiB" for name, size in rows]
        b, t, k = self.batch
        lines.append(f"at the largest batch: {b} x {t} tokens, logits at {k} positions of each row")
        if self.seconds is not None:
            whole = self.steps * self.seconds
            lines.append(f"time: {self.steps:,} steps of about {self.seconds:.3g} s: {whole / 60:,.1f} min")
        return "\n".join(lines)


def estimate_run(ready: Prepared) -> Estimate:
    """Run tiny steps and put the adapter back as it was.

    On a CPU the C library's heap may keep more than is alive; MALLOC_MMAP_THRESHOLD_=65536 in the environment makes it
    give back what is freed, at some cost of time.
    """
    before = {name: tensor.clone() for name, tensor in ready.adapter.state().items()}
    probe = _Probe(ready)
    try:
        small = SINGLE if all(shape.rows == 1 for shape in probe.shapes) else SMALL
        memory = StepMemory(*zip(*map(probe.line, small), strict=True))
        batch = memory.largest(probe.shapes)
        peak = memory.peak(batch)
        seconds = probe.seconds() if peak < _available(ready.model.device) else None
    finally:
        ready.adapter.restore(before)
        ready.model.zero_grad(set_to_none=True)
    trained = sum(t.nbytes for t in ready.adapter.state().values())
    gradients = sum(p.nbytes for p in ready.adapter.parameters.values())
    optimizer = probe.optimizer_bytes()
    activations = max(peak - probe.weights - gradients - optimizer, 0)
    return Estimate(
        weights=probe.weights - trained,
        trained=trained,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        peak=peak,
        batch=batch,
        steps=probe.steps,
        seconds=seconds,
        exact=memory.exact,
    )


class _Probe:
    """A trainer over synthetic batches of given sizes, and the sizes of the real ones."""

    def __init__(self, ready: Prepared) -> None:
        args = copy.copy(ready.args)
        args.max_steps = 2  # the optimiser's state is there from the second on
        args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.load_best_model_at_end, args.disable_tqdm, args.report_to = False, True, []
        self._ready = ready
        self._live = LiveBytes()
        self._watch = StepWatch(self._live)
        probe = dataclasses.replace(ready, args=args)
        self._trainer = make_trainer(probe, [self._watch], self._features(SMALL[0]))
        self.weights = self._live.hold([*ready.model.parameters(), *ready.model.buffers()])
        self.shapes, self.steps = self._real()

    def line(self, wanted: Shape) -> tuple[Shape, list[int]]:
        """A batch's size as it came out, and live bytes after each operation of a step over it."""
        with self._live:
            shape = self._run(wanted, wanted.rows)
        self._trainer.args.max_steps = 1
        return shape, self._watch.line

    def seconds(self) -> float:
        """Of a step over a batch of the middle size."""
        shape = sorted(self.shapes, key=lambda s: s.rows * s.tokens)[len(self.shapes) // 2]
        self._trainer.args.max_steps = 2
        self._run(shape, self._ready.args.per_device_train_batch_size)
        return self._watch.seconds * self._ready.args.gradient_accumulation_steps / self._accumulate

    def optimizer_bytes(self) -> int:
        optimizer = self._trainer.optimizer
        assert optimizer is not None
        values = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    @property
    def _accumulate(self) -> int:
        return self._trainer.args.gradient_accumulation_steps

    def _run(self, wanted: Shape, rows: int) -> Shape:
        features = self._features(wanted) * (rows * self._accumulate * 2)
        self._trainer.train_dataset = features
        self._trainer.args.per_device_train_batch_size = self._trainer._train_batch_size = rows
        self._trainer.train()
        return _shape(self._trainer.data_collator(features[:rows]))

    def _features(self, wanted: Shape) -> list[dict[str, Any]]:
        """One row of data, of ids and a label that the data has; `rows` is left to the batch."""
        example = self._ready.data.encoded.examples[0]
        seen, label = example.input_ids, next(label for label in example.labels if label != IGNORED)
        ids = [seen[i % len(seen)] for i in range(wanted.tokens)]
        first = wanted.tokens - wanted.kept + 1
        row = Example(ids, [IGNORED] * first + [label] * (wanted.tokens - first)).feature()
        if self._ready.options.packing:
            half = wanted.tokens // 2
            halves = [Example(part, [label] * len(part)).feature() for part in (ids[:half], ids[half:])]
            return [{"rows": halves, "length": wanted.tokens}]
        if self._ready.options.loss != NEXT_TOKEN:
            return [{"pair": [row, row], "input_ids": ids, REFERENCE: [0.0, 0.0], DESIRABLE: True}]
        return [row]

    def _real(self) -> tuple[list[Shape], int]:
        """The sizes of the run's first batches, in its own order, and how many steps it has."""
        args, trainer = self._ready.args, self._trainer
        features = run_features(self._ready, self._ready.data)
        for feature in features:
            feature[REFERENCE] = [0.0, 0.0]
        set_seed(args.seed)
        own, trainer.args = trainer.args, args
        trainer.train_dataset, trainer._train_batch_size = features, args.train_batch_size
        loader = trainer.get_train_dataloader()
        trainer.args = own
        per_epoch = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        epochs, rest = divmod(steps, per_epoch)
        count = min(epochs * len(loader) + rest * args.gradient_accumulation_steps, _BATCHES)
        return [_shape(batch) for batch in itertools.islice(_epochs(loader), count)], steps


def _epochs(loader: Any) -> Iterator[Mapping[str, Any]]:
    for epoch in itertools.count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader


def _shape(batch: Mapping[str, Any]) -> Shape:
    rows, tokens = batch["input_ids"].shape
    return Shape(rows, tokens, batch["labels"].shape[1])


def _available(device: torch.device) -> int:
    """Bytes that a run may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        words = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(words.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
