"""One job: its own Trainer's loop, halted wherever it needs a pass of the model, which it shares with other jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Host
from peftmux.trainer.host.random_state import Draws, RandomState
from peftmux.trainer.run.huggingface_trainer import PlainLog
from peftmux.trainer.run.loop import train_and_evaluate
from peftmux.trainer.run.prepared import Prepared, make_trainer

_ALONE = (
    *("bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "torch_compile", "auto_find_batch_size"),
    *("neftune_noise_alpha", "label_smoothing_factor"),
)
"""Training arguments that change the pass, which is not one job's own."""


class Stopped(BaseException):
    """Raised inside of a job's loop that is not to go on."""


class Job:
    """The loop of `AdapterTrainer.train` in a thread of its own, of which only one runs at a time.

    Data, optimiser, schedule, clipping, logs, checkpoints, evaluation and early stopping are the Trainer's, as in a run
    of the job alone. While the loop runs (`advance`) the process's random state and its parameters' gradients are the
    job's own; between turns they are kept here. What a pass draws for this job it draws from `random`, too.
    """

    def __init__(self, name: str, ready: Prepared) -> None:
        """Raises OptionError for what only a run of its own can do."""
        self.name = name
        self.ready = ready
        self.adapter = ready.adapter
        _check(ready)
        ready.args.disable_tqdm = True
        self.trainer = make_trainer(ready)
        self.trainer.shared_pass = self._ask
        self.trainer.alone = self._alone
        self.trainer.remove_callback(PlainLog)
        self.trainer.add_callback(PlainLog(f"{name}: "))
        self.trainer.add_callback(_StopsEvaluation(self))
        self.batch: dict[str, Any] | None = None
        """The micro-batch that a pass is wanted for, as the collator made it; None: the loop has ended."""
        self.metrics: dict[str, float] = {}
        self._items: Any = None
        self._result: Tensor | None = None
        self.stopping = False
        self._error: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._threads = torch.get_num_threads()
        """Of the passes. The loop itself has one: each thread that has computed in parallel keeps a team of workers,
        and where the teams outnumber the cores every small operation of a pass waits for its team to wake up."""
        self._thread = threading.Thread(target=self._run, name=f"job {name}", daemon=True)
        self.random = RandomState()
        self._parameters = list(ready.adapter.parameters.values())
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        """Of the parameters, between turns."""

    @property
    def step(self) -> int:
        return self.trainer.state.global_step

    @property
    def total_steps(self) -> int:
        """0 before the first turn."""
        return self.trainer.state.max_steps

    def advance(self) -> bool:
        """Let the loop run until it wants the next pass (True) or has ended (False). Raises what the loop raised."""
        self.batch = None
        with self.random.all(), self.gradients():  # the loop clears the gradients of everything in the model
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._turn.release()
            self._wait()
        if self._error is not None:
            raise self._error
        return self.batch is not None

    def _wait(self) -> None:
        """For the loop to halt; after Ctrl-C too, since it may be writing a checkpoint of the state that is its own."""
        try:
            self._back.acquire()
        except BaseException:
            self.stopping = True
            self._back.acquire()
            raise

    def close(self) -> None:
        """End a loop that is halted; nothing more is written."""
        self.stopping = True
        if self._thread.is_alive():
            self._turn.release()
            self._thread.join()

    def loss(self, function: Callable[..., Tensor], logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        """This micro-batch's part of the step's loss. function: the model's own. logits: [B, K, V], labels: [B, K]."""
        trainer, batch = self.trainer, self.batch
        assert batch is not None
        scaled = trainer.model_accepts_loss_kwargs and self._items is not None
        if trainer.preference is None:
            items = {"num_items_in_batch": self._items} if scaled else {}
            loss = function(logits=logits, labels=labels, vocab_size=vocab_size, **items)
        else:
            loss = trainer.preference.loss(logits, labels, batch)
        loss = trainer.regularised(loss, scaled)
        loss = loss if scaled else loss / trainer.current_gradient_accumulation_steps
        self._result = loss.detach()
        return loss

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Within it the parameters' gradients are there, for a backward to add to."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        try:
            yield
        finally:
            self._gradients = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None

    def draws(self) -> Draws:
        """For the pass that is wanted."""
        assert self.batch is not None
        return Draws(self.random, self.batch["input_ids"].shape[1], self.batch["labels"].shape[1])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within it passes are made here, of this adapter alone, with all of the processor's threads."""
        torch.set_num_threads(self._threads)
        try:
            with Host.of(self.trainer.model).only(self.adapter.key):
                yield
        finally:
            torch.set_num_threads(1)

    def _run(self) -> None:
        torch.set_num_threads(1)  # see `_threads`
        try:
            self.metrics = train_and_evaluate(self.trainer, self.ready.options)
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.batch = None
            torch.set_num_threads(self._threads)  # also what threads that come later start with
            self._back.release()

    def _ask(self, batch: dict[str, Any], items: Any) -> Tensor:
        """In the loop: halt until the pass over `batch` is done. Returns its loss."""
        shared = self.trainer.accelerator.gradient_state  # one for all Trainers of a process
        last = shared.sync_gradients
        self.batch, self._items = batch, items
        self._back.release()
        self._turn.acquire()
        if self.stopping:
            raise Stopped
        shared._set_sync_gradients(last)
        assert self._result is not None
        return self._result


class _StopsEvaluation(TrainerCallback):
    def __init__(self, job: Job) -> None:
        self._job = job

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._job.stopping:
            raise Stopped


def _check(ready: Prepared) -> None:
    if ready.options.packing:
        raise OptionError("packing", "is for a run of its own")
    if ready.options.dry_run:
        raise OptionError("dry-run", "is for a run of its own")
    if ready.args.world_size > 1:
        message = f"are trained in one process, got {ready.args.world_size}: give each its own file of jobs"
        raise OptionError("jobs", message)
    for name in _ALONE:
        if getattr(ready.args, name, None):
            raise OptionError(name.replace("_", "-"), "changes the pass that jobs share: is for a run of its own")
