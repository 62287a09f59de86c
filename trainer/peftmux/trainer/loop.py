"""One training run from options to adapter files; transformers' Trainer is the loop."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peftmux.trainer.base_model import load_base, longest_row
from peftmux.trainer.card import CardFacts, DataFacts, model_card
from peftmux.trainer.data import PaddingCollator, encode_rows, file_digest, read_rows
from peftmux.trainer.errors import OptionError
from peftmux.trainer.export import export_adapter
from peftmux.trainer.huggingface_trainer import AdapterTrainer, newest_checkpoint
from peftmux.trainer.methods import AttachContext, AttachedAdapter, Method
from peftmux.trainer.options import RunOptions
from peftmux.trainer.summary import trainable_summary
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

REPORTED = (
    *("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16"),
)
"""The training arguments a model card names, beside those the user gave."""


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
    _check_out(options)
    train_rows = read_rows(options.data)
    eval_rows = read_rows(options.eval_data) if options.eval_data else None
    model, tokenizer = load_base(options)
    hidden_size = model.config.get_text_config().hidden_size
    args = _training_arguments(options, training, method.learning_rate(hidden_size))
    base_parameters = model.num_parameters()

    reserved = getattr(config, "num_virtual_tokens", 0)
    limit = min(options.max_length or sys.maxsize, longest_row(model, reserved))
    data = _encode(options.data, train_rows, tokenizer, options, limit)
    eval_data = _encode(options.eval_data, eval_rows, tokenizer, options, limit) if eval_rows else None

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    context = AttachContext(args.seed, data.encoded.examples, tokenize)
    adapter = method.attach(model, config, context)
    print(trainable_summary(adapter, base_parameters), file=sys.stderr)
    if options.dry_run:
        return TrainResult(Path(options.out), "", 0, {}, model, tokenizer, adapter)
    if args.gradient_checkpointing and adapter.checkpoint_activations():
        args.gradient_checkpointing = False

    run = {"method": method.name, "options": dataclasses.asdict(config), "data": data.sha256, "seed": args.seed}
    trainer = AdapterTrainer(
        adapter,
        run,
        model=model,
        args=args,
        train_dataset=data.encoded.examples,
        eval_dataset=eval_data.encoded.examples if eval_data else None,
        data_collator=_collator(model, tokenizer),
        callbacks=[*_early_stopping(options), *callbacks],
    )
    metrics = _train(trainer, options)
    model.eval()
    facts = CardFacts(
        method=method.name,
        base_model=options.model,
        config=config,
        training={"dtype": str(model.dtype), **_reported(args, training)},
        metrics=metrics,
        trained_parameters=sum(adapter.sites().values()),
        base_parameters=base_parameters,
        data=data,
        eval_data=eval_data,
    )
    digest = export_adapter(adapter, options.model, options.out, model_card(facts)) if args.should_save else ""
    return TrainResult(Path(options.out), digest, trainer.state.global_step, metrics, model, tokenizer, adapter)


def _early_stopping(options: RunOptions) -> list[TrainerCallback]:
    return [EarlyStoppingCallback(options.early_stopping_patience)] if options.early_stopping_patience else []


def _check_out(options: RunOptions) -> None:
    out = Path(options.out)
    if out.is_file():
        raise OptionError("out", f"expected a folder or nothing at {out}, found a file")
    if out.is_dir() and any(out.iterdir()) and not (options.overwrite or options.dry_run):
        raise OptionError("out", f"{out} is not empty; give --overwrite to replace the adapter in it")


def _encode(path: str | None, rows: Any, tokenizer: Any, options: RunOptions, limit: int) -> DataFacts:
    assert path is not None
    encoded = encode_rows(
        rows, tokenizer, path, max_length=limit, over_long=options.over_long, append_eos=options.append_eos
    )
    return DataFacts(Path(path).name, file_digest(path), encoded)


def _training_arguments(options: RunOptions, given: Mapping[str, Any], learning_rate: float) -> TrainingArguments:
    """Our defaults, then what the user gave. Raises OptionError for an unknown name or a refused value."""
    stops_early = options.early_stopping_patience is not None
    evaluates = "epoch" if options.eval_data else "no"
    values: dict[str, Any] = {
        "learning_rate": learning_rate,
        "logging_steps": 10,
        "eval_strategy": evaluates,
        "save_strategy": given.get("eval_strategy", evaluates) if stops_early else "no",
        "save_steps": given.get("eval_steps") or 500,
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": "eval_loss" if stops_early else None,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        **given,
    }
    if "warmup_ratio" in values:
        values["warmup_steps"] = _warmup_share(values.pop("warmup_ratio"))
    saves = values["save_strategy"] != "no"
    # Without checkpoints the Trainer writes nothing, but wants a folder that exists.
    values.setdefault("output_dir", f"{options.out}.checkpoints" if saves else tempfile.gettempdir())
    try:
        return TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise OptionError("training arguments", str(error)) from error


def _warmup_share(value: float) -> float:
    """transformers takes a share of the steps as a `warmup_steps` below 1."""
    if not 0.0 <= value < 1.0:
        raise OptionError("warmup-ratio", f"expected 0 or more and below 1, got {value}")
    return value


def _collator(model: Any, tokenizer: Any) -> PaddingCollator:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PaddingCollator(pad or 0, crop_logits="logits_to_keep" in model.forward.__code__.co_varnames)


def _train(trainer: AdapterTrainer, options: RunOptions) -> dict[str, float]:
    checkpoint = None
    if options.resume:
        folder = Path(trainer.args.output_dir or "")
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            raise OptionError(
                "resume", f"found no complete checkpoint in {folder}; a run writes them with --save-steps"
            )
    metrics: dict[str, float] = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    if options.eval_data:
        metrics.update(trainer.evaluate())
    return {name: value for name, value in metrics.items() if name not in ("total_flos", "epoch")}


def _early_stopping(options: RunOptions) -> list[TrainerCallback]:
    patience = options.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def _reported(args: TrainingArguments, given: Mapping[str, Any]) -> dict[str, object]:
    names = dict.fromkeys([*REPORTED, *(name for name in given if hasattr(args, name) and name != "output_dir")])
    return {name: getattr(value := getattr(args, name), "value", value) for name in names}
