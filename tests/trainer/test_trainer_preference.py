"""DPO and KTO: the papers' formulas, the base as the reference, and what a run of each leaves."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from peftmux.trainer import DataError, OptionError, train
from peftmux.trainer.data import PaddingCollator, PreferenceCollator
from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.data.preference import REFERENCE, encode_preferences
from peftmux.trainer.data.rows import Row, read_rows
from peftmux.trainer.jobs.file import read_jobs
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.run import objective
from peftmux.trainer.run.objective import Preference
from peftmux.trainer.run.preference import dpo, kto, log_probabilities
from tests.trainer.method_runs import StopAt
from tests.trainer.tiny_models import build_model, build_tokenizer, copy_task, write_rows

QUICK: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 1e-2}
CONFIGS: dict[str, dict[str, Any]] = {"lora": {"r": 4}, "prefix": {"num_virtual_tokens": 3}, "prompt": {}, "pissa": {}}


def rows_of(loss: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Wanted: small letters after "up", where the taught base writes capitals."""
    tasks = [(f"up {row['prompt']}", row["completion"]) for row in copy_task(count, seed)]
    if loss == "dpo":
        return [{"prompt": prompt, "chosen": text.lower(), "rejected": text} for prompt, text in tasks]
    both = [[(prompt, text.lower(), True), (prompt, text, False)] for prompt, text in tasks]
    return [{"prompt": p, "completion": c, "label": wanted} for pair in both for p, c, wanted in pair]


def put(path: Path, loss: str, count: int, seed: int = 0) -> Path:
    return write_rows(path, rows_of(loss, count, seed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_formulas_on_numbers():
    policy, reference = torch.tensor([[-3.0, -5.0], [-2.0, -2.0]]), torch.tensor([[-4.0, -4.5], [-2.0, -2.0]])
    expected = [-math.log(sigmoid(0.5 * (1.0 + 0.5))), math.log(2)]
    assert dpo(policy, reference, 0.5).tolist() == pytest.approx(expected)
    policy = torch.tensor([[-3.0, -1.0], [-2.0, -6.0], [-7.0, -2.0]])
    reference = torch.tensor([[-4.0, -4.0], [-2.5, -6.0], [-6.0, -5.0]])
    z = (3.0 + 0.0 + 3.0) / 3
    wanted = torch.tensor([True, False, True])
    values = [2.0 * (1 - sigmoid(0.5 * (1.0 - z))), 3.0 * (1 - sigmoid(0.5 * (z - 0.5))), 2.0 * (1 - sigmoid(-1.5))]
    assert kto(policy, reference, wanted, 0.5, (2.0, 3.0)).tolist() == pytest.approx(values)
    far = reference - 9.0  # the divergence is not estimated below zero
    nearer = kto(far, reference, wanted, 1.0, (1.0, 1.0))
    assert nearer.tolist() == pytest.approx([1 - sigmoid(-9), 1 - sigmoid(9), 1 - sigmoid(-9)])


def test_the_divergence_has_no_gradient():
    policy = torch.tensor([[-3.0, -1.0], [-2.0, -1.0]], requires_grad=True)
    kto(policy, torch.full((2, 2), -2.0), torch.tensor([True, False]), 0.1, (1.0, 1.0)).sum().backward()
    assert policy.grad is not None
    assert policy.grad[:, 1].tolist() == [0.0, 0.0]
    assert policy.grad[0, 0] < 0 < policy.grad[1, 0]


def test_log_probabilities_are_of_the_learned_tokens():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORED, IGNORED, 3, 1, IGNORED], [6, 5, IGNORED, IGNORED, 2]])
    table = logits.double().log_softmax(-1)
    expected = [table[0, 1, 3] + table[0, 2, 1], table[1, 0, 5] + table[1, 3, 2]]
    torch.testing.assert_close(log_probabilities(logits, labels).double(), torch.stack(expected))


def alone(model: Any, prompt: str, completion: str) -> float:
    """log p(completion and its end | prompt), of one unpadded row in plain torch."""
    tokenizer = build_tokenizer()
    first, rest = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], 2]
    ids = torch.tensor([[*first, *rest]])
    with torch.no_grad():
        table = model(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
    return sum(float(table[len(first) - 1 + i, token]) for i, token in enumerate(rest))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_runs_loss_is_the_papers(loss: str, method: str, taught: Path, tmp_path: Path):
    held_out = put(tmp_path / "eval.jsonl", loss, 3, seed=1)
    result = train(
        method,
        model=taught,
        data=put(tmp_path / "rows.jsonl", loss, 8),
        eval_data=held_out,
        out=tmp_path / "a",
        config=CONFIGS[method],
        training={**QUICK, "per_device_eval_batch_size": 8},
        loss=loss,
        beta=0.3,
        desirable_weight=1.5,
    )
    base = AutoModelForCausalLM.from_pretrained(taught).eval()

    def ratio(prompt: str, completion: str) -> float:
        return alone(result.model, prompt, completion) - alone(base, prompt, completion)

    rows = rows_of(loss, 3, seed=1)
    if loss == "dpo":
        margins = [ratio(r["prompt"], r["chosen"]) - ratio(r["prompt"], r["rejected"]) for r in rows]
        expected = [-math.log(sigmoid(0.3 * margin)) for margin in margins]
    else:
        others = [rows[(i + 2 - i % 2) % len(rows)] for i in range(len(rows))]  # the next prompt's first row
        z = max(0.0, sum(ratio(r["prompt"], o["completion"]) for r, o in zip(rows, others, strict=True)) / len(rows))
        own = [(r["label"], ratio(r["prompt"], r["completion"])) for r in rows]
        expected = [1.5 * (1 - sigmoid(0.3 * (r - z))) if good else 1 - sigmoid(0.3 * (z - r)) for good, r in own]
    assert result.metrics["eval_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_processes_share_the_references(count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Of three batches, the last of which is short: each of two processes makes two passes."""
    path, tokenizer = put(tmp_path / "rows", "dpo", 5), build_tokenizer()
    encoded = encode_preferences(read_rows(path, "dpo"), tokenizer, path, max_length=64)
    model = build_model("qwen2")
    collator = PreferenceCollator(PaddingCollator(False))
    args = SimpleNamespace(per_device_eval_batch_size=2)
    trainer: Any = SimpleNamespace(
        model=model, data_collator=collator, args=args, compute_loss_context_manager=contextlib.nullcontext
    )
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))

    def scored() -> torch.Tensor:
        features = encoded.features()
        Preference("dpo", 0.1).add_references(trainer, features)
        return torch.tensor([feature[REFERENCE] for feature in features])

    alone = scored()
    assert len(passes) == 3
    monkeypatch.setattr(objective, "processes", lambda: count)
    shares = []
    for rank in range(count):
        passes.clear()
        monkeypatch.setattr(objective, "rank", lambda rank=rank: rank)
        shares.append(scored())
        assert len(passes) == math.ceil(3 / count)
    assert torch.equal(sum(shares[1:], shares[0]), alone)
    assert not any(torch.equal(share, alone) for share in shares) or count == 1


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_run_bends_the_model_with_the_defaults(loss: str, taught: Path, tmp_path: Path):
    logged: list[dict[str, float]] = []

    class Record(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.append(logs)

    held_out = put(tmp_path / "eval.jsonl", loss, 16, seed=1)
    training = {"max_steps": 60, "per_device_train_batch_size": 8, "disable_tqdm": True, "logging_steps": 20}
    result = train(
        "lora",
        model=taught,
        data=put(tmp_path / "rows.jsonl", loss, 64),
        eval_data=held_out,
        out=tmp_path / "a",
        training=training,
        loss=loss,
        callbacks=[Record()],
    )
    assert result.metrics["eval_loss"] < (0.3 if loss == "dpo" else 0.4), "untrained: 0.69 and 0.5"
    seen = [entry for entry in logged if "reward_accuracy" in entry]
    assert len(seen) == 3
    assert seen[-1]["reward_accuracy"] > 0.9
    assert seen[-1]["reward_margin"] > seen[0]["reward_margin"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert f'| loss | "{loss}" |' in card
    assert f"{64 if loss == 'dpo' else 128} rows of {loss}" in card


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_rewards_are_of_the_rows_trained_on(loss: str, taught: Path, tmp_path: Path):
    """Not of those of an evaluation between two logs: these give the same numbers without it."""
    logged: dict[str, list[float]] = {}
    for name, extra in (("a", {}), ("b", {"eval_strategy": "steps", "eval_steps": 1})):
        logged[name] = []

        class Record(TrainerCallback):
            seen = logged[name]

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                self.seen += [logs[key] for key in ("reward_margin", "reward_accuracy") if key in logs]

        train(
            "lora",
            model=taught,
            data=put(tmp_path / "rows.jsonl", loss, 16),
            eval_data=put(tmp_path / "eval.jsonl", loss, 16, seed=1),
            out=tmp_path / name,
            training={**QUICK, "eval_strategy": "no", "logging_steps": 2, **extra},
            loss=loss,
            callbacks=[Record()],
        )
    assert len(logged["a"]) == 6
    assert logged["a"] == logged["b"]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_resumed_run_ends_with_the_same_bits(loss: str, qwen2: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": put(tmp_path / "rows.jsonl", loss, 16), "loss": loss}
    config = {"lora_dropout": 0.1}
    train("lora", **run, config=config, out=tmp_path / "whole", training=QUICK)
    half = {**QUICK, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        train("lora", **run, config=config, out=tmp_path / "half", training=half, callbacks=[StopAt()])
    with pytest.raises(OptionError, match=r"written with beta 0\.1, got 0\.5"):
        train("lora", **run, config=config, out=tmp_path / "half", training=half, resume=True, beta=0.5)
    train("lora", **run, config=config, out=tmp_path / "half", training=half, resume=True)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_jobs_of_every_loss_share_a_batch(qwen2: Path, tmp_path: Path):
    data = {loss: put(tmp_path / f"{loss}.jsonl", loss, 9) for loss in ("dpo", "kto")}
    data["next-token"] = write_rows(tmp_path / "rows.jsonl", copy_task(9))
    methods = {"dpo": "lora", "kto": "prefix", "next-token": "lora"}
    common = {"model": str(qwen2), "max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    jobs = [
        {"name": loss, "method": methods[loss], "data": str(path), "out": str(tmp_path / "out" / loss), "loss": loss}
        for loss, path in data.items()
    ]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {**common, "learning_rate": 1e-2}, "jobs": jobs}))
    specs = read_jobs(tmp_path / "jobs.yaml")
    assert JobRun(specs).run().keys() == set(data)
    for loss, path in data.items():
        training = {k: v for k, v in common.items() if k != "model"} | {"learning_rate": 1e-2, "disable_tqdm": True}
        train(methods[loss], model=qwen2, data=path, out=tmp_path / loss, loss=loss, training=training)
        solo, together = (
            load_file(f / "adapter_model.safetensors") for f in (tmp_path / loss, tmp_path / "out" / loss)
        )
        for name, tensor in solo.items():
            torch.testing.assert_close(together[name], tensor, rtol=0, atol=5e-5, msg=f"{loss} {name}")


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no column": ("dpo", {"prompt": "a", "chosen": "b"}, r":2: missing column 'rejected' \(--loss dpo learns from"),
    "no label": ("kto", {"prompt": "a", "completion": "b"}, ":2: missing column 'label'"),
    "no number": ("dpo", {"prompt": "a", "chosen": "b", "rejected": 3}, ":2: column 'rejected': expected a string, fo"),
    "other label": ("kto", {"prompt": "a", "completion": "b", "label": "yes"}, ":2: column 'label': expected true or"),
    "empty": ("dpo", {"prompt": "a", "chosen": "", "rejected": "c"}, ":2: column 'chosen': expected text, found an em"),
    "too long": ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c" * 99}, ":2: expected at most 40 tokens, found"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_by_file_and_line(case: str, qwen2: Path, tmp_path: Path):
    loss, row, message = BAD[case]
    data = write_rows(tmp_path / "rows.jsonl", [*rows_of(loss, 1)[:1], row])
    with pytest.raises(DataError, match=r"rows\.jsonl" + message):
        train("lora", model=qwen2, data=data, out=tmp_path / "a", loss=loss, max_length=40)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_too_long_goes_with_both_its_sequences(tmp_path: Path):
    rows = [{"prompt": "a", "chosen": "b" * n, "rejected": "c" * m} for n, m in ((2, 2), (30, 2), (3, 30), (4, 4))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"max_length": 10}
    kept = encode_preferences(read_rows(path, "dpo"), build_tokenizer(), path, **options, over_long="drop")
    assert (kept.rows, kept.dropped, kept.truncated) == (2, 2, 0)
    assert [len(example.input_ids) for example in kept.examples] == [4, 4, 6, 6]
    cut = encode_preferences(read_rows(path, "dpo"), build_tokenizer(), path, **options, over_long="truncate")
    assert (cut.rows, cut.dropped, cut.truncated) == (4, 0, 2)


def test_kto_needs_another_row(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of("kto", 1)[:1])
    with pytest.raises(DataError, match="expected at least 2 rows of at most 64 tokens, found 1"):
        encode_preferences(read_rows(path, "kto"), build_tokenizer(), path, max_length=64)


class Counted(str):
    """Counts how often a prompt is compared."""

    compared = 0

    def __ne__(self, other: object) -> bool:
        type(self).compared += 1
        return str(self) != str(other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("prompts", ["aabca", "abcab", "aaaaa", "ba", "cbbaacbbac", "a" * 300])
def test_another_rows_completion_is_that_of_the_next_other_prompt(prompts: str, tmp_path: Path):
    n = len(prompts)
    rows = [
        Row(i, "kto", {"prompt": Counted(p), "completion": chr(97 + i), "label": True}) for i, p in enumerate(prompts)
    ]
    Counted.compared = 0
    encoded = encode_preferences(rows, build_tokenizer(), tmp_path, max_length=64, append_eos=False)
    assert Counted.compared <= 2 * n, "a file may have any number of rows, all with one prompt"
    circle = [[*range(i + 1, n), *range(i)] for i in range(n)]
    wanted = [next((j for j in after if prompts[j] != prompts[i]), after[0]) for i, after in enumerate(circle)]
    own, other = encoded.examples[::2], encoded.examples[1::2]
    assert [example.input_ids[1:] for example in other] == [own[j].input_ids[1:] for j in wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "loss: expected next-token or dpo or kto, got 'ppo'"),
        ({"loss": "dpo", "packing": True}, "packing: dpo scores whole rows"),
        ({"loss": "dpo", "beta": 0.0}, "beta: expected more than 0, got 0.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, qwen2: Path, tmp_path: Path):
    with pytest.raises(OptionError, match=message):
        train("lora", model=qwen2, data=tmp_path, out=tmp_path / "a", **options)
