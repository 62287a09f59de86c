"""One job: its own data order, optimiser and schedule, as a run of its own would have them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.huggingface_trainer import AdapterTrainer


class Job:
    """Drives an AdapterTrainer's parts from outside, one micro-batch at a time.

    The order of the data, the optimiser, the schedule, the clipping and the weighting of accumulated micro-batches are
    those of `AdapterTrainer.train`; only the forward and the backward are shared with other jobs.
    """

    def __init__(self, name: str, trainer: AdapterTrainer) -> None:
        self.name = name
        self.trainer = trainer
        self.adapter = trainer.adapter
        self.step = 0
        args = trainer.args
        set_seed(args.seed)
        self._loader = trainer.get_train_dataloader()
        self._accumulate = args.gradient_accumulation_steps
        batches = len(self._loader)
        steps_per_epoch = max(math.ceil(batches / self._accumulate), 1)
        self.total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        trainer.create_optimizer_and_scheduler(self.total_steps)
        self._batches = self._endless()
        self._pending: list[dict[str, Any]] = []
        self._items = 0
        self._taken: dict[str, Any] = {}
        self._share = 1
        self._losses: list[Tensor] = []
        self._started = time.monotonic()

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def next_batch(self) -> dict[str, Any]:
        """The next micro-batch, as the collator made it; a step's micro-batches are counted when its first is taken."""
        if not self._pending:
            self._pending = next(self._batches)
            self._share = len(self._pending)
            self._items = sum(int((b["labels"][..., 1:] != IGNORED).sum()) for b in self._pending)
            self.adapter.before_step(self.step, self.total_steps)
        self._taken = self._pending.pop(0)
        return self._taken

    def loss(self, function: Callable[..., Tensor], logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        """This micro-batch's part of the step's loss. function: the model's own. logits: [B, K, V], labels: [B, K]."""
        scaled = self.trainer.model_accepts_loss_kwargs
        items = {"num_items_in_batch": torch.tensor(self._items, device=logits.device)} if scaled else {}
        if self.trainer.preference is None:
            loss = function(logits=logits, labels=labels, vocab_size=vocab_size, **items)
        else:
            loss = self.trainer.preference.loss(logits, labels, self._taken)
        added = self.adapter.regulariser()
        if added is not None:
            loss = loss + (added / self._share if scaled else added)
        loss = loss if scaled else loss / self._share
        self._losses.append(loss.detach())
        return loss

    def after_backward(self) -> None:
        """Moves the optimiser where this was a step's last micro-batch."""
        if self._pending:
            return
        trainer, parameters = self.trainer, list(self.adapter.parameters.values())
        if trainer.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        self.adapter.after_backward(self.step, self.total_steps)
        assert trainer.optimizer is not None
        assert trainer.lr_scheduler is not None
        trainer.optimizer.step()
        self.adapter.after_step(self.step, self.total_steps)
        trainer.lr_scheduler.step()
        for parameter in parameters:
            parameter.grad = None
        self.step += 1

    def mean_loss(self) -> float:
        """Over the steps so far."""
        return float(torch.stack(self._losses).sum()) / max(self.step, 1) if self._losses else math.nan

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _endless(self) -> Iterator[list[dict[str, Any]]]:
        """The micro-batches of each optimiser step, epoch after epoch."""
        epoch = 0
        while True:
            if hasattr(self._loader, "set_epoch"):
                self._loader.set_epoch(epoch)
            batches: list[dict[str, Any]] = []
            for batch in self._loader:
                batches.append(batch)
                if len(batches) == self._accumulate:
                    yield batches
                    batches = []
            if batches:
                yield batches
            epoch += 1
