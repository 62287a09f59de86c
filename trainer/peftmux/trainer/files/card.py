"""The model card: what a reader needs to judge an adapter and to train it again."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from peftmux.trainer.data import EncodedData


@dataclass(frozen=True, slots=True)
class DataFacts:
    """A data file as the card names it: its last name, its bytes' sha256, and what was read from it."""

    name: str
    sha256: str
    encoded: EncodedData

    def line(self) -> str:
        e = self.encoded
        parts = [f"{e.rows} rows of {e.format}", f"{e.tokens} tokens, {e.learned_tokens} of them learned"]
        parts += [f"{e.truncated} rows truncated"] * bool(e.truncated) + [f"{e.dropped} rows dropped"] * bool(e.dropped)
        return f"`{self.name}` (sha256 `{self.sha256}`): {'; '.join(parts)}"


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything a card says. `base_model` is what the user named; parameters are counts."""

    method: str
    base_model: str
    config: object
    training: Mapping[str, object]
    metrics: Mapping[str, float]
    trained_parameters: int
    base_parameters: int
    data: DataFacts
    eval_data: DataFacts | None = None
    notes: tuple[str, ...] = ()
    task: str = "generation"


_PIPELINES = {"generation": "text-generation", "sequence": "text-classification", "token": "token-classification"}
"""The Hub's names of our tasks."""


def model_card(facts: CardFacts) -> str:
    """README.md: the Hub's metadata block, then Markdown."""
    front = {
        "base_model": facts.base_model,
        "library_name": "peft",
        "pipeline_tag": _PIPELINES[facts.task],
        "tags": ["peftmux", facts.method],
    }
    share = 100 * facts.trained_parameters / facts.base_parameters
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {facts.method} adapter for {Path(facts.base_model).name}",
        "",
        f"{facts.trained_parameters:,} trained parameters, {share:.2f} % of the base's {facts.base_parameters:,}.",
        *facts.notes,
        "",
        "## Data",
        "",
        f"* training: {facts.data.line()}",
        *([f"* evaluation: {facts.eval_data.line()}"] if facts.eval_data else []),
        "",
        "## Results",
        "",
        *_table({name: f"{value:.6g}" for name, value in sorted(facts.metrics.items())}),
        "",
        "## Training",
        "",
        *_table({name: json.dumps(value, default=str) for name, value in facts.training.items()}),
        "",
        "## Method",
        "",
        *_table({name: json.dumps(value) for name, value in dataclasses.asdict(facts.config).items()}),  # type: ignore[call-overload]
        "",
        "## Versions",
        "",
        *_table(versions()),
        "",
    ]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    packages = ("peftmux", "torch", "transformers", "accelerate", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
