"""The sampler again, one row and one number at a time: slow, obvious, and sharing no code with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, log1p
from types import SimpleNamespace

import pytest
from torch import Tensor

from peftmux.runtime.params import OutputOptions, SamplingParams
from peftmux.runtime.scheduler import History, RowPlan

WORD = (1 << 32) - 1
DEFAULT = SamplingParams()


@dataclass(frozen=True, slots=True)
class Told(RowPlan):
    """A plan that says besides what its history was made of."""

    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()


def row(
    sampling: SamplingParams = DEFAULT,
    *,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    suppressed: tuple[int, ...] = (),
    logprobs: int | None = None,
    id: int = 0,
) -> RowPlan:
    """A row that samples its next token after `prompt` and `output`."""
    penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    tokens = prompt + output
    return Told(
        row=id,
        slot=0,
        tokens=tokens[-1:],
        start=len(tokens) - 1,
        position_offset=0,
        blocks=(1,),
        samples=True,
        generated=len(output),
        sampling=sampling,
        output=OutputOptions(logprobs=logprobs),
        prompt_logprobs_from=1,
        next_tokens=(),
        suppressed=suppressed,
        history=history(prompt, output) if penalised else None,
        prompt_ids=prompt,
        output_ids=output,
    )


def history(prompt: tuple[int, ...], output: tuple[int, ...]) -> History:
    told = History(prompt)
    for drawn in output:
        told.add(drawn)
    return told


def _mix64(word: int) -> int:
    mask = (1 << 64) - 1
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
    word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
    return word ^ word >> 31


def noise(seed: int, index: int, id: int) -> float:
    """log E of one vocabulary id."""
    key = _mix64(_mix64(seed) + (index + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    bits = id * 0x9E3779B1 + (key >> 32) & WORD
    bits = ((bits ^ bits >> 16) * 0x85EBCA6B & WORD) ^ (key & WORD)
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & WORD
    bits ^= bits >> 16
    uniform = ((bits & 0x7FFFFFFF) + 0.5) / 2**31
    return log(-log1p(-min(uniform, 1 - 2**-24)))


def changed(logits: list[float], plan: Told) -> list[float]:
    sampling, logits = plan.sampling, list(logits)
    if sampling.repetition_penalty != 1:
        for t in {*plan.prompt_ids, *plan.output_ids}:
            logits[t] = (
                logits[t] / sampling.repetition_penalty if logits[t] > 0 else logits[t] * sampling.repetition_penalty
            )
    for t in plan.output_ids:
        logits[t] -= sampling.frequency_penalty
    for t in set(plan.output_ids):
        logits[t] -= sampling.presence_penalty
    for t, bias in sampling.logit_bias.items():
        logits[t] += bias
    for t in plan.suppressed:
        logits[t] = float("-inf")
    return logits


def survivors(scores: list[float], sampling: SamplingParams) -> set[int]:
    """Tempered scores to the ids that may be drawn, by sorting everything."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    kept = order[: sampling.top_k] if sampling.top_k else order
    kept = [i for i in kept if exp(scores[i] - scores[order[0]]) >= sampling.min_p]
    weights = [exp(scores[i] - scores[order[0]]) for i in kept]
    mass, head = 0.0, []
    for i, weight in zip(kept, weights, strict=True):
        head.append(i)
        mass += weight
        if sampling.top_p < 1 and mass >= sampling.top_p * sum(weights):
            break
    return set(head)


def token(logits: Tensor, plan: Told) -> int:
    scores = changed(logits.float().tolist(), plan)
    sampling = plan.sampling
    if sampling.temperature == 0:
        return max(range(len(scores)), key=lambda i: scores[i])
    scores = [s / sampling.temperature for s in scores]
    allowed = survivors(scores, sampling)
    return max(allowed, key=lambda i: scores[i] - noise(sampling.seed, plan.generated, i))


@pytest.fixture(scope="session")
def reference() -> SimpleNamespace:
    return SimpleNamespace(changed=changed, survivors=survivors, token=token, noise=noise)


@pytest.fixture(scope="session")
def plan() -> Callable[..., RowPlan]:
    return row
