"""One training run from options to adapter files; transformers' Trainer is the loop."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from peftmux.trainer.arguments import reported_arguments, training_arguments
from peftmux.trainer.base_model import load_base, longest_row
from peftmux.trainer.card import CardFacts, DataFacts, model_card
from peftmux.trainer.data import PaddingCollator, encode_rows, file_digest, read_rows
from peftmux.trainer.errors import OptionError, TrainerError
from peftmux.trainer.export import export_adapter
from peftmux.trainer.huggingface_trainer import AdapterTrainer, newest_checkpoint
from peftmux.trainer.methods import AttachContext, AttachedAdapter, Method
from peftmux.trainer.options import RunOptions
from peftmux.trainer.summary import trainable_summary

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
class _Prepared:
    """Everything a run needs, checked; the adapter is in the model."""

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
    ready = _prepare(method, options, config, training)
    print(trainable_summary(ready.adapter, ready.base_parameters), file=sys.stderr)
    if options.dry_run:
        return TrainResult(Path(options.out), "", 0, {}, ready.model, ready.tokenizer, ready.adapter)
    trainer = _trainer(method, options, config, ready, callbacks)
    metrics = _train(trainer, options)
    ready.model.eval()
    _check_finite(ready.adapter)
    digest = ""
    if ready.args.should_save:  # one process of several
        facts = CardFacts(
            method=method.name,
            base_model=options.model,
            config=config,
            training={"dtype": str(ready.model.dtype), **reported_arguments(ready.args, training)},
            metrics=metrics,
            trained_parameters=sum(ready.adapter.sites().values()),
            base_parameters=ready.base_parameters,
            data=ready.data,
            eval_data=ready.eval_data,
            notes=ready.adapter.notes,
        )
        digest = export_adapter(ready.adapter, options.model, options.out, model_card(facts))
    if options.early_stopping_patience and not {"save_strategy", "output_dir"} & training.keys():
        shutil.rmtree(ready.args.output_dir or "", ignore_errors=True)  # written only to come back to the best
    steps = trainer.state.global_step
    return TrainResult(Path(options.out), digest, steps, metrics, ready.model, ready.tokenizer, ready.adapter)


def _prepare(method: Method, options: RunOptions, config: Any, training: Mapping[str, Any]) -> _Prepared:
    """What can be refused cheaply is refused first."""
    _check_out(options)
    rows = read_rows(options.data)
    eval_rows = read_rows(options.eval_data) if options.eval_data else None
    model, tokenizer = load_base(options)
    args = training_arguments(options, training, method.learning_rate(model.config.get_text_config().hidden_size))
    base_parameters = model.num_parameters()
    limit = min(options.max_length or sys.maxsize, longest_row(model, getattr(config, "num_virtual_tokens", 0)))
    if limit < 2:
        raise OptionError("num-virtual-tokens", f"expected room for a row in the model's context, found {limit} tokens")
    data = _encode(options.data, rows, tokenizer, options, limit)
    eval_data = _encode(options.eval_data, eval_rows, tokenizer, options, limit) if options.eval_data else None

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    adapter = method.attach(model, config, AttachContext(args.seed, data.encoded.examples, tokenize))
    return _Prepared(model, tokenizer, args, data, eval_data, adapter, base_parameters)


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


def _trainer(
    method: Method, options: RunOptions, config: Any, ready: _Prepared, callbacks: Sequence[TrainerCallback]
) -> AdapterTrainer:
    args, data = ready.args, ready.data
    names = [name for name in CHECKPOINTING if getattr(args, name, None)]
    if names and ready.adapter.checkpoint_activations():
        for name in names:
            setattr(args, name, False)
    patience = options.early_stopping_patience
    return AdapterTrainer(
        ready.adapter,
        {"method": method.name, "options": dataclasses.asdict(config), "data": data.sha256, "seed": args.seed},
        model=ready.model,
        args=args,
        train_dataset=data.encoded.features(),
        eval_dataset=ready.eval_data.encoded.features() if ready.eval_data else None,
        data_collator=_collator(ready.model, ready.tokenizer),
        callbacks=[*callbacks, *([EarlyStoppingCallback(patience)] if patience else [])],
    )


def _check_finite(adapter: AttachedAdapter) -> None:
    for name, parameter in adapter.parameters.items():
        if not parameter.isfinite().all():
            raise TrainerError(f"the run diverged ({name} is not finite): nothing written; try a lower learning rate")


def _collator(model: Any, tokenizer: Any) -> PaddingCollator:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PaddingCollator(pad or 0, crop_logits="logits_to_keep" in inspect.signature(model.forward).parameters)


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
