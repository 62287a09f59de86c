"""The two libraries' runs over the same rows: ours by `peftmux.trainer.train`, PEFT's as its documentation has it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import peftmux.trainer.run.loop  # noqa: F401
from benchmarks.train_inputs import Size
from peftmux.trainer import train
from peftmux.trainer.data import encode_rows, read_rows

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "dora": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    "prefix": {"num_virtual_tokens": 20},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}
PACKS = 4
"""Rows of the plain batch whose tokens make one pack."""


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    size: Size
    method: str
    packing: bool

    def short(self) -> Run:
        return dataclasses.replace(self, size=dataclasses.replace(self.size, steps=2))

    @property
    def data(self) -> Path:
        return self.folder / ("mixed.jsonl" if self.packing else "even.jsonl")

    def training(self) -> dict[str, Any]:
        return {
            "max_steps": self.size.steps + 1,
            "per_device_train_batch_size": self.size.batch,
            "learning_rate": 1e-4,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 1,
        }


class Clock(TrainerCallback):
    """Seconds and real tokens of the steps after the first, by watching what the model is given."""

    def __init__(self) -> None:
        self._tokens = 0
        self._started = self._ended = 0.0

    def rate(self) -> float:
        return self._tokens / (self._ended - self._started)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def before(_module: Any, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if state.global_step:
                ids = given[0] if given else kwargs["input_ids"]
                self._tokens += int((ids != 0).sum())  # 0 is the padding

        model.register_forward_pre_hook(before, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended = time.perf_counter()


def run_ours(run: Run, clock: Clock) -> None:
    values = run.training()
    if run.packing:
        values["per_device_train_batch_size"] = max(1, run.size.batch // PACKS)
    train(
        run.method,
        model=run.folder / "base",
        data=run.data,
        out=run.folder / "ours",
        overwrite=True,
        config=CONFIGS[run.method],
        training=values,
        packing=run.packing,
        pack_length=PACKS * run.size.length if run.packing else None,
        callbacks=[clock],
    )


def run_peft(run: Run, clock: Clock) -> None:
    """get_peft_model, transformers' padding collator, transformers' Trainer; the rows are tokenised by us."""
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "base")
    rows = encode_rows(read_rows(run.data), tokenizer, run.data, max_length=2048).examples
    data = [{"input_ids": r.input_ids, "attention_mask": [1] * len(r.input_ids), "labels": r.labels} for r in rows]
    classes: dict[str, Any] = {"prefix": peft.PrefixTuningConfig, "ia3": peft.IA3Config}
    extra = {"use_dora": True} if run.method == "dora" else {}
    config = classes.get(run.method, peft.LoraConfig)(task_type="CAUSAL_LM", **CONFIGS[run.method], **extra)
    base = AutoModelForCausalLM.from_pretrained(run.folder / "base", dtype="auto")
    trainer = Trainer(
        model=peft.get_peft_model(base, config),
        args=TrainingArguments(output_dir=str(run.folder / "peft"), remove_unused_columns=False, **run.training()),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[clock],
    )
    trainer.train()


LIBRARIES = {"peftmux": run_ours, "peft": run_peft}
