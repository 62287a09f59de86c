"""A run that can begin: everything checked and attached, and the Trainer that drives it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from peftmux.adapters.probing import evaluating
from peftmux.trainer.data import PackedCollator, PaddingCollator, PreferenceCollator, pack_features
from peftmux.trainer.errors import OptionError
from peftmux.trainer.files.card import DataFacts
from peftmux.trainer.methods import AttachedAdapter, Method
from peftmux.trainer.methods.task_head import TaskHead
from peftmux.trainer.run.base_identity import base_identity
from peftmux.trainer.run.huggingface_trainer import AdapterTrainer
from peftmux.trainer.run.objective import Preference
from peftmux.trainer.settings.argument_checks import plain
from peftmux.trainer.settings.options import NEXT_TOKEN, RunOptions

_PACK = 512
"""Tokens."""
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""One switch under its older and its newer name; transformers before 5.20 or so has the first alone."""

_DECIDING = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "bf16", "fp16", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
)
"""The training arguments that a run which goes on must share: each changes what is learned."""
_DECIDING_OURS = ("dtype", "quantization", "max_length", "over_long", "packing", "pack_length", "append_eos")


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

    def loss_options(self) -> dict[str, object]:
        """What decides the loss, where it is not the model's own."""
        options = self.options
        names = {"dpo": ("beta",), "kto": ("beta", "desirable_weight", "undesirable_weight")}.get(options.loss, ())
        chosen = {"loss": options.loss, **{name: getattr(options, name) for name in names}} if names else {}
        labels = {"labels": list(self.adapter.head.labels)} if isinstance(self.adapter.head, TaskHead) else {}
        return {**chosen, **({"task": options.task, **labels} if labels else {})}


def make_trainer(
    ready: Prepared, callbacks: Sequence[TrainerCallback] = (), features: list[dict[str, Any]] | None = None
) -> AdapterTrainer:
    """features: to train on these in the place of the data, without evaluation; as `run_features` gives them."""
    args, data = ready.args, ready.data
    names = [name for name in CHECKPOINTING if getattr(args, name, None)]
    if names and ready.adapter.checkpoint_activations():
        for name in names:
            setattr(args, name, False)
    own = features is None
    patience = ready.options.early_stopping_patience if own else None
    run = {"options": dataclasses.asdict(ready.config), "data": data.sha256, "seed": args.seed}
    run |= {name: plain(getattr(args, name)) for name in _DECIDING}
    run |= {"model": base_identity(ready.options.model), "world_size": args.world_size}
    run |= {name: getattr(ready.options, name) for name in _DECIDING_OURS}
    preference = _preference(ready.options)
    if ready.options.packing:
        _check_packing(ready)
    train = run_features(ready, data) if features is None else features
    evaluate = run_features(ready, ready.eval_data) if own and ready.eval_data else None
    try:
        trainer = AdapterTrainer(
            ready.adapter,
            {"method": ready.method.name, **ready.loss_options(), **run},
            preference,
            model=ready.model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluate,
            data_collator=_collator(ready),
            callbacks=[*callbacks, *([EarlyStoppingCallback(patience)] if patience else [])],
        )
    except (ValueError, ImportError) as error:  # transformers' answer to arguments that do not go together
        raise OptionError("training arguments", str(error)) from error
    if preference is not None and own:
        for rows in filter(None, (train, evaluate)):
            preference.add_references(trainer, rows)
    return trainer


def _preference(options: RunOptions) -> Preference | None:
    if options.loss == NEXT_TOKEN:
        return None
    return Preference(options.loss, options.beta, (options.desirable_weight, options.undesirable_weight))


def run_features(ready: Prepared, data: DataFacts) -> list[dict[str, Any]]:
    """What the run's collator takes: rows, or packs of them."""
    features = data.encoded.features()
    if not ready.options.packing:
        return features
    return pack_features(features, ready.options.pack_length or max(_PACK, max(len(f["input_ids"]) for f in features)))


def _check_packing(ready: Prepared) -> None:
    """Two rows in one pack must have the logits that each has alone. Raises OptionError for a base that mixes them."""
    if ready.adapter.prefix or ready.adapter.virtual:
        raise OptionError("packing", f"{ready.method.name} puts something in front of each row: train without packing")
    model, examples = ready.model, ready.data.encoded.examples
    rows = [torch.tensor(example.input_ids[:64], device=model.device) for example in (examples[0], examples[-1])]
    positions = torch.cat([torch.arange(len(row), device=model.device) for row in rows])[None]
    with evaluating(model):
        together = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0].float()
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows]).float()
    apart = float((together - alone).abs().mean()) / max(float(alone.std()), 1e-6)
    if not apart < (1e-4 if model.dtype == torch.float32 else 5e-2):
        raise OptionError("packing", f"rows of one pack see each other in {type(model).__name__}: train without it")


def _collator(ready: Prepared) -> PaddingCollator | PackedCollator | PreferenceCollator:
    if ready.options.packing:
        return PackedCollator()
    padding = PaddingCollator("logits_to_keep" in inspect.signature(ready.model.forward).parameters)
    return padding if ready.options.loss == NEXT_TOKEN else PreferenceCollator(padding)
