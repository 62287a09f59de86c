"""transformers' Trainer for an attached adapter: only the adapter's tensors are optimised, saved and restored."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from peftmux.adapters.files import CHECKPOINT_FILE
from peftmux.adapters.float8 import keep_out_of_broadcasts
from peftmux.trainer.host.processes import mean
from peftmux.trainer.methods import AttachedAdapter
from peftmux.trainer.run.checkpoints import CHECKPOINT_LOSS, CHECKPOINT_RUN, check_length, check_same_run
from peftmux.trainer.run.length_groups import EpochLengthSampler
from peftmux.trainer.run.objective import EXTRAS, Preference, replaced_loss


class AdapterTrainer(Trainer):
    """`run` is what a resumed run must share with the run that wrote the checkpoint: method, options, data, seed.

    preference: the loss in the place of the model's own, or None.
    """

    def __init__(
        self, adapter: AttachedAdapter, run: Mapping[str, object], preference: Preference | None = None, **kwargs: Any
    ) -> None:
        self.adapter = adapter
        self.run = run
        self.preference = preference
        self.shared_pass: Callable[[dict[str, Any], Any], torch.Tensor] | None = None
        """Makes a micro-batch's pass and returns its loss, in the place of this Trainer, whose model has adapters of
        others too."""
        self.alone: Callable[[], AbstractContextManager[None]] = nullcontext
        """Within it this Trainer's own passes are made, those of an evaluation."""
        keep_out_of_broadcasts(kwargs["model"])
        with _known_to_have_adapters(kwargs["model"]):
            super().__init__(**kwargs)
        if preference is not None:
            self.model_accepts_loss_kwargs = False  # a mean over rows, not a sum over the step's learned tokens
        self._lengths: EpochLengthSampler | None = None
        self._went_on_from: Path | None = None
        self._pending = 0.0
        """The losses since the last log added up, a mean over all processes, as of the last checkpoint."""
        self._evaluated: tuple[int, dict[str, float]] | None = None
        """The step of the last evaluation, and what it found; None once other tensors are back."""
        self._counted: int | None = None
        self.add_callback(AdapterSteps(self))
        self.add_callback(_LossSoFar(self))
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(PlainLog())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.adapter.optimizer_groups(self.args.weight_decay, self.args.learning_rate)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.adapter.before_pass(inputs.get("labels"))
        if self.preference is None:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            loss, outputs = self._preference_loss(model, inputs)
        if model.training:
            loss = self.regularised(loss, self.model_accepts_loss_kwargs and num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def regularised(self, loss: torch.Tensor, scaled: bool) -> torch.Tensor:
        """With what the method adds. scaled: the micro-batches' losses add up to the step's; they are averaged else."""
        added = self.adapter.regulariser()
        if added is None:
            return loss
        return loss + (added / self.current_gradient_accumulation_steps if scaled else added)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.shared_pass is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self.shared_pass(self._prepare_inputs(inputs), num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.alone():
            metrics = super().evaluate(*args, **kwargs)
        self._evaluated = self.state.global_step, metrics
        return metrics

    def final_evaluation(self) -> dict[str, float]:
        """Of what the run has ended with: the last step's own where there was one."""
        step, metrics = self._evaluated or (-1, {})
        return metrics if step == self.state.global_step == self.state.max_steps else self.evaluate()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate of a pass, for which it walks through all parameters each time."""
        if self._counted is None:
            self._counted = self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)
        return 6 * int(inputs["input_ids"].numel()) * self._counted

    def _preference_loss(self, model: Any, inputs: Any) -> Any:
        preference = self.preference
        assert preference is not None
        extras = {name: inputs.pop(name) for name in EXTRAS if name in inputs}

        def loss_of(logits: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return preference.loss(logits, labels, extras)

        with replaced_loss(self.accelerator.unwrap_model(model), loss_of):
            return super().compute_loss(model, inputs, True)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.preference is not None and "loss" in logs:
            logs = {**logs, **self.preference.metrics()}
        if "train_loss" in logs:  # transformers' is that of the steps after a resume; it returns this dict as metrics
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if str(self.args.train_sampling_strategy) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        self._lengths = self._by_length(rows, self.args.train_batch_size * self.args.gradient_accumulation_steps)
        return self._lengths

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if str(self.args.train_sampling_strategy) != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return self._by_length(eval_dataset, self.args.eval_batch_size)

    def _by_length(self, rows: Any, batch: int) -> EpochLengthSampler:
        """rows: as a collator takes them. transformers' own sampler knows no packs, and draws from torch's state."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = [row["length"] if "length" in row else len(row["input_ids"]) for row in rows]
        return EpochLengthSampler(batch, lengths, seed)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the checkpoint is of a run's end: transformers would make one step more."""
        if self._ended():
            self.control.should_training_stop = True
            return
        if self._lengths is not None:
            self._lengths.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _ended(self) -> bool:
        stopped = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in self._early_stopping())
        return stopped or self.state.global_step >= self.state.max_steps

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _load_callback_state(self) -> None:
        """Early stopping goes on counting, with the patience given now; no other callback of transformers' counts."""
        super()._load_callback_state()
        callbacks = self._early_stopping()
        if callbacks and not self.args.restore_callback_states_from_checkpoint:
            states: Any = self.state.stateful_callbacks
            stored = states.setdefault(type(callbacks[0]).__name__, {})
            for callback, state in zip(callbacks, stored if isinstance(stored, list) else [stored], strict=False):
                count = state.get("attributes", {}).get("early_stopping_patience_counter", 0)
                callback.early_stopping_patience_counter = count

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._pending = float(mean(self._tr_loss))
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in self.adapter.state().items()}, folder / CHECKPOINT_FILE)
        (folder / CHECKPOINT_RUN).write_text(json.dumps({**self.run, CHECKPOINT_LOSS: self._loss_so_far()}))

    def _loss_so_far(self) -> dict[str, float]:
        """The sums that transformers keeps out of its checkpoints: of the logged steps, and of those after them."""
        return {
            "logged": self._total_loss_scalar,
            "pending": self._pending,
            "step_logged": self._globalstep_last_logged,
        }

    def restore_loss(self) -> None:
        """After the Trainer has set its sums to 0. A checkpoint without the sums leaves them so."""
        if self._went_on_from is None:
            return
        check_length(self._went_on_from, self.args, self.state.max_steps, self.adapter)
        sums = json.loads((self._went_on_from / CHECKPOINT_RUN).read_text()).get(CHECKPOINT_LOSS)
        if sums is not None:
            self._total_loss_scalar = sums["logged"]
            self._tr_loss += sums["pending"]
            self._globalstep_last_logged = sums["step_logged"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_same_run(Path(resume_from_checkpoint), self.run)
        self._went_on_from = Path(resume_from_checkpoint)
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None, "the Trainer calls this only where a best checkpoint exists"
        self._restore(best)
        self._evaluated = None

    def _restore(self, checkpoint: str) -> None:
        self.adapter.restore(load_file(Path(checkpoint) / CHECKPOINT_FILE))


@contextmanager
def _known_to_have_adapters(model: Any) -> Iterator[None]:
    """transformers refuses to train a quantised model without adapters, and knows only PEFT's."""
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


class AdapterSteps(TrainerCallback):
    """Tells the adapter where the run is."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.adapter.before_step(state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step whose float16 gradients overflowed is left out, and its gradients are no measure of anything."""
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self._trainer.adapter.after_step(state.global_step, state.max_steps)


class _LossSoFar(TrainerCallback):
    """A resumed run's mean loss is that of all of its steps."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.restore_loss()


class PlainLog(TrainerCallback):
    """One line per log where there is no terminal for a progress bar."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            values = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in logs.items())
            tqdm.write(f"{self._prefix}step {state.global_step}/{state.max_steps} {values}", file=sys.stderr)
            sys.stderr.flush()
