"""Request messages -> the engine's values, every field checked. All that is wrong is reported at once."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

from peftmux.adapters.source import valid_name
from peftmux.runtime.engine.api import ModelInfo, Pooling
from peftmux.runtime.params import OutputOptions, SamplingParams, StoppingParams
from peftmux.runtime.server.errors import InvalidFields, NotOffered, Violation
from peftmux.v1 import inference_pb2

GenerationMessage = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
ReadoutMessage = inference_pb2.ClassifyRequest | inference_pb2.EmbedRequest
PromptMessage = GenerationMessage | ReadoutMessage

MAX_ALTERNATIVES = 100
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
NAME_RULE = "parts of up to 128 letters, digits, '.', '_', '-' that begin with a letter or digit, at most two with '/'"


POOLINGS = {
    inference_pb2.POOLING_UNSPECIFIED: Pooling.MEAN,
    inference_pb2.POOLING_MEAN: Pooling.MEAN,
    inference_pb2.POOLING_LAST: Pooling.LAST,
}


class Checks:
    """Collects what is wrong with a request's fields; `done` raises InvalidFields if anything was."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def expect(self, holds: bool, field: str, expected: str, got: object) -> None:
        if not holds:
            self.violations.append((field, f"expected {expected}, got {_short(got)}"))

    def done(self) -> None:
        if self.violations:
            raise InvalidFields(tuple(self.violations))


def check_name(checks: Checks, field: str, name: str) -> None:
    """An adapter's name, as LoadAdapter and its sisters take it (no revision)."""
    checks.expect(valid_name(name), field, f"a name of {NAME_RULE}", repr(name))


def task_of(message: PromptMessage) -> int | None:
    """Which task of a multi-task adapter; None where the request names none, or cannot."""
    if isinstance(message, inference_pb2.EmbedRequest) or not message.HasField("adapter_task"):
        return None
    return message.adapter_task


def check_generation(
    message: GenerationMessage, info: ModelInfo
) -> tuple[SamplingParams, StoppingParams, OutputOptions]:
    """Check every field that needs no tokenizer. Raises InvalidFields, or NotOffered for a weighted sum of adapters."""
    checks = Checks()
    _check_adapter(checks, message)
    _check_adapters(checks, message)
    _check_input(checks, message, info)
    values = (
        _sampling(checks, message.sampling, info),
        _stopping(checks, message.stopping, info),
        _output(checks, message.output, info),
    )
    checks.done()
    if message.adapters:
        raise NotOffered("adapters: a weighted sum of adapters is not offered by this server; name one in `adapter`")
    return values


def check_readout(message: ReadoutMessage, info: ModelInfo) -> None:
    """Check every field of a Classify or Embed request that needs no tokenizer. Raises InvalidFields."""
    checks = Checks()
    _check_adapter(checks, message)
    _check_input(checks, message, info)
    if isinstance(message, inference_pb2.EmbedRequest):
        known = message.pooling in POOLINGS
        checks.expect(known, "pooling", "unset, POOLING_MEAN or POOLING_LAST", message.pooling)
    checks.done()


def check_readout_length(message: ReadoutMessage, prompt: Sequence[int], info: ModelInfo) -> None:
    """The prompt fits the context. The engine counts virtual tokens on top of this."""
    checks = Checks()
    kind = message.WhichOneof("input") or "input"
    checks.expect(len(prompt) > 0, kind, "at least one token", "an input that encodes to none")
    expected = f"at most the context of {info.context_length} tokens"
    checks.expect(len(prompt) <= info.context_length, kind, expected, f"{len(prompt)} tokens")
    checks.done()


def check_lengths(message: GenerationMessage, prompt: Sequence[int], info: ModelInfo) -> None:
    """The prompt, and the tokens asked for, fit the context. The engine counts virtual tokens on top of this."""
    checks = Checks()
    kind = message.WhichOneof("input") or "input"
    checks.expect(len(prompt) > 0, kind, "at least one token", "an input that encodes to none")
    checks.expect(
        len(prompt) < info.context_length,
        kind,
        f"fewer tokens than the context of {info.context_length}, to leave room for one",
        f"{len(prompt)} tokens",
    )
    checks.done()
    room = info.context_length - len(prompt)
    expected = f"at most {room} (the context of {info.context_length} less the prompt's {len(prompt)})"
    for name in ("max_tokens", "min_tokens"):
        wanted = getattr(message.stopping, name)
        checks.expect(wanted <= room, f"stopping.{name}", expected, wanted)
    checks.done()


def _check_adapter(checks: Checks, message: PromptMessage) -> None:
    if message.adapter:
        name, at, revision = message.adapter.partition("@")
        good = valid_name(name) and bool(revision or not at)
        checks.expect(good, "adapter", f"'' or name or name@revision, a name of {NAME_RULE}", repr(message.adapter))
    task = task_of(message)
    if task is not None and not message.adapter:
        checks.expect(False, "adapter_task", "unset for the base model, which has no tasks", task)


def _check_adapters(checks: Checks, message: GenerationMessage) -> None:
    both = bool(message.adapter) and len(message.adapters) > 0
    checks.expect(not both, "adapters", "either `adapter` or `adapters`", "both")
    for index, weighted in enumerate(message.adapters):
        check_name(checks, f"adapters[{index}].adapter", weighted.adapter)
        _finite(checks, f"adapters[{index}].weight", weighted.weight)


def _check_input(checks: Checks, message: PromptMessage, info: ModelInfo) -> None:
    kind = message.WhichOneof("input")
    if kind is None:
        kinds = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["input"].fields)
        checks.expect(False, "input", f"one of {kinds}", "none")
    elif kind == "text":
        checks.expect(bool(message.text), "text", "at least one character", "an empty text")
    elif kind == "token_ids":
        ids = message.token_ids.ids
        checks.expect(len(ids) > 0, "token_ids.ids", "at least one token id", "none")
        _in_vocabulary(checks, "token_ids.ids", ids, info)
    elif isinstance(message, GenerationMessage):
        messages = message.chat.messages
        checks.expect(len(messages) > 0, "chat.messages", "at least one message", "none")
        for index, turn in enumerate(messages):
            checks.expect(bool(turn.role), f"chat.messages[{index}].role", "a role such as 'user'", "an empty role")


def _sampling(checks: Checks, message: inference_pb2.SamplingParams, info: ModelInfo) -> SamplingParams:
    temperature = message.temperature if message.HasField("temperature") else 1.0
    top_p = message.top_p if message.HasField("top_p") else 1.0
    repetition = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    checks.expect(0 <= temperature < math.inf, "sampling.temperature", "a finite number >= 0", temperature)
    checks.expect(0 < top_p <= 1, "sampling.top_p", "a number in (0, 1]", top_p)
    checks.expect(0 <= message.min_p <= 1, "sampling.min_p", "a number in [0, 1]", message.min_p)
    checks.expect(0 < repetition < math.inf, "sampling.repetition_penalty", "a finite number > 0", repetition)
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(message, name)
        checks.expect(-2 <= value <= 2, f"sampling.{name}", "a number in [-2, 2]", value)
    _in_vocabulary(checks, "sampling.logit_bias", list(message.logit_bias), info)
    for token_id, bias in message.logit_bias.items():
        _finite(checks, f"sampling.logit_bias[{token_id}]", bias)
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else secrets.randbits(64),
        repetition_penalty=repetition,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
    )


def _stopping(checks: Checks, message: inference_pb2.StoppingParams, info: ModelInfo) -> StoppingParams:
    max_tokens = message.max_tokens if message.HasField("max_tokens") else None
    if max_tokens is not None:
        checks.expect(max_tokens > 0, "stopping.max_tokens", "at least 1", max_tokens)
        bound = f"at most stopping.max_tokens ({max_tokens})"
        checks.expect(message.min_tokens <= max_tokens, "stopping.min_tokens", bound, message.min_tokens)
    count = len(message.stop)
    checks.expect(count <= MAX_STOP_STRINGS, "stopping.stop", f"at most {MAX_STOP_STRINGS} strings", count)
    for index, stop in enumerate(message.stop[:MAX_STOP_STRINGS]):
        good = 0 < len(stop) <= MAX_STOP_CHARACTERS
        checks.expect(good, f"stopping.stop[{index}]", f"1 to {MAX_STOP_CHARACTERS} characters", len(stop))
    ids = message.stop_token_ids
    checks.expect(len(ids) <= MAX_STOP_TOKEN_IDS, "stopping.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS}", len(ids))
    _in_vocabulary(checks, "stopping.stop_token_ids", ids, info)
    return StoppingParams(
        max_tokens=max_tokens,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(ids),
        ignore_eos=message.ignore_eos,
    )


def _output(checks: Checks, message: inference_pb2.OutputOptions, info: ModelInfo) -> OutputOptions:
    """Alternatives past a small vocabulary are the whole vocabulary."""
    counts: dict[str, int | None] = {"logprobs": None, "prompt_logprobs": None}
    for name in counts:
        if message.HasField(name):
            count = getattr(message, name)
            checks.expect(count <= MAX_ALTERNATIVES, f"output.{name}", f"at most {MAX_ALTERNATIVES}", count)
            counts[name] = min(count, info.vocabulary_size)
    return OutputOptions(**counts)


def _in_vocabulary(checks: Checks, field: str, ids: Sequence[int], info: ModelInfo) -> None:
    if ids and max(ids) >= info.vocabulary_size:
        checks.expect(False, field, f"token ids below the vocabulary's {info.vocabulary_size}", max(ids))


def _finite(checks: Checks, field: str, value: float) -> None:
    checks.expect(math.isfinite(value), field, "a finite number", value)


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
