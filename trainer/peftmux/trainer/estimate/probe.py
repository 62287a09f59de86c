"""A run's own Trainer over batches of chosen sizes: what it holds after each operation, and at its highest."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import set_seed

from peftmux.trainer.data import Example
from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.data.preference import DESIRABLE, REFERENCE
from peftmux.trainer.estimate.fit import SMALL, Shape
from peftmux.trainer.estimate.live import LiveBytes, StepWatch
from peftmux.trainer.files.card import DataFacts
from peftmux.trainer.run.huggingface_trainer import PlainLog
from peftmux.trainer.run.prepared import Prepared, make_trainer, run_features
from peftmux.trainer.settings.argument_checks import plain
from peftmux.trainer.settings.options import NEXT_TOKEN

_BATCHES = 1000
"""Of the run's batches, in their order, as many are looked at."""
_ROUNDS = 3
"""Evaluations that are tried, where the run has more."""


class Probe:
    """A trainer over synthetic batches of given sizes, and the sizes of the real ones."""

    def __init__(self, ready: Prepared) -> None:
        args = copy.copy(ready.args)
        args.max_steps = 2  # the optimiser's state is there from the second on
        args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.load_best_model_at_end, args.disable_tqdm, args.report_to = False, True, []
        args.eval_on_start = False
        self._ready = ready
        self._live = LiveBytes()
        self._watch = StepWatch(self._live)
        probe = dataclasses.replace(ready, args=args)
        self._trainer = make_trainer(probe, [self._watch], self._features(SMALL[0]))
        self._trainer.remove_callback(PlainLog)
        self.weights = self._live.hold([*ready.model.parameters(), *ready.model.buffers()])
        args = ready.args
        self._per_epoch = max(math.ceil(len(self._loader()) / args.gradient_accumulation_steps), 1)
        self.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self._per_epoch)
        self.shapes = [_shape(batch) for batch in self._batches()]
        self.evaluated = [_shape(batch) for batch in self._evaluation_batches()]
        """Of the batches without gradients: an evaluation's, and those of pairs that the base itself scores."""

    def line(self, wanted: Shape) -> tuple[Shape, list[int]]:
        """A batch's size as it came out, and live bytes after each operation of a step over it."""
        with self._live:
            shape = self._run(wanted, wanted.rows)
        self._trainer.args.max_steps = 1
        return shape, self._watch.take()

    def evaluation_line(self, wanted: Shape) -> tuple[Shape, list[int]]:
        """As `line`, of a pass without gradients; after it, as the optimiser has its state then."""
        features = self._features(wanted) * wanted.rows
        with self._live:
            self._live.begin()
            self._evaluate(features, wanted.rows)
            line = self._live.end()
        return _shape(self._trainer.data_collator(features)), line

    def seconds(self) -> float:
        """Of a step over a batch of the middle size."""
        shape = sorted(self.shapes, key=lambda s: s.rows * s.tokens)[len(self.shapes) // 2]
        self._trainer.args.max_steps = 2
        self._run(shape, self._ready.args.per_device_train_batch_size)
        return self._watch.seconds * self._ready.args.gradient_accumulation_steps / self._accumulate

    def some_steps(self, largest: Shape, steps: int) -> None:
        """The run's first steps, with a batch of this size among them; of made up batches where the run has none such.

        What rows hold decides which experts a token goes to, and batches of many sizes make more holes.
        """
        count = min(steps, self.steps) * self._accumulate
        batches = list(itertools.islice(self._batches(), count))
        if largest not in map(_shape, batches):
            batches[-1:] = (batch for batch in self._batches() if _shape(batch) == largest)
        self._trainer.args.max_steps = min(steps, self.steps)
        if len(batches) < count:
            self._run(largest, largest.rows)
            return
        self._trainer.args.per_device_train_batch_size = self._trainer._train_batch_size = 1
        with self._as_they_are():
            self._trainer.train_dataset = batches[:count]
            self._trainer.train()

    def some_of_all(self, step: Shape, evaluation: Shape | None, count: int) -> None:
        """As many steps, with evaluations in between where the run has some there: what these leave of the heap in
        holes, steps cut up. Pairs are scored first."""
        if evaluation is not None and self._ready.options.loss != NEXT_TOKEN:
            self.some_evaluations(evaluation, count)
        evaluations = min(self._evaluations(), _ROUNDS) if evaluation is not None else 0
        rounds = max(evaluations, 1)
        for _ in range(rounds):
            self.some_steps(step, math.ceil(count / rounds))
            if evaluation is not None and evaluations:
                self.some_evaluations(evaluation, count)

    def _evaluations(self) -> int:
        """How many the run will have, at most one at each of the steps that it counts by."""
        args = self._ready.args
        if self._ready.eval_data is None:
            return 0
        each: float = {"steps": args.eval_steps, "epoch": self._per_epoch}.get(plain(args.eval_strategy)) or self.steps
        every = each if each >= 1 else math.ceil(each * self.steps)  # a share of the run
        return math.ceil(self.steps / every)

    def some_evaluations(self, largest: Shape, count: int) -> None:
        """As `some_steps`, without gradients."""
        batches = list(itertools.islice(self._evaluation_batches(), count))
        if largest not in map(_shape, batches):
            found = [batch for batch in self._evaluation_batches() if _shape(batch) == largest]
            if not found:
                self._evaluate(self._features(largest) * largest.rows, largest.rows)
                return
            batches[-1:] = found[:1]
        with self._as_they_are():
            self._evaluate(batches, 1)

    def optimizer_bytes(self) -> int:
        optimizer = self._trainer.optimizer
        assert optimizer is not None
        values = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    @property
    def _accumulate(self) -> int:
        return self._trainer.args.gradient_accumulation_steps

    def _run(self, wanted: Shape, rows: int) -> Shape:
        features = self._features(wanted) * (rows * self._accumulate * self._trainer.args.max_steps)
        self._trainer.train_dataset = features
        self._trainer.args.per_device_train_batch_size = self._trainer._train_batch_size = rows
        self._trainer.train()
        return _shape(self._trainer.data_collator(features[:rows]))

    def _evaluate(self, rows: Sequence[Any], batch: int) -> None:
        self._trainer.args.per_device_eval_batch_size = batch
        self._trainer.evaluate(eval_dataset=rows)

    @contextmanager
    def _as_they_are(self) -> Iterator[None]:
        """Within it a row of the data is a batch, which is collated already."""
        collator = self._trainer.data_collator
        self._trainer.data_collator = _only
        try:
            yield
        finally:
            self._trainer.data_collator = collator

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

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        """The run's first batches, in its own order."""
        loader = self._loader()
        args = self._ready.args
        epochs, rest = divmod(self.steps, self._per_epoch)
        count = min(epochs * len(loader) + rest * args.gradient_accumulation_steps, _BATCHES)
        return itertools.islice(_epochs(loader), count)

    def _loader(self) -> Any:
        args, trainer = self._ready.args, self._trainer
        set_seed(args.seed)
        trainer.train_dataset, trainer._train_batch_size = self._rows(self._ready.data), args.train_batch_size
        with self._own_arguments():
            return trainer.get_train_dataloader()

    def _evaluation_batches(self) -> Iterator[Mapping[str, Any]]:
        data = [self._ready.eval_data, self._ready.data if self._ready.options.loss != NEXT_TOKEN else None]
        with self._own_arguments():
            loaders = [self._trainer.get_eval_dataloader(self._rows(part)) for part in data if part]
        return itertools.islice(itertools.chain(*loaders), _BATCHES)

    @contextmanager
    def _own_arguments(self) -> Iterator[None]:
        """Within it the Trainer has the run's."""
        probes, self._trainer.args = self._trainer.args, self._ready.args
        try:
            yield
        finally:
            self._trainer.args = probes

    def _rows(self, data: DataFacts) -> Any:
        features = run_features(self._ready, data)
        for feature in features:
            feature[REFERENCE] = [0.0, 0.0]
        return features


def _only(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    (batch,) = batches
    return dict(batch)


def _epochs(loader: Any) -> Iterator[Mapping[str, Any]]:
    for epoch in itertools.count():
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from loader


def _shape(batch: Mapping[str, Any]) -> Shape:
    rows, tokens = batch["input_ids"].shape
    return Shape(rows, tokens, batch["labels"].shape[1])
