"""Request messages -> the engine's values, every field checked. All that is wrong is reported at once."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from peftmux.adapters.source import NAME_RULE, valid_name
from peftmux.runtime.engine import checks
from peftmux.runtime.engine.api import ModelInfo, Pooling, WeightedAdapter
from peftmux.runtime.engine.checks import Limits
from peftmux.runtime.params import OutputOptions, SamplingParams, StoppingParams
from peftmux.runtime.server.errors import InvalidFields
from peftmux.v1 import inference_pb2

GenerationMessage = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
ReadoutMessage = inference_pb2.ClassifyRequest | inference_pb2.EmbedRequest
PromptMessage = GenerationMessage | ReadoutMessage

LIMITS = Limits(penalty=2, alternatives=100, stop_strings=64, stop_characters=1024, stop_token_ids=1024)
"""What a client may ask for; a caller in process may ask for what the engine can do."""

POOLINGS = {
    inference_pb2.POOLING_UNSPECIFIED: Pooling.MEAN,
    inference_pb2.POOLING_MEAN: Pooling.MEAN,
    inference_pb2.POOLING_LAST: Pooling.LAST,
}


class Checks(checks.Checks):
    """Collects what is wrong with a request's fields; `done` raises InvalidFields if anything was."""

    def done(self) -> None:
        if self.violations:
            raise InvalidFields(tuple(self.violations))


def check_name(found: Checks, field: str, name: str) -> None:
    """An adapter's name, as LoadAdapter and its sisters take it (no revision)."""
    found.expect(valid_name(name), field, f"a name of {NAME_RULE}", repr(name))


def task_of(message: PromptMessage) -> int | None:
    """Which task of a multi-task adapter; None where the request names none."""
    return message.adapter_task if message.HasField("adapter_task") else None


def check_generation(
    message: GenerationMessage, info: ModelInfo
) -> tuple[SamplingParams, StoppingParams, OutputOptions]:
    """Check every field that needs no tokenizer. Raises InvalidFields."""
    found, vocabulary = Checks(), info.vocabulary_size
    _check_adapter(found, message)
    checks.check_sum(found, message.adapter, sum_of(message))
    _check_input(found, message, info)
    sampling, stopping = _sampling(message.sampling), _stopping(message.stopping)
    output = _output(message.output)
    checks.check_sampling(found, sampling, vocabulary, LIMITS)
    checks.check_stopping(found, stopping, vocabulary, LIMITS)
    checks.check_output(found, output, vocabulary, LIMITS)
    found.done()
    return sampling, stopping, _within(output, vocabulary)


def check_readout(message: ReadoutMessage, info: ModelInfo) -> None:
    """Check every field of a Classify or Embed request that needs no tokenizer. Raises InvalidFields."""
    found = Checks()
    _check_adapter(found, message)
    _check_input(found, message, info)
    if isinstance(message, inference_pb2.EmbedRequest):
        known = message.pooling in POOLINGS
        found.expect(known, "pooling", "unset, POOLING_MEAN or POOLING_LAST", message.pooling)
    found.done()


def check_readout_length(message: ReadoutMessage, prompt: Sequence[int], info: ModelInfo) -> None:
    """The prompt fits the context. The engine counts virtual tokens on top of this."""
    found = Checks()
    kind = message.WhichOneof("input") or "input"
    found.expect(len(prompt) > 0, kind, "at least one token", "an input that encodes to none")
    expected = f"at most the context of {info.context_length} tokens"
    found.expect(len(prompt) <= info.context_length, kind, expected, f"{len(prompt)} tokens")
    found.done()


def check_lengths(message: GenerationMessage, prompt: Sequence[int], info: ModelInfo) -> None:
    """The prompt, and the tokens asked for, fit the context. The engine counts virtual tokens on top of this."""
    found = Checks()
    kind = message.WhichOneof("input") or "input"
    found.expect(len(prompt) > 0, kind, "at least one token", "an input that encodes to none")
    found.expect(
        len(prompt) < info.context_length,
        kind,
        f"fewer tokens than the context of {info.context_length}, to leave room for one",
        f"{len(prompt)} tokens",
    )
    found.done()
    room = info.context_length - len(prompt)
    expected = f"at most {room} (the context of {info.context_length} less the prompt's {len(prompt)})"
    for name in ("max_tokens", "min_tokens"):
        wanted = getattr(message.stopping, name)
        found.expect(wanted <= room, f"stopping.{name}", expected, wanted)
    found.done()


def _check_adapter(found: Checks, message: PromptMessage) -> None:
    if message.adapter:
        name, at, revision = message.adapter.partition("@")
        good = valid_name(name) and bool(revision or not at)
        found.expect(good, "adapter", f"'' or name or name@revision, a name of {NAME_RULE}", repr(message.adapter))
    task = task_of(message)
    if task is not None and not message.adapter:
        found.expect(False, "adapter_task", "unset for the base model, which has no tasks", task)


def sum_of(message: GenerationMessage) -> tuple[WeightedAdapter, ...]:
    """The terms of a weighted sum of adapters; () where the request has none."""
    return tuple(WeightedAdapter(term.adapter, term.weight) for term in message.adapters)


def _check_input(found: Checks, message: PromptMessage, info: ModelInfo) -> None:
    kind = message.WhichOneof("input")
    if kind is None:
        kinds = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["input"].fields)
        found.expect(False, "input", f"one of {kinds}", "none")
    elif kind == "text":
        found.expect(bool(message.text), "text", "at least one character", "an empty text")
    elif kind == "token_ids":
        checks.check_tokens(found, "token_ids.ids", message.token_ids.ids, info.vocabulary_size)
    elif isinstance(message, GenerationMessage):
        messages = message.chat.messages
        found.expect(len(messages) > 0, "chat.messages", "at least one message", "none")
        for index, turn in enumerate(messages):
            found.expect(bool(turn.role), f"chat.messages[{index}].role", "a role such as 'user'", "an empty role")


def _sampling(message: inference_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else secrets.randbits(64),
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
    )


def _stopping(message: inference_pb2.StoppingParams) -> StoppingParams:
    return StoppingParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def _output(message: inference_pb2.OutputOptions) -> OutputOptions:
    return OutputOptions(
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def _within(output: OutputOptions, vocabulary: int) -> OutputOptions:
    """Alternatives past a small vocabulary are the whole vocabulary."""
    counts = (output.logprobs, output.prompt_logprobs)
    return OutputOptions(*(None if count is None else min(count, vocabulary) for count in counts))
