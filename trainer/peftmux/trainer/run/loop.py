"""One training run from options to adapter files; transformers' Trainer is the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from peftmux.trainer.data import Row, label_names
from peftmux.trainer.data.lengths import Lengths
from peftmux.trainer.errors import DataError, OptionError, TrainerError
from peftmux.trainer.estimate import estimate_run
from peftmux.trainer.files.card import CardFacts, DataFacts, model_card
from peftmux.trainer.files.export import export_adapter, publish
from peftmux.trainer.files.outputs import check_out, check_output_dir, claimed
from peftmux.trainer.files.served import check_served
from peftmux.trainer.host.host import Host
from peftmux.trainer.methods import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.task_head import HeadedAdapter, TaskHead
from peftmux.trainer.run.base_model import load_base, longest_row
from peftmux.trainer.run.checkpoints import check_same_run, checkpoints_held, resume_point
from peftmux.trainer.run.data_files import DataFiles
from peftmux.trainer.run.huggingface_trainer import AdapterTrainer
from peftmux.trainer.run.prepared import Prepared, make_trainer
from peftmux.trainer.run.summary import trainable_summary
from peftmux.trainer.settings.arguments import reported_arguments, training_arguments
from peftmux.trainer.settings.options import NEXT_TOKEN, SEVERAL, RunOptions

PREFERENCE_RATE = 0.1
"""A preference loss's default learning rate beside the method's own: the model is to be bent, not taught."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves. `model` is live, in evaluation mode, and computes with `adapter`; `digest` names the content.

    Of several processes the first one writes the adapter; in the others the digest is "".
    metrics: the Trainer's own (train_loss, train_runtime in seconds, eval_loss, ...). After a dry run: steps 0, and the
    estimate in bytes (peak_bytes, ...).
    """

    out: Path
    digest: str
    steps: int
    metrics: Mapping[str, float]
    model: Any
    tokenizer: Any
    adapter: AttachedAdapter


def run_training(
    method: Method,
    options: RunOptions,
    config: Any,
    training: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Load, attach, train, evaluate, export. `training`: TrainingArguments by name, where they differ from ours.

    Nothing is at `options.out` before the run has succeeded. Raises TrainerError for bad options or data.
    """
    for name in SEVERAL:
        if getattr(options, name) is not None:
            raise OptionError(name, f"trains several adapters: run `peftmux train {method.name} --{name}`")
    with contextlib.ExitStack() as holds:
        ready = prepare(method, options, config, training, lambda: load_base(options, training), holds=holds)
        return _run(ready, callbacks)


def _run(ready: Prepared, callbacks: Sequence[TrainerCallback]) -> TrainResult:
    options = ready.options
    first = ready.args.process_index == 0
    if first:
        print(trainable_summary(ready.adapter, ready.base_parameters), file=sys.stderr)
    if options.dry_run:
        estimate = estimate_run(ready)
        if first:
            print(estimate.text(), file=sys.stderr)
        metrics = estimate.metrics()
        return TrainResult(Path(options.out), "", 0, metrics, ready.model, ready.tokenizer, ready.adapter)
    trainer = make_trainer(ready, callbacks)
    metrics = train_and_evaluate(trainer, options)
    digest = finish(ready, metrics)
    steps = trainer.state.global_step
    return TrainResult(Path(options.out), digest, steps, metrics, ready.model, ready.tokenizer, ready.adapter)


def prepare(
    method: Method,
    options: RunOptions,
    config: Any,
    training: Mapping[str, Any],
    base: Callable[[], tuple[Any, Any]],
    files: DataFiles | None = None,
    holds: contextlib.ExitStack | None = None,
) -> Prepared:
    """What can be refused cheaply is refused first. `base` gives the model and its tokenizer; `files` are those of all
    runs that are made ready on it. `options.out` is claimed until `holds` is closed; without it, not at all."""
    files = files or DataFiles()
    places_tokens = method.places_tokens(config)
    if places_tokens and options.loss != NEXT_TOKEN:
        raise OptionError("loss", f"{options.loss} is not for {method.name}, whose tokens stand inside of the rows")
    args = training_arguments(options, training)
    if args.process_index == 0:  # of several the one that writes
        if holds is not None and not options.dry_run:
            holds.enter_context(claimed(options.out))
        check_out(options)
        if not options.dry_run:
            check_output_dir(args)
    _check_resume(method, options, config, args, files)
    rows = files.rows(options.data, options)
    eval_rows = files.rows(options.eval_data, options) if options.eval_data else []
    labels = label_names(rows, options.labels) if options.task != "generation" else ()
    model, tokenizer = base()
    rate = method.default_rate(config, model.config.get_text_config().hidden_size)
    if "learning_rate" not in training:
        args.learning_rate = rate if options.loss == NEXT_TOKEN else rate * PREFERENCE_RATE
    reserved = _reserved(config, options.task, [*rows, *eval_rows])
    limit = longest_row(model, reserved)
    if limit < 2:
        raise OptionError("num-virtual-tokens", f"expected room for a row in the model's context, found {limit} tokens")
    limit, data = _limited(options, args, limit, lambda n: files.encoded(options.data, tokenizer, options, n, labels))
    eval_data = files.encoded(options.eval_data, tokenizer, options, limit, labels) if options.eval_data else None
    _check_known(data, options.data, model)
    if eval_data is not None:
        _check_known(eval_data, options.eval_data, model)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    with Host.of(model).aside():
        base_parameters = model.num_parameters()
        context = AttachContext(args.seed, data.encoded.examples, tokenize, labels, options.task)
        adapter = method.attach(model, config, context)
        if options.task != "generation":
            adapter = HeadedAdapter(adapter, TaskHead(model, options.task, labels, args.seed), model)
        check_served(adapter, options.model, model)
    if not adapter.takes_images and any(row.images for row in [*rows, *eval_rows]):
        raise OptionError("data", f"its rows have images, from which {method.name} cannot learn: train vora")
    if places_tokens:
        data = _placed(data, adapter, options.data)
        eval_data = eval_data and _placed(eval_data, adapter, options.eval_data)
    return Prepared(
        method, options, config, training, model, tokenizer, args, data, eval_data, adapter, base_parameters
    )


def finish(ready: Prepared, metrics: Mapping[str, float]) -> str:
    """Write the adapter and its card to `options.out`, and publish it. Returns its digest ("" but in one process)."""
    ready.model.eval()
    _check_finite(ready.adapter)
    if not ready.args.should_save:  # one process of several writes
        return ""
    facts = CardFacts(
        method=ready.method.name,
        base_model=ready.options.model,
        config=ready.config,
        training={
            "dtype": str(ready.model.dtype),
            **ready.loss_options(),
            **reported_arguments(ready.args, ready.training),
        },
        metrics=metrics,
        trained_parameters=sum(ready.adapter.sites().values()),
        base_parameters=ready.base_parameters,
        data=ready.data,
        eval_data=ready.eval_data,
        notes=ready.adapter.notes,
        task=ready.options.task,
    )
    digest = export_adapter(ready.adapter, ready.options.model, ready.options.out, model_card(facts))
    if ready.options.publish:
        publish(ready.options.out, ready.options.publish)
    remove_unasked(ready.options, ready.training, Path(ready.args.output_dir or "."))
    return digest


def _check_resume(method: Method, options: RunOptions, config: Any, args: TrainingArguments, files: DataFiles) -> None:
    """Before anything is loaded; the Trainer compares the rest."""
    checkpoint = resume_point(options, args)
    if checkpoint is not None and Path(options.data).is_file():
        run = {"options": dataclasses.asdict(config), "data": files.digest(options.data), "seed": args.seed}
        check_same_run(checkpoint, {"method": method.name, **run})


def _limited(
    options: RunOptions, args: TrainingArguments, most: int, encode: Callable[[int], DataFacts]
) -> tuple[int, DataFacts]:
    """How long a row may be, of at most so many tokens, and the rows. `auto` is what the data propose, where rows may
    be cut off or left out; it is said in any case."""
    if options.max_length != "auto":
        limit = min(most, options.max_length or most)
        return limit, encode(limit)
    whole = encode(sys.maxsize)
    lengths = Lengths.of([len(feature["input_ids"]) for feature in whole.encoded.features()])
    if args.process_index == 0:
        print(lengths.text(), file=sys.stderr)
    limit = most if options.over_long == "error" else min(most, lengths.proposed)
    return limit, whole if lengths.sorted[-1] <= limit else encode(limit)


def _reserved(config: Any, task: str, rows: Sequence[Row]) -> int:
    """Positions that virtual tokens take, and the images of the row that has most."""
    given = getattr(config, "num_virtual_tokens", 0)
    images = max(len(row.images or ()) for row in rows) * getattr(config, "image_tokens", 0)
    return images + int(config.default_length(task) if given is None else given)


def _check_known(data: DataFacts, path: str | None, model: Any) -> None:
    """Raises DataError for a token that was added to the tokenizer without a row in the base's embedding."""
    rows = model.get_input_embeddings().num_embeddings
    for example in data.encoded.examples:
        if (most := max(example.input_ids)) >= rows:
            message = f"token {most} of the tokenizer is not in the base's embedding, which has {rows} rows"
            raise DataError(path or data.name, example.line, message)


def _placed(data: DataFacts, adapter: AttachedAdapter, path: str | None) -> DataFacts:
    examples = []
    for example in data.encoded.examples:
        try:
            examples.append(adapter.place(example))
        except OptionError as error:
            raise DataError(path or data.name, example.line, str(error)) from None
    return dataclasses.replace(data, encoded=dataclasses.replace(data.encoded, examples=examples))


def _check_finite(adapter: AttachedAdapter) -> None:
    for name, parameter in adapter.parameters.items():
        if not parameter.isfinite().all():
            raise TrainerError(f"the run diverged ({name} is not finite): nothing written; try a lower learning rate")


def remove_unasked(options: RunOptions, training: Mapping[str, Any], folder: Path) -> None:
    """Checkpoints that were written only to come back to the best. The folder goes too, unless a tracker has written
    there."""
    if not options.early_stopping_patience or {"save_strategy", "output_dir"} & training.keys():
        return
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def train_and_evaluate(trainer: AdapterTrainer, options: RunOptions) -> dict[str, float]:
    """From the start, or from a checkpoint. Returns the Trainer's metrics."""
    with checkpoints_held(trainer.args):
        checkpoint = resume_point(options, trainer.args)
        metrics: dict[str, float] = trainer.train(
            resume_from_checkpoint=str(checkpoint) if checkpoint else None
        ).metrics
    if not trainer.state.global_step:
        raise TrainerError("no step was made: nothing written; the data give no whole batch")
    trainer.adapter.training_ended()
    if options.eval_data:
        metrics.update(trainer.final_evaluation())
    return {name: value for name, value in metrics.items() if name not in ("total_flos", "epoch")}
