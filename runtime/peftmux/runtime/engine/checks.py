"""What a request must be before it reaches a step: the one list of rules, for the server and for callers in process.

The server reports everything that is wrong at once and allows its clients less (`Limits`); the engine holds its own
callers to what no row may bring into a step, and names the first field that breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peftmux.adapters.source import valid_name
from peftmux.runtime.engine.api import GenerationRequest, ModelInfo, WeightedAdapter
from peftmux.runtime.engine.placement import Placed
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.params import OutputOptions, SamplingParams, StoppingParams

MAX_TERMS = 32
"""Of a weighted sum."""
_ENDLESS = 1 << 62


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of it a caller may ask for. The defaults are what the engine can do."""

    penalty: float = math.inf
    """Of presence and frequency, in both directions."""
    alternatives: int | None = None
    """Per token; None is the vocabulary."""
    stop_strings: int = _ENDLESS
    stop_characters: int = _ENDLESS
    """Of one stop string."""
    stop_token_ids: int = _ENDLESS


class Checks:
    """Collects what is wrong with a request's fields."""

    def __init__(self) -> None:
        self.violations: list[tuple[str, str]] = []
        """(path of the field in the request message, what was expected and what came)"""

    def expect(self, holds: bool, field: str, expected: str, got: object) -> None:
        if not holds:
            self.violations.append((field, f"expected {expected}, got {_short(got)}"))

    def raise_first(self) -> None:
        """InvalidRequest for the first of them, if there is one."""
        if self.violations:
            raise InvalidRequest(*self.violations[0])


def check_request(request: GenerationRequest, info: ModelInfo) -> None:
    """InvalidRequest names the first bad field. Lengths are judged later, beside the adapter's virtual tokens."""
    checks = Checks()
    check_tokens(checks, "input", request.prompt, info.vocabulary_size)
    check_sampling(checks, request.sampling, info.vocabulary_size, _OWN)
    check_stopping(checks, request.stopping, info.vocabulary_size, _OWN)
    check_output(checks, request.output, info.vocabulary_size, _OWN)
    check_sum(checks, request.adapter, request.adapters)
    checks.raise_first()


def check_sum(checks: Checks, adapter: str, adapters: Sequence[WeightedAdapter]) -> None:
    """The terms of a weighted sum, which stands instead of one adapter."""
    if not adapters:
        return
    checks.expect(not adapter, "adapters", "either `adapter` or `adapters`", "both")
    checks.expect(len(adapters) <= MAX_TERMS, "adapters", f"at most {MAX_TERMS}", len(adapters))
    for index, term in enumerate(adapters):
        field = f"adapters[{index}]"
        name, at, revision = term.adapter.partition("@")
        good = valid_name(name) and bool(revision or not at)
        checks.expect(good, f"{field}.adapter", "name or name@revision", repr(term.adapter))
        checks.expect(math.isfinite(term.weight), f"{field}.weight", "a finite number", term.weight)


def check_prompt(prompt: tuple[int, ...], info: ModelInfo) -> None:
    """InvalidRequest for no tokens, or such that the model does not know."""
    checks = Checks()
    check_tokens(checks, "input", prompt, info.vocabulary_size)
    checks.raise_first()


def check_task(request: GenerationRequest, placed: Placed) -> None:
    """InvalidRequest unless a task is named exactly where the adapter has several, and is one of them."""
    checks, task, tasks = Checks(), request.task, placed.tasks
    expected = f"0 to {tasks - 1}, one of the adapter's tasks" if tasks else f"unset, {_who(request)} has no tasks"
    got = "none" if task is None else task
    checks.expect(0 <= task < tasks if task is not None else not tasks, "adapter_task", expected, got)
    checks.raise_first()


def check_images(request: GenerationRequest, placed: Placed) -> None:
    """InvalidRequest for images that nobody takes, or beside log-probabilities of a prompt that has such tokens."""
    checks = Checks()
    if request.images:
        none = f"none, {_who(request)} takes no images"
        checks.expect(placed.images is not None, "images", none, len(request.images))
        asked = request.output.prompt_logprobs
        unset = "unset beside images, whose tokens have no probability"
        checks.expect(asked is None, "output.prompt_logprobs", unset, asked)
    checks.raise_first()


def _who(request: GenerationRequest) -> str:
    if request.adapters:
        return "the sum of adapters"
    return f"adapter {request.adapter!r}" if request.adapter else "the base model"


def check_tokens(checks: Checks, field: str, ids: Collection[int], vocabulary: int) -> None:
    """A prompt's token ids."""
    checks.expect(bool(ids), field, "at least one token id", "none")
    _in_vocabulary(checks, field, ids, vocabulary)


def check_sampling(checks: Checks, sampling: SamplingParams, vocabulary: int, limits: Limits) -> None:
    temperature, penalty = sampling.temperature, sampling.repetition_penalty
    checks.expect(0 <= temperature < math.inf, "sampling.temperature", "a finite number >= 0", temperature)
    checks.expect(0 < sampling.top_p <= 1, "sampling.top_p", "a number in (0, 1]", sampling.top_p)
    checks.expect(sampling.top_k >= 0, "sampling.top_k", "at least 0", sampling.top_k)
    checks.expect(0 <= sampling.min_p <= 1, "sampling.min_p", "a number in [0, 1]", sampling.min_p)
    checks.expect(0 < penalty < math.inf, "sampling.repetition_penalty", "a finite number > 0", penalty)
    most = limits.penalty
    expected = "a finite number" if most == math.inf else f"a number in [{-most:g}, {most:g}]"
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        checks.expect(math.isfinite(value) and abs(value) <= most, f"sampling.{name}", expected, value)
    _in_vocabulary(checks, "sampling.logit_bias", sampling.logit_bias, vocabulary)
    for token, bias in sampling.logit_bias.items():
        checks.expect(math.isfinite(bias), f"sampling.logit_bias[{token}]", "a finite number", bias)


def check_stopping(checks: Checks, stopping: StoppingParams, vocabulary: int, limits: Limits) -> None:
    wanted, least = stopping.max_tokens, stopping.min_tokens
    if wanted is not None:
        checks.expect(wanted >= 1, "stopping.max_tokens", "at least 1", wanted)
        bound = f"at most stopping.max_tokens ({wanted})"
        checks.expect(least <= wanted, "stopping.min_tokens", bound, least)
    checks.expect(least >= 0, "stopping.min_tokens", "at least 0", least)
    strings, longest = limits.stop_strings, limits.stop_characters
    checks.expect(len(stopping.stop) <= strings, "stopping.stop", f"at most {strings} strings", len(stopping.stop))
    expected = "at least 1 character" if longest == _ENDLESS else f"1 to {longest} characters"
    for index, stop in enumerate(stopping.stop[:strings]):
        checks.expect(0 < len(stop) <= longest, f"stopping.stop[{index}]", expected, len(stop))
    ids = stopping.stop_token_ids
    checks.expect(
        len(ids) <= limits.stop_token_ids, "stopping.stop_token_ids", f"at most {limits.stop_token_ids}", len(ids)
    )
    _in_vocabulary(checks, "stopping.stop_token_ids", ids, vocabulary)


def check_output(checks: Checks, output: OutputOptions, vocabulary: int, limits: Limits) -> None:
    most = vocabulary if limits.alternatives is None else limits.alternatives
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(output, name)
        if count is not None:
            checks.expect(0 <= count <= most, f"output.{name}", f"at least 0 and at most {most}", count)


def _in_vocabulary(checks: Checks, field: str, ids: Collection[int], vocabulary: int) -> None:
    if ids:
        worst = min(ids) if min(ids) < 0 else max(ids)
        checks.expect(0 <= worst < vocabulary, field, f"token ids below the vocabulary's {vocabulary}", worst)


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."


_OWN = Limits()
