"""Every variant that `peftmux train` offers: trained, resumed at half to the bit, served with the trainer's numbers.

All adapters stand in one engine and are asked in one batch. What PEFT can load has PEFT's logits, too;
what changes weights alone is merged into them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftmux.cli.main import main
from peftmux.trainer import train
from peftmux.trainer.data import Example
from peftmux.trainer.methods import METHODS
from tests.engine.harness import ask_all, load, request, running
from tests.trainer.method_runs import check_resumes
from tests.trainer.tiny_models import build_model, copy_task, save_base, write_rows

SHAPE = "llama-biased"
Config = dict[str, Any]
PATTERNS: Config = {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}}
TEXT: Config = {"num_virtual_tokens": 4, "prompt_init": "text", "prompt_init_text": "ab=AB"}
VARIANTS: dict[str, tuple[str, Config]] = {
    "lora": ("lora", {"r": 4}),
    "lora, patterns": ("lora", PATTERNS),
    "lora, rslora": ("lora", {"r": 4, "use_rslora": True}),
    "lora, some layers": ("lora", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "rslora": ("rslora", {"r": 4}),
    "lora-plus": ("lora-plus", {"r": 4}),
    "pissa": ("pissa", {"r": 4}),
    "dora": ("dora", {"r": 4}),
    "dora, patterns": ("dora", PATTERNS),
    "adalora": ("adalora", {"init_r": 6, "target_r": 3}),
    "prefix, flat": ("prefix", {"num_virtual_tokens": 4}),
    "prefix, perceptron": ("prefix", {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16}),
    "p-tuning-v2": ("p-tuning-v2", {}),
    "p-tuning-v2, perceptron": ("p-tuning-v2", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "prompt, random": ("prompt", {"num_virtual_tokens": 4, "prompt_init": "random"}),
    "prompt, vocabulary": ("prompt", {"num_virtual_tokens": 4, "prompt_init": "vocabulary"}),
    "prompt, text": ("prompt", TEXT),
    "prompt, labels": ("prompt", {"num_virtual_tokens": 4, "prompt_init": "labels"}),
    "p-tuning, MLP": ("p-tuning", {"num_virtual_tokens": 4}),
    "p-tuning, LSTM": ("p-tuning", {"num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM"}),
    "p-tuning, template": ("p-tuning", {"template": ["2@0", "1@1", "2@-1"]}),
    "multitask-prompt": ("multitask-prompt", {"num_virtual_tokens": 4, "tasks": ["0", "1"]}),
    "ia3": ("ia3", {}),
    "ln": ("ln", {}),
    "bitfit, all": ("bitfit", {}),
    "bitfit, query and intermediate": ("bitfit", {"bias_terms": "query_intermediate"}),
    "layers, last quarter": ("layers", {}),
    "layers, named": ("layers", {"target_modules": ["lm_head", "layers.0.mlp.up_proj"]}),
    "shira, random": ("shira", {"r": 2}),
    "shira, magnitude": ("shira", {"r": 2, "mask": "magnitude"}),
    "diffpruning, structured": ("diffpruning", {}),
    "diffpruning, entries": ("diffpruning", {"structured": False, "sparsity": 0.1}),
    "ladder, replace": ("ladder", {"reduction_factor": 2}),
    "ladder, add": ("ladder", {"reduction_factor": 2, "merge": "add"}),
    "ladder, gate": ("ladder", {"layers": [1], "merge": "gate"}),
    "loramoe": ("loramoe", {"r": 4}),
    "mixlora, top 1": ("mixlora", {"r": 4, "top_k": 1}),
    "mixlora, top 2": ("mixlora", {"r": 4, "top_k": 2}),
    "houlsby": ("houlsby", {}),
    "pfeiffer": ("pfeiffer", {}),
    "pfeiffer, adapterdrop": ("pfeiffer", {"adapterdrop": 1, "drop_first": 1}),
    "pfeiffer, norms": ("pfeiffer", {"ln_before": True, "leave_out": [0]}),
    "parallel": ("parallel", {}),
    "fusion": ("fusion", {}),
}
ELSEWHERE = {"head": "test_trainer_heads.py", "vora": "test_trainer_vora.py"}
RESUMED_ELSEWHERE = {
    *("lora", "rslora", "lora-plus", "pissa", "dora", "adalora", "prefix, flat", "prefix, perceptron", "p-tuning-v2"),
    *("p-tuning, MLP", "p-tuning, template", "prompt, random", "ia3", "ln", "shira, random", "bitfit, all"),
    *("layers, last quarter", "diffpruning, structured", "ladder, replace", "loramoe", "mixlora, top 2", "fusion"),
    *("houlsby", "parallel", "multitask-prompt"),
}
"""By `check_resumes` in the methods' own files in tests/trainer."""
IN_PEFT = {
    *("lora", "rslora", "lora-plus", "pissa", "dora", "adalora", "prefix", "p-tuning-v2", "prompt"),
    *("ia3", "ln", "shira"),
}
MERGED = {
    *("lora", "rslora", "lora-plus", "pissa", "dora", "adalora"),
    *("ia3", "ln", "bitfit", "layers", "shira", "diffpruning"),
}
"""Methods that change weights, and nothing else."""
PROMPTS = ([101, 65, 102, 65, 103], [70, 71], list(range(100, 119)))
NEW = 4


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / SHAPE, SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{**row, "task": i % 2} for i, row in enumerate(copy_task(64))]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def stages(stored: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two bottlenecks for a fusion's second stage."""
    folder = tmp_path_factory.mktemp("stages")
    for i in range(2):
        run = {"max_steps": 3, "learning_rate": 2e-2, "disable_tqdm": True, "seed": i}
        train("pfeiffer", model=stored, data=data, out=folder / str(i), training=run)
    return [str(folder / str(i)) for i in range(2)]


def config_of(variant: str, stages: list[str]) -> Config:
    method, config = VARIANTS[variant]
    return {**config, "adapters": stages} if method == "fusion" else config


def test_no_method_is_left_out():
    assert {method for method, _ in VARIANTS.values()} | ELSEWHERE.keys() == METHODS.keys()


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in RESUMED_ELSEWHERE])
def test_interrupted_and_resumed_it_has_the_bits_of_a_whole_run(
    variant: str, stored: Path, data: Path, stages: list[str], tmp_path: Path
):
    check_resumes(VARIANTS[variant][0], stored, data, tmp_path, config_of(variant, stages))


def trainer_says(result: Any, prompt: list[int], task: int | None) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, by the live model of the run."""
    ids: list[int] = []
    values: list[float] = []
    for _ in range(NEW):
        row = Example(prompt + ids, [-100] * len(prompt) + ids, task=None if task is None else str(task))
        row = result.adapter.place(row)
        with torch.inference_mode():
            logits = result.model(input_ids=torch.tensor([row.input_ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(logits.argmax()))
        values.append(float(logits.max()))
    return ids, values


def check_merged(folder: Path, base: Path, expected: list[tuple[list[int], list[float]]]) -> None:
    """A plain model of the merged weights says what the trainer says, teacher-forced."""
    out = folder.with_name(f"{folder.name}.merged")
    words = ["--model", str(base), "--out", str(out), "--dtype", "float32"]
    assert main(["adapters", "merge", str(folder), *words]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for prompt, (tokens, values) in zip(PROMPTS, expected, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logits.max(-1).values.tolist() == pytest.approx(values, abs=2e-4), folder


def pefts_logits(folder: Path, ids: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(build_model(SHAPE), str(folder)).eval()
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits[:, -ids.shape[1] :]


async def test_the_engine_and_merged_weights_have_the_trainers_numbers(
    stored: Path, data: Path, stages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"max_steps": 6, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    names = {variant: f"a{i}" for i, variant in enumerate(VARIANTS)}
    expected = {}
    ids = torch.tensor([PROMPTS[2]])
    plain = build_model(SHAPE)(input_ids=ids).logits
    for variant, name in names.items():
        method, _ = VARIANTS[variant]
        config = config_of(variant, stages)
        result = train(method, model=stored, data=data, out=tmp_path / name, config=config, training=training)
        tasks = (0, 1) if method == "multitask-prompt" else (None,)
        for task in tasks:
            for i, prompt in enumerate(PROMPTS):
                expected[variant, task, i] = trainer_says(result, prompt, task)
        if method in IN_PEFT or (method == "p-tuning" and "template" not in config):
            with torch.inference_mode():
                ours = result.model(input_ids=ids).logits[:, -ids.shape[1] :]
            torch.testing.assert_close(ours, pefts_logits(tmp_path / name, ids), rtol=0, atol=2e-4, msg=variant)
            assert (ours - plain).abs().max() > 1e-3, variant
    async with running(str(stored), adapters_root=str(tmp_path)) as engine:
        for name in names.values():
            await load(engine, name)
        asked = [request(PROMPTS[i], names[variant], NEW, task=task) for variant, task, i in expected]
        answers = await ask_all(engine, asked)
    for (variant, task, i), answer in zip(expected, answers, strict=True):
        tokens, values = expected[variant, task, i]
        assert answer.ids == tokens, (variant, task, i)
        assert answer.values == pytest.approx(values, abs=2e-4), (variant, task, i)
    for variant, name in names.items():
        if VARIANTS[variant][0] in MERGED:
            check_merged(tmp_path / name, stored, [expected[variant, None, i] for i in range(len(PROMPTS))])
            continue
        words = ["--model", str(stored), "--out", str(tmp_path / "refused")]
        assert main(["adapters", "merge", str(tmp_path / name), *words]) == 1, variant
        assert "cannot be merged into the base's weights" in capsys.readouterr().err, variant
