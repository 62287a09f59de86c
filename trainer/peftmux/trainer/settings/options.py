"""What a run is told beside the method's own options and transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from peftmux.trainer.errors import OptionError
from peftmux.trainer.settings.value_types import is_of, plain_value, spelled

Config = TypeVar("Config")
NEXT_TOKEN = "next-token"
SEVERAL = ("sweep", "ensemble")
"""Options that train several adapters."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One run. Field names are the flags of `peftmux train`."""

    model: str = field(metadata={"help": "the base model: a folder, or a name on the Hugging Face Hub"})
    data: str = field(
        metadata={
            "help": "training rows: JSON lines or Parquet of {prompt, completion}, {messages} (beside them perhaps "
            "tools, which the chat template has to show) or {text}; {text, label} for --task sequence, {tokens, "
            "labels} for --task token (a word labelled -100 is not learned); for vora with images beside them, a list "
            "of file paths or base64, each standing at the text's next <image>, or all in front"
        }
    )
    out: str = field(metadata={"help": "folder for the adapter; appears when the run has succeeded"})
    eval_data: str | None = field(default=None, metadata={"help": "rows to evaluate on, same formats"})
    task: Literal["generation", "sequence", "token"] = field(
        default="generation",
        metadata={"help": "what the adapter does: write, or classify whole sequences or each of their words"},
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "a classifier's label names by index; default: those of the data, sorted"}
    )
    max_length: int | Literal["auto"] | None = field(
        default=None,
        metadata={
            "help": "tokens per row; default: what the base can take. auto: what 99 % of the rows fit, for --over-long "
            "truncate or drop; the lengths are printed"
        },
    )
    over_long: Literal["error", "truncate", "drop"] = field(
        default="error", metadata={"help": "what to do with a longer row"}
    )
    packing: bool = field(
        default=False, metadata={"help": "put several rows into one, which see nothing of each other: no padding"}
    )
    pack_length: int | None = field(
        default=None, metadata={"help": "tokens of a pack; default: 512, or the longest row's. A batch counts packs"}
    )
    append_eos: bool = field(
        default=True, metadata={"help": "end completions and texts with the end-of-sequence token"}
    )
    loss: Literal["next-token", "dpo", "kto"] = field(
        default="next-token",
        metadata={
            "help": "what to minimise; dpo takes {prompt, chosen, rejected} rows, kto {prompt, completion, label}"
        },
    )
    beta: float = field(default=0.1, metadata={"help": "dpo, kto: larger stays nearer to the base model"})
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of rows whose label is true"})
    undesirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of rows whose label is false"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "the base's dtype; auto: as stored. What is trained is always float32"}
    )
    quantization: Literal["nf4", "int8", "fp8"] | None = field(
        default=None, metadata={"help": "hold the base in 4 or 8 bits (QLoRA: lora with nf4)"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "as transformers' from_pretrained has it"})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better loss and keep the best"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint of this --out"})
    overwrite: bool = field(default=False, metadata={"help": "replace an adapter that is already at --out"})
    sweep: str | None = field(
        default=None,
        metadata={
            "help": "NAME=V1,V2,...: train one adapter for each value (a list in [], a JSON object in {}), all at "
            "once, and keep the best"
        },
    )
    ensemble: int | None = field(
        default=None,
        metadata={
            "help": "train so many adapters at once, from different seeds, whose answers a client puts to a vote; "
            "--out holds a folder for each"
        },
    )
    publish: str | None = field(
        default=None, metadata={"help": "also put the adapter, in one step, into this folder that a server watches"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "train nothing: print what would be trained, the memory and the time it takes"}
    )

    def __post_init__(self) -> None:
        for name in ("model", "data", "out", "eval_data", "publish"):
            if getattr(self, name) == "":
                raise OptionError(name.replace("_", "-"), "expected a name, got an empty one")
        try:
            object.__setattr__(self, "out", str(named(self.out)))
        except (OSError, RuntimeError) as error:  # Python before 3.13 raises the second for links in a circle
            raise OptionError("out", f"{self.out}: {getattr(error, 'strerror', None) or error}") from None
        for name in ("max_length", "pack_length", "early_stopping_patience", "ensemble"):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise OptionError(name.replace("_", "-"), f"expected 1 or more, got {value}")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(name.replace("_", "-"), f"expected more than 0, got {getattr(self, name)}")
        if self.loss != NEXT_TOKEN and self.packing:
            raise OptionError("packing", f"{self.loss} scores whole rows: train without packing")
        if self.ensemble is not None and (self.sweep is not None or self.dry_run):
            raise OptionError("ensemble", "trains, and one value of every option: not with --sweep or --dry-run")
        if self.resume and (self.ensemble is not None or self.sweep is not None):
            raise OptionError("resume", "goes on with one run: not with --sweep or --ensemble")
        if self.sweep is not None and self.dry_run:
            raise OptionError("dry-run", "is for a run of its own: not with --sweep")
        if self.labels is not None and self.task == "generation":
            raise OptionError("labels", "are a classifier's: give --task sequence or --task token")
        if self.loss != NEXT_TOKEN and self.task != "generation":
            raise OptionError("loss", f"{self.loss} compares what is written: not for --task {self.task}")
        if self.early_stopping_patience and not self.eval_data:
            raise OptionError("early-stopping-patience", "needs rows to evaluate on: give --eval-data")


def named(out: str | PathLike[str]) -> Path:
    """The path with a last component that is a name (but for "/"), and no ".." before it, which leads nowhere where
    what it goes back from is not there: "a/b/" is "a/b", "." and "a/.." are resolved."""
    path = Path(out)
    if path.name in ("", ".."):
        return path.resolve()
    return path.parent.resolve() / path.name if ".." in path.parts else path


def build_config(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """A dataclass from named values. Raises OptionError for a name it does not have, and for what no flag would take: a
    value of another type, a word that is not among the type's, a number that is not finite."""
    values = {name: plain_value(value) for name, value in values.items()}
    hints = get_type_hints(config_class)
    known = [f.name for f in dataclasses.fields(config_class) if f.init]  # type: ignore[arg-type]
    for name, value in values.items():
        flag = name.replace("_", "-")
        if name not in known:
            raise OptionError(flag, f"no such option; expected one of {', '.join(known)}")
        if not is_of(value, hints[name]):
            raise OptionError(flag, f"expected {spelled(hints[name])}, got {value!r}")
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise OptionError(flag, f"expected a finite number, got {value}")
    return config_class(**values)
