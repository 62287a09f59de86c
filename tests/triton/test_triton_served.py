"""Whole models served by the Triton forms, in the interpreter on the CPU: greedy tokens equal PEFT's own."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, PeftConfig
from safetensors.torch import load_file

from tests.engine.harness import FIXTURES, ask_all, check_quiet, load, request, running
from tests.model.families import build, greedy
from tests.model.test_family_adapters import TASK, engine_for, lora, save_adapter
from tests.parity.test_parity_served import TOLERANCE, VOCABULARY, table

PROMPTS = [[5, 9, 17, 33], [101, 44, 7]]
NEW_TOKENS = 2

KERNELS = {
    "elementwise": ("rms_norm_kernel", "rotate_pair_kernel", "swiglu_kernel"),
    "inputs": ("scale_rows_kernel",),
    "norms": ("slot_norm_kernel",),
    "embedding": ("embedding_kernel",),
    "sparse": ("sparse_kernel",),
    "rows": ("replaced_rows_kernel",),
    "bottleneck": ("read_kernel", "down_kernel", "up_kernel"),
}

CASES: dict[str, tuple[str, dict[str, PeftConfig], set[str]]] = {
    "qwen3": (
        "qwen3",
        {
            "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
            "norms": LNTuningConfig(target_modules=["q_norm", "input_layernorm", "norm"], **TASK),
            "embedding": lora(target_modules=["embed_tokens", "o_proj"]),
        },
        {"rms_norm_kernel", "rotate_pair_kernel", "swiglu_kernel", "slot_norm_kernel", "embedding_kernel"},
    ),
    "gpt2": (
        "gpt2",
        {
            "ia3": IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], **TASK),
            "norms": LNTuningConfig(target_modules=["ln_1", "ln_f"], **TASK),
        },
        {"scale_rows_kernel", "slot_norm_kernel"},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "norms": LNTuningConfig(target_modules=["q_norm", "input_layernorm", "norm"], **TASK),
            "tokens": lora(target_modules=["q_proj"], trainable_token_indices=[5, 44, 9]),
        },
        {"rotate_pair_kernel", "slot_norm_kernel", "embedding_kernel", "replaced_rows_kernel"},
    ),
}


TOGETHER = {
    "adapterhub": [
        *("houlsby_double_seq_bn", "pfeiffer_seq_bn", "parallel_par_bn", "pfeiffer_leave_out_0"),
        *("fusion", "ia3", "lora"),
    ],
    "peft": ["shira", "ln_tuning", "ia3", "lora_embed", "lora_trainable_tokens", "lora_modules_to_save"],
}
"""Folders of the fixtures' Llama."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Have every site take the form that it takes on a GPU; -> launches by kernel."""
    counts: Counter[str] = Counter()
    for operator in KERNELS:
        launcher = importlib.import_module(f"peftmux.kernels.{operator}.launch")
        monkeypatch.setattr(launcher, "triton_here", lambda device: True)
        kernels = importlib.import_module(f"peftmux.kernels.{operator}.triton_kernels")
        for name in KERNELS[operator]:
            monkeypatch.setattr(kernels, name, _Counting(getattr(kernels, name), name, counts))
    return counts


class _Counting:
    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._counts[self._name] += 1
        return self._kernel[grid]


@pytest.mark.parametrize("case", CASES)
async def test_served_tokens_are_peft_s(case: str, tmp_path: Path, launched: Counter[str]) -> None:
    """All adapters and the base in one batch."""
    family, configs, kernels = CASES[case]
    expected = [greedy(build(family), p, NEW_TOKENS) for p in PROMPTS]
    for name, config in configs.items():
        adapted = save_adapter(family, config, tmp_path / name)
        expected += [greedy(adapted, p, NEW_TOKENS) for p in PROMPTS]
    async with engine_for(family, tmp_path, max_batch_tokens=32) as engine:
        for name in configs:
            await load(engine, name)
        launched.clear()
        wanted = [request(p, name, NEW_TOKENS) for name in ("", *configs) for p in PROMPTS]
        assert [answer.ids for answer in await ask_all(engine, wanted)] == expected
        for name in configs:
            await engine.unload_adapter(name)
        await check_quiet(engine)
    assert set(launched) == kernels


async def test_every_kind_in_one_batch(launched: Counter[str]) -> None:
    """The numbers that PEFT and AdapterHub saved, of one prompt of each folder."""
    async with running(adapters_root=str(FIXTURES), block_size=4) as engine:
        jobs = []
        for library, folders in TOGETHER.items():
            for folder in folders:
                name = f"{library}-{folder}"
                await load(engine, f"{library}/llama/{folder}", name)
                expected = load_file(FIXTURES / library / "llama" / folder / "expected.safetensors")
                ids = expected["input_ids"][0].tolist()
                jobs.append((name, ids, expected["logits"][0][-len(ids) :].float().log_softmax(-1)))
        launched.clear()
        wanted = [request(ids, name, 1, prompt_logprobs=VOCABULARY) for name, ids, _ in jobs]
        for answer, (_, _, logprobs) in zip(await ask_all(engine, wanted), jobs, strict=True):
            torch.testing.assert_close(table(answer), logprobs[:-1], rtol=0, atol=TOLERANCE)
        for name, _, _ in jobs:
            await engine.unload_adapter(name)
        await check_quiet(engine)
    assert set(launched) == {kernel for kernels in KERNELS.values() for kernel in kernels} - {"scale_rows_kernel"}
