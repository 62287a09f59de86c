"""The sampler on a CUDA device: the same tokens as the reference, and as the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftmux.runtime.model.sampler import prompt_logprobs, sample
from peftmux.runtime.params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.1, "top_p": 0.9, "top_k": 100},
    {"temperature": 0.0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {5: 3.0}},
]


def batch(plan, vocabulary: int):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(48, vocabulary, generator=generator) * 3
    rows = [
        plan(SamplingParams(seed=i, **KINDS[i % 6]), output=(3, 4, i), suppressed=(7,) * (i % 2), logprobs=3)
        for i in range(48)
    ]
    return logits, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference_on_the_device(plan, reference, dtype):
    logits, rows = batch(plan, 300)
    logits = logits.to(dtype)
    got = [token for token, _ in sample(logits.cuda(), rows)]
    assert got == [reference.token(one, row) for one, row in zip(logits, rows, strict=True)]


def test_equals_the_cpu_over_a_large_vocabulary(plan):
    logits, rows = batch(plan, 151_936)
    on_cpu, on_device = sample(logits, rows), sample(logits.cuda(), rows)
    assert [token for token, _ in on_device] == [token for token, _ in on_cpu]
    for (_, a), (_, b) in zip(on_cpu, on_device, strict=True):
        assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
        assert [value for _, value in b.top] == pytest.approx([value for _, value in a.top], abs=1e-4)


def test_logits_that_are_not_finite_fail_their_row_only(plan):
    logits, rows = batch(plan, 300)
    logits = logits.cuda()
    good = sample(logits, rows)
    logits[3, 9] = float("nan")
    got = sample(logits, rows)
    assert got[3] == (None, None)
    assert [token for i, (token, _) in enumerate(got) if i != 3] == [t for i, (t, _) in enumerate(good) if i != 3]
    assert prompt_logprobs(logits[:5], [1] * 5, 0) == ()
    assert len(prompt_logprobs(logits[:3], [1] * 3, 0)) == 3
