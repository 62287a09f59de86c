"""From what a row read of its hidden states to the answers of Classify and Embed, and what they must be asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peftmux.runtime.engine.api import Classification, Delta, EmbeddingRequest, Pooling
from peftmux.runtime.engine.placement import Placed
from peftmux.runtime.errors import InvalidRequest, TaskMismatch
from peftmux.runtime.params import Readout, Usage


def of_generation(placed: Placed) -> None:
    """TaskMismatch for an adapter that classifies: PEFT saves it with no output projection to sample from."""
    if placed.readout is not None:
        raise TaskMismatch("expected an adapter that generates, got one with a classification head: ask Classify")


def of_classification(placed: Placed) -> Readout:
    """What the adapter's head reads. TaskMismatch where there is none."""
    if placed.readout is None:
        what = "an adapter without one" if placed.slot else "the base model, which has none"
        raise TaskMismatch(f"expected an adapter with a classification head, got {what}")
    return placed.readout


def of_embedding(request: EmbeddingRequest) -> Readout:
    return Readout.MEAN if request.pooling is Pooling.MEAN else Readout.LAST


def classified_part(prompt: tuple[int, ...], pad: int | None) -> tuple[int, ...]:
    """Up to the token that a sequence head reads: the last one that is no padding, the first where all are.

    As transformers pools every causal classifier. What stands after it cannot change it and is not computed.
    """
    last = next((i for i in range(len(prompt) - 1, 0, -1) if prompt[i] != pad), 0)
    return prompt[: last + 1]


def check_room(prompt: int, virtual: int, context_length: int, capacity: int) -> None:
    """InvalidRequest unless the prompt fits. `capacity` counts one token that is never computed (`max_row_tokens`)."""
    room = min(context_length, capacity - 1) - virtual
    if prompt > room:
        beside = f" beside {virtual} virtual tokens" if virtual else ""
        raise InvalidRequest("input", f"prompt: expected at most {room} tokens{beside}, got {prompt}")


def classification(delta: Delta, names: tuple[str, ...], prompt_tokens: int) -> Classification:
    """Softmax in float64; the label of a row is the first of the largest logits."""
    logits = torch.tensor(delta.states, dtype=torch.float64)
    return Classification(
        logits=delta.states,
        probabilities=tuple(map(tuple, logits.softmax(-1).tolist())),
        labels=tuple(names[i] for i in logits.argmax(-1).tolist()),
        names=names,
        usage=_usage(delta, prompt_tokens),
        adapter_revision=delta.adapter_revision,
    )


def embedding(delta: Delta, request: EmbeddingRequest) -> tuple[float, ...]:
    """The pooled state, of length 1 where asked for (zeros stay zeros)."""
    (state,) = delta.states
    values: Sequence[float] = state
    if request.pooling is Pooling.MEAN:
        values = [value / len(request.prompt) for value in values]
    if request.normalize:
        norm = math.hypot(*values)
        values = [value / norm for value in values] if norm else values
    return tuple(values)


def _usage(delta: Delta, prompt_tokens: int) -> Usage:
    """Padding that was not computed counts as asked."""
    assert delta.usage is not None
    return Usage(prompt_tokens, 0, delta.usage.cached_tokens)
