"""QLoRA (Dettmers et al., 2023, arXiv 2305.14314): adapters trained over a base held in 4 or 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peftmux.adapters.checkpoint import load_checkpoint
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.quantised import is_quantised, weights_stay_as_stored
from peftmux.adapters.torch_base import TorchBase
from peftmux.trainer import train
from peftmux.trainer.cli import main
from peftmux.trainer.jobs.file import read_jobs
from peftmux.trainer.methods import METHODS
from peftmux.trainer.methods.base import AttachContext
from tests.engine.harness import ask_all, load, request, running
from tests.parity.test_parity_served import table
from tests.trainer.lowered import lowered_logits
from tests.trainer.method_runs import StopAt, check_learns
from tests.trainer.tiny_models import random_ids

VOCABULARY = 260
QUICK = {"max_steps": 6, "per_device_train_batch_size": 4, "disable_tqdm": True, "logging_steps": 3}


def needs(quantization: str) -> None:
    library = "torchao" if quantization == "fp8" else "bitsandbytes"
    pytest.importorskip(library, reason=f"needs {library}, which `peftmux[test]` brings on Linux")


def loaded(folder: Path, quantization: str) -> Any:
    needs(quantization)
    module = load_checkpoint(str(folder), quantization=quantization, dtype=torch.float32)
    weights_stay_as_stored(module)
    return module


def gradients(model: Any, method: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    adapter = METHODS[method].attach(model, METHODS[method].config_class(), AttachContext(seed=1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in adapter.parameters.items()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def dequantised_base(folder: Path, quantization: str) -> Any:
    """Plain layers of the same weights; transformers makes them of bitsandbytes' forms alone."""
    module = loaded(folder, quantization)
    if quantization != "fp8":
        return module.dequantize()
    plain = load_checkpoint(str(folder), dtype=torch.float32)
    for name, weight in module.named_parameters():
        if hasattr(weight, "qdata"):
            plain.get_parameter(name).data = weight.qdata.float() * weight.scale
    return plain


@pytest.mark.parametrize(
    ("method", "quantization"),
    [("lora", "nf4"), ("dora", "nf4"), ("layers", "nf4"), ("lora", "fp8"), ("dora", "fp8"), ("layers", "fp8")],
)
def test_gradients_are_those_over_the_dequantised_base(method: str, quantization: str, qwen2: Path) -> None:
    ids = random_ids(2, 12)
    quantised, plain = loaded(qwen2, quantization), dequantised_base(qwen2, quantization)
    assert any(is_quantised(m) for m in quantised.modules())
    assert not any(is_quantised(m) for m in plain.modules())
    expected = gradients(plain, method, ids)
    for name, gradient in gradients(quantised, method, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("method", "quantization"), [("lora", "nf4"), ("dora", "nf4"), ("lora", "int8"), ("dora", "fp8")]
)
def test_a_run_learns_resumes_to_the_bit_and_loads(
    method: str, quantization: str, taught: Path, rows: Path, tmp_path: Path
) -> None:
    """With evaluations between: they must leave the weights as they are."""
    needs(quantization)
    run: dict[str, Any] = {"model": taught, "data": rows, "eval_data": rows, "quantization": quantization}
    often = {**QUICK, "eval_strategy": "steps", "eval_steps": 2}
    train(method, **run, out=tmp_path / "whole", training=often)
    saving = {**often, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        train(method, **run, out=tmp_path / "cut", training=saving, callbacks=[StopAt()])
    train(method, **run, out=tmp_path / "cut", training=saving, resume=True)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    base = loaded(taught, quantization).eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        changed = lowered_logits(base, load_adapter(tmp_path / "whole", TorchBase(base)), ids)
        assert (changed - base(ids).logits).abs().max() > 1e-3


def test_qlora_is_lora_over_a_base_in_4_bits(qwen2: Path, rows: Path, tmp_path: Path) -> None:
    needs("nf4")
    words = ["--model", str(qwen2), "--data", str(rows), "--max-steps", "3", "--disable-tqdm", "true"]
    words += ["--per-device-train-batch-size", "4"]
    assert main(["qlora", *words, "--out", str(tmp_path / "a")]) == 0
    train("qlora", model=qwen2, data=rows, out=tmp_path / "b", training={**QUICK, "max_steps": 3})
    train("lora", model=qwen2, data=rows, out=tmp_path / "c", training={**QUICK, "max_steps": 3})
    first, second, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert not all(torch.equal(first[name], plain[name]) for name in first)
    (tmp_path / "int8.yaml").write_text("quantization: int8")
    assert main(["qlora", *words, "--out", str(tmp_path / "d"), "--config", str(tmp_path / "int8.yaml")]) == 0
    train("lora", model=qwen2, data=rows, out=tmp_path / "e", quantization="int8", training={**QUICK, "max_steps": 3})
    third, fourth = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "de")
    assert all(torch.equal(third[name], fourth[name]) for name in third | fourth)
    entry = {"name": "a", "method": "qlora", "model": str(qwen2), "data": str(rows), "out": "a"}
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [entry, {**entry, "name": "b", "out": "b"}]}))
    assert {(spec.method.name, spec.options.quantization) for spec in read_jobs(tmp_path / "jobs.json")} == {
        ("lora", "nf4")
    }


@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp8"])
def test_it_learns_with_the_defaults(quantization: str, taught: Path, rows: Path, tmp_path: Path) -> None:
    needs(quantization)
    check_learns("lora", taught, rows, tmp_path, options={"quantization": quantization})


def pefts_logprobs(module: Any, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = PeftModel.from_pretrained(module, str(folder)).eval()(input_ids=ids).logits
    return logits[0].float().log_softmax(-1)


@pytest.mark.parametrize(("quantization", "rounding"), [("nf4", 0.02), ("int8", 0.1), ("fp8", None)])
async def test_what_was_trained_in_few_bits_is_served_with_pefts_numbers(
    quantization: str, rounding: float | None, taught: Path, rows: Path, tmp_path: Path
) -> None:
    """PEFT's over plain layers of the weights that the few bits stand for, to float32's rounding.

    Over bitsandbytes' own layers PEFT's differ by `rounding` in the mean: those of NF4 round to bfloat16 on some CPUs,
    those of int8 round a token's inputs to 8 bits, by outliers of the whole batch.
    """
    needs(quantization)
    words = ["--model", str(taught), "--data", str(rows), "--max-steps", "20", "--disable-tqdm", "true"]
    words += ["--quantization", quantization, "--dtype", "float32", "--per-device-train-batch-size", "16"]
    for method in ("lora", "dora"):
        assert main([method, *words, "--out", str(tmp_path / "served" / method)]) == 0
    prompts = [random_ids(1, length)[0].tolist() for length in (3, 12, 19)]
    settings: dict[str, Any] = {"quantization": quantization, "adapters_root": str(tmp_path / "served")}
    async with running(str(taught), **settings) as engine:
        for method in ("lora", "dora"):
            await load(engine, method)
        jobs = [(method, prompt) for prompt in prompts for method in ("", "lora", "dora")]
        answers = await ask_all(engine, [request(p, m, max_tokens=1, prompt_logprobs=VOCABULARY) for m, p in jobs])
    plain = {}
    for (method, prompt), answer in zip(jobs, answers, strict=True):
        served, ids = table(answer, VOCABULARY), torch.tensor([prompt])
        if not method:
            plain[len(prompt)] = served
            continue
        folder = tmp_path / "served" / method
        exact = pefts_logprobs(dequantised_base(taught, quantization), folder, ids)[:-1]
        torch.testing.assert_close(served, exact, rtol=0, atol=1e-4, msg=method)
        assert (served - plain[len(prompt)]).abs().max() > 0.1, "the adapter would be invisible"
        if rounding is None:
            continue
        theirs = load_checkpoint(str(taught), quantization=quantization, dtype=torch.float32)
        apart = (served - pefts_logprobs(theirs, folder, ids)[:-1]).abs().mean()
        assert apart < rounding, method
