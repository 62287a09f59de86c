"""Classifiers end as served adapters: `peftmux train --task --publish`, then `Classify` on the server that watches.

The trainer's card says the loss of its own evaluation; the served scores of the same rows give it again.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from peftmux.client import AdapterState, AsyncClient, Classification, Client
from peftmux.trainer.cli import main as train
from tests.serving.conftest import Running, Start
from tests.serving.test_watched_training import soon, state

LABELS = ("early", "late", "middle")
METHODS: dict[str, tuple[str, ...]] = {
    "head": (),
    "lora": ("--r", "4"),
    "dora": ("--r", "4"),
    "prefix": ("--num-virtual-tokens", "5"),
    "p-tuning-v2": ("--prefix-projection",),
    "prompt": ("--num-virtual-tokens", "5", "--prompt-init", "labels"),
    "houlsby": (),
    "pfeiffer": ("--adapterdrop", "1", "--drop-first", "1"),
    "ladder": ("--reduction-factor", "2"),
}
NAMES = {(method, task): f"{method}-{task}" for method in METHODS for task in ("sequence", "token")}
Row = dict[str, Any]


def label(word: int) -> str:
    return LABELS[0] if word < 20 else LABELS[1] if word >= 40 else LABELS[2]


def rows(task: str, count: int, seed: int) -> list[Row]:
    """Which third of the vocabulary a word is of: every word, or the last."""
    rng = random.Random(seed)
    texts = [rng.choices(range(4, 60), k=rng.randint(1, 6)) for _ in range(count)]
    if task == "sequence":
        return [{"text": " ".join(f"w{i}" for i in words), "label": label(words[-1])} for words in texts]
    return [{"tokens": [f"w{i}" for i in words], "labels": [label(i) for i in words]} for words in texts]


def write(path: Path, found: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def text(row: Row) -> str:
    return row["text"] if "text" in row else " ".join(row["tokens"])


def wanted(row: Row) -> list[str]:
    return [row["label"]] if "label" in row else row["labels"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def watching(start: Start, root: Path) -> Iterator[Running]:
    server = start("--adapters", str(root), "--watch-adapters", "--watch-seconds", "0.1")
    yield server
    assert server.leave(10) == 0


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Row]]:
    return {task: rows(task, 24, seed=1) for task in ("sequence", "token")}


@pytest.fixture(scope="module")
def losses(
    watching: Running,
    root: Path,
    held_out: dict[str, list[Row]],
    long_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, float]:
    """Every method with both heads, and one that writes, trained into the watched folder: the trainer's own losses."""
    folder = tmp_path_factory.mktemp("runs")
    fixed = ["--model", str(long_base), "--publish", str(root), "--dtype", "float32", "--max-steps", "12"]
    fixed += ["--per-device-train-batch-size", "8", "--disable-tqdm", "true"]
    for (method, task), name in NAMES.items():
        data = write(folder / f"{task}.jsonl", rows(task, 64, seed=0))
        whole = write(folder / f"{task}-eval.jsonl", held_out[task])
        words = ["--task", task, "--data", str(data), "--eval-data", str(whole), "--per-device-eval-batch-size", "24"]
        assert train([method, *fixed, *words, *METHODS[method], "--out", str(folder / name)]) == 0
    answers = write(
        folder / "text.jsonl", [{"prompt": text(row), "completion": " w70"} for row in held_out["sequence"]]
    )
    writer = ["--data", str(answers), "--learning-rate", "0.05", "--out", str(folder / "writer")]
    assert train(["lora", *fixed, *writer]) == 0
    cards = {name: (root / name / "README.md").read_text() for name in NAMES.values()}
    return {name: float(re.search(r"\| eval_loss \| (\S+) \|", card)[1]) for name, card in cards.items()}  # type: ignore[index]


def loss(answers: Sequence[Classification], found: Sequence[Row]) -> float:
    """Mean cross entropy over everything that has a label."""
    terms = []
    for answer, row in zip(answers, found, strict=True):
        assert answer.labels == LABELS
        for scores, name in zip(answer.rows, wanted(row), strict=True):
            total = math.fsum(map(math.exp, scores.logits))
            assert scores.probabilities == pytest.approx([math.exp(x) / total for x in scores.logits], abs=1e-6)
            assert scores.label == LABELS[scores.logits.index(max(scores.logits))]
            terms.append(math.log(total) - scores.logits[LABELS.index(name)])
    return math.fsum(terms) / len(terms)


async def test_served_scores_give_the_trainers_evaluation(
    watching: Running, losses: dict[str, float], held_out: dict[str, list[Row]]
) -> None:
    """All at once, beside an adapter that writes and the base."""
    with Client(watching.grpc, timeout=60) as client:
        for name in (*NAMES.values(), "writer"):
            soon(lambda name=name: state(client, name) is AdapterState.READY, watching)  # type: ignore[misc]
        alone = client.classify("w5 w50", adapter="lora-sequence").rows[0].logits
    async with AsyncClient(watching.grpc, timeout=60) as client:
        asked = [
            client.classify(text(row), adapter=name) for (_, task), name in NAMES.items() for row in held_out[task]
        ]
        written = [
            client.generate(text(row), adapter=name, max_tokens=4, temperature=0)
            for row in held_out["sequence"]
            for name in ("writer", "")
        ]
        scored, texts, mixed = await asyncio.gather(
            asyncio.gather(*asked), asyncio.gather(*written), client.classify("w5 w50", adapter="lora-sequence")
        )
    assert mixed.rows[0].logits == pytest.approx(alone, abs=1e-5)
    by_writer, by_base = ([answer.text.split() for answer in texts[i::2]] for i in (0, 1))
    assert all(words[0] == "w70" for words in by_writer)
    assert by_base != by_writer
    served = {}
    for i, ((_, task), name) in enumerate(NAMES.items()):
        served[name] = loss(scored[24 * i : 24 * i + 24], held_out[task])
    assert served == pytest.approx(losses, abs=1e-4)
    assert len({round(value, 3) for value in served.values()}) > len(served) / 2, "the adapters differ"
