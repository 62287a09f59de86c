"""What a request must be before it reaches a step: a value that no row may bring there is refused here."""

from __future__ import annotations

import math
from collections.abc import Collection

from peftmux.runtime.engine.api import GenerationRequest, ModelInfo
from peftmux.runtime.engine.placement import Placed
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.params import OutputOptions, SamplingParams, StoppingParams


def check_request(request: GenerationRequest, info: ModelInfo) -> None:
    """InvalidRequest names the first bad field. Lengths are judged later, beside the adapter's virtual tokens."""
    vocabulary = info.vocabulary_size
    check_prompt(request.prompt, info)
    _check_sampling(request.sampling, vocabulary)
    _check_stopping(request.stopping, vocabulary)
    _check_output(request.output, vocabulary)


def check_prompt(prompt: tuple[int, ...], info: ModelInfo) -> None:
    """InvalidRequest for no tokens, or such that the model does not know."""
    _expect(bool(prompt), "input", "at least one prompt token", "none")
    _in_vocabulary("input", prompt, info.vocabulary_size)


def check_task(request: GenerationRequest, placed: Placed) -> None:
    """InvalidRequest unless a task is named exactly where the adapter has several, and is one of them."""
    task, tasks = request.task, placed.tasks
    expected = f"0 to {tasks - 1}, one of the adapter's tasks" if tasks else f"unset, {_who(request)} has no tasks"
    got = "none" if task is None else task
    _expect(0 <= task < tasks if task is not None else not tasks, "adapter_task", expected, got)


def check_images(request: GenerationRequest, placed: Placed) -> None:
    """InvalidRequest for images that nobody takes, or beside log-probabilities of a prompt that has such tokens."""
    if request.images:
        _expect(placed.images is not None, "images", f"none, {_who(request)} takes no images", len(request.images))
        asked = request.output.prompt_logprobs
        _expect(asked is None, "output.prompt_logprobs", "unset beside images, whose tokens have no probability", asked)


def _who(request: GenerationRequest) -> str:
    return f"adapter {request.adapter!r}" if request.adapter else "the base model"


def _check_sampling(sampling: SamplingParams, vocabulary: int) -> None:
    temperature, penalty = sampling.temperature, sampling.repetition_penalty
    _expect(0 <= temperature < math.inf, "sampling.temperature", "a finite number >= 0", temperature)
    _expect(0 < sampling.top_p <= 1, "sampling.top_p", "a number in (0, 1]", sampling.top_p)
    _expect(sampling.top_k >= 0, "sampling.top_k", "at least 0", sampling.top_k)
    _expect(0 <= sampling.min_p <= 1, "sampling.min_p", "a number in [0, 1]", sampling.min_p)
    _expect(0 < penalty < math.inf, "sampling.repetition_penalty", "a finite number > 0", penalty)
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        _expect(math.isfinite(value), f"sampling.{name}", "a finite number", value)
    _in_vocabulary("sampling.logit_bias", sampling.logit_bias, vocabulary)
    for token, bias in sampling.logit_bias.items():
        _expect(math.isfinite(bias), f"sampling.logit_bias[{token}]", "a finite number", bias)


def _check_stopping(stopping: StoppingParams, vocabulary: int) -> None:
    wanted = stopping.max_tokens
    if wanted is not None:
        _expect(wanted >= 1, "stopping.max_tokens", "at least 1", wanted)
        least, bound = stopping.min_tokens, f"at most stopping.max_tokens ({wanted})"
        _expect(least <= wanted, "stopping.min_tokens", bound, least)
    _expect(stopping.min_tokens >= 0, "stopping.min_tokens", "at least 0", stopping.min_tokens)
    _expect(all(stopping.stop), "stopping.stop", "strings of at least one character", "an empty one")
    _in_vocabulary("stopping.stop_token_ids", stopping.stop_token_ids, vocabulary)


def _check_output(output: OutputOptions, vocabulary: int) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(output, name)
        _expect(count is None or 0 <= count <= vocabulary, f"output.{name}", f"0 to {vocabulary} or none", count)


def _in_vocabulary(field: str, ids: Collection[int], vocabulary: int) -> None:
    if ids:
        worst = min(ids) if min(ids) < 0 else max(ids)
        _expect(0 <= worst < vocabulary, field, f"token ids from 0 to {vocabulary - 1}", worst)


def _expect(holds: bool, field: str, expected: str, got: object) -> None:
    if not holds:
        raise InvalidRequest(field, f"expected {expected}, got {got}")
