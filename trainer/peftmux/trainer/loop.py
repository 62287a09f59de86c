"""One training run from options to adapter files; transformers' Trainer is the loop."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from peftmux.trainer.arguments import checked_learning_rate, reported_arguments, training_arguments
from peftmux.trainer.base_model import load_base, longest_row
from peftmux.trainer.card import CardFacts, DataFacts, model_card
from peftmux.trainer.data import (
    PackedCollator,
    PaddingCollator,
    check_packing,
    encode_rows,
    file_digest,
    pack_features,
    read_rows,
)
from peftmux.trainer.errors import OptionError, TrainerError
from peftmux.trainer.export import export_adapter, publish
from peftmux.trainer.host import Host
from peftmux.trainer.huggingface_trainer import AdapterTrainer, newest_checkpoint
from peftmux.trainer.methods import AttachContext, AttachedAdapter, Method
from peftmux.trainer.options import RunOptions
from peftmux.trainer.summary import trainable_summary

_PACK = 512
"""Tokens."""
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""One switch under its older and its newer name; transformers before 5.20 or so has the first alone."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves. `model` is live, in evaluation mode, and computes with `adapter`; `digest` names the content.

    metrics: the Trainer's own (train_loss, train_runtime in seconds, eval_loss, ...). After a dry run: steps 0.
    """

    out: Path
    digest: str
    steps: int
    metrics: Mapping[str, float]
    model: Any
    tokenizer: Any
    adapter: AttachedAdapter


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run needs, checked; the adapter is in the model."""

    method: Method
    options: RunOptions
    config: Any
    training: Mapping[str, Any]
    model: Any
    tokenizer: Any
    args: TrainingArguments
    data: DataFacts
    eval_data: DataFacts | None
    adapter: AttachedAdapter
    base_parameters: int


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
    ready = prepare(method, options, config, training, lambda: load_base(options))
    print(trainable_summary(ready.adapter, ready.base_parameters), file=sys.stderr)
    if options.dry_run:
        return TrainResult(Path(options.out), "", 0, {}, ready.model, ready.tokenizer, ready.adapter)
    trainer = make_trainer(ready, callbacks)
    metrics = _train(trainer, options)
    digest = finish(ready, metrics)
    if options.early_stopping_patience and not {"save_strategy", "output_dir"} & training.keys():
        shutil.rmtree(ready.args.output_dir or "", ignore_errors=True)  # written only to come back to the best
    steps = trainer.state.global_step
    return TrainResult(Path(options.out), digest, steps, metrics, ready.model, ready.tokenizer, ready.adapter)


def prepare(
    method: Method,
    options: RunOptions,
    config: Any,
    training: Mapping[str, Any],
    base: Callable[[], tuple[Any, Any]],
) -> Prepared:
    """What can be refused cheaply is refused first. `base` gives the model and its tokenizer."""
    _check_out(options)
    checked_learning_rate(training.get("learning_rate", 0.0))
    rows = read_rows(options.data)
    eval_rows = read_rows(options.eval_data) if options.eval_data else None
    model, tokenizer = base()
    args = training_arguments(options, training, method.learning_rate(model.config.get_text_config().hidden_size))
    base_parameters = model.num_parameters()
    limit = min(options.max_length or sys.maxsize, longest_row(model, getattr(config, "num_virtual_tokens", 0)))
    if limit < 2:
        raise OptionError("num-virtual-tokens", f"expected room for a row in the model's context, found {limit} tokens")
    data = _encode(options.data, rows, tokenizer, options, limit)
    eval_data = _encode(options.eval_data, eval_rows, tokenizer, options, limit) if options.eval_data else None

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    with Host.of(model).aside():
        adapter = method.attach(model, config, AttachContext(args.seed, data.encoded.examples, tokenize))
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
        training={"dtype": str(ready.model.dtype), **reported_arguments(ready.args, ready.training)},
        metrics=metrics,
        trained_parameters=sum(ready.adapter.sites().values()),
        base_parameters=ready.base_parameters,
        data=ready.data,
        eval_data=ready.eval_data,
        notes=ready.adapter.notes,
    )
    digest = export_adapter(ready.adapter, ready.options.model, ready.options.out, model_card(facts))
    if ready.options.publish:
        publish(ready.options.out, ready.options.publish)
    return digest


def _check_out(options: RunOptions) -> None:
    out = Path(options.out)
    if out.is_file():
        raise OptionError("out", f"expected a folder or nothing at {out}, found a file")
    if out.is_dir() and any(out.iterdir()) and not (options.overwrite or options.dry_run):
        raise OptionError("out", f"{out} is not empty; give --overwrite to replace the adapter in it")


def _encode(path: str, rows: Any, tokenizer: Any, options: RunOptions, limit: int) -> DataFacts:
    encoded = encode_rows(
        rows, tokenizer, path, max_length=limit, over_long=options.over_long, append_eos=options.append_eos
    )
    return DataFacts(Path(path).name, file_digest(path), encoded)


def make_trainer(ready: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> AdapterTrainer:
    args, data = ready.args, ready.data
    names = [name for name in CHECKPOINTING if getattr(args, name, None)]
    if names and ready.adapter.checkpoint_activations():
        for name in names:
            setattr(args, name, False)
    patience = ready.options.early_stopping_patience
    run = {"options": dataclasses.asdict(ready.config), "data": data.sha256, "seed": args.seed}
    shape = _packed if ready.options.packing else _padded
    return AdapterTrainer(
        ready.adapter,
        {"method": ready.method.name, **run},
        model=ready.model,
        args=args,
        train_dataset=shape(ready, data),
        eval_dataset=shape(ready, ready.eval_data) if ready.eval_data else None,
        data_collator=_collator(ready),
        callbacks=[*callbacks, *([EarlyStoppingCallback(patience)] if patience else [])],
    )


def _check_finite(adapter: AttachedAdapter) -> None:
    for name, parameter in adapter.parameters.items():
        if not parameter.isfinite().all():
            raise TrainerError(f"the run diverged ({name} is not finite): nothing written; try a lower learning rate")


def _padded(ready: Prepared, data: DataFacts) -> list[dict[str, Any]]:
    return data.encoded.features()


def _packed(ready: Prepared, data: DataFacts) -> list[dict[str, Any]]:
    """Packs of the data's rows. Raises OptionError where packing is not exact."""
    if ready.adapter.prefix or ready.adapter.virtual:
        raise OptionError("packing", f"{ready.method.name} puts something in front of each row: train without packing")
    features = data.encoded.features()
    check_packing(ready.model, features)
    return pack_features(features, ready.options.pack_length or max(_PACK, max(len(f["input_ids"]) for f in features)))


def _collator(ready: Prepared) -> PaddingCollator | PackedCollator:
    tokenizer = ready.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if ready.options.packing:
        return PackedCollator(pad or 0)
    return PaddingCollator(pad or 0, "logits_to_keep" in inspect.signature(ready.model.forward).parameters)


def _train(trainer: AdapterTrainer, options: RunOptions) -> dict[str, float]:
    checkpoint = None
    if options.resume:
        folder = Path(trainer.args.output_dir or ".")
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            message = f"found no complete checkpoint in {folder}; --save-strategy steps writes them"
            raise OptionError("resume", message)
    metrics: dict[str, float] = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    if options.eval_data:
        metrics.update(trainer.evaluate())
    return {name: value for name, value in metrics.items() if name not in ("total_flos", "epoch")}
