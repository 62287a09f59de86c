"""What one request may ask for, what it gets, and what is refused."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from peftmux.runtime.engine.api import GenerationRequest
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.errors import AdapterNotFound, InvalidRequest
from peftmux.runtime.params import FinishReason, OutputOptions, SamplingParams, StoppingParams
from tests.engine.harness import ask, base, opened, request, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [1, 44, 48, 90, 66]
CONTEXT = 128
END = 2
ONLY_END = SamplingParams(temperature=0.0, logit_bias={END: 1000.0})


async def test_text_is_what_the_tokenizer_decodes(engine: LocalEngine) -> None:
    answer = await ask(engine, request(PROMPT, max_tokens=20))
    assert len(answer.text) > 5
    assert answer.text == AutoTokenizer.from_pretrained(base()).decode(
        answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("stream", [True, False])
async def test_text_ends_before_a_stop_string(engine: LocalEngine, stream: bool) -> None:
    whole = await ask(engine, request(PROMPT, max_tokens=20))
    stop = whole.text[6:9]
    at = whole.text.index(stop)
    answer = await ask(engine, request(PROMPT, max_tokens=20, stop=("never", stop), stream=stream))
    assert answer.finish is FinishReason.STOP
    assert answer.text == whole.text[:at]
    assert answer.ids == whole.ids[: len(answer.ids)]
    assert len(answer.ids) < 20


async def test_a_stop_string_that_never_comes_holds_nothing_back(engine: LocalEngine) -> None:
    whole = await ask(engine, request(PROMPT, max_tokens=9))
    answer = await ask(engine, request(PROMPT, max_tokens=9, stop=(whole.text[-1] + "x",)))
    assert (answer.finish, answer.text) == (FinishReason.LENGTH, whole.text)


async def test_an_end_token_ends(engine: LocalEngine) -> None:
    answer = await ask(engine, request(PROMPT, sampling=ONLY_END, ignore_eos=False))
    assert (answer.finish, answer.ids, answer.text) == (FinishReason.STOP, [END], "")


async def test_an_end_token_is_like_any_other_when_ignored(engine: LocalEngine) -> None:
    answer = await ask(engine, request(PROMPT, sampling=ONLY_END, max_tokens=4))
    assert (answer.finish, answer.ids) == (FinishReason.LENGTH, [END] * 4)


async def test_min_tokens_come_before_an_end_token(engine: LocalEngine) -> None:
    answer = await ask(engine, request(PROMPT, sampling=ONLY_END, max_tokens=9, min_tokens=3, ignore_eos=False))
    assert answer.finish is FinishReason.STOP
    assert END not in answer.ids[:3]
    assert answer.ids[3:] == [END]


async def test_a_stop_token_ends(engine: LocalEngine) -> None:
    whole = await ask(engine, request(PROMPT, max_tokens=12))
    stop = next(token for i, token in enumerate(whole.ids) if i > 2 and token not in whole.ids[:i])
    answer = await ask(engine, request(PROMPT, max_tokens=12, stop_token_ids=(stop, END)))
    assert answer.finish is FinishReason.STOP
    assert answer.ids == whole.ids[: whole.ids.index(stop) + 1]


@pytest.mark.parametrize(("adapter", "virtual"), [("", 0), ("lora", 0), ("prefix", 5)])
async def test_max_tokens_fills_the_context(engine: LocalEngine, adapter: str, virtual: int) -> None:
    answer = await ask(engine, request(PROMPT, adapter, None))
    room = CONTEXT - len(PROMPT) - virtual
    assert answer.finish is FinishReason.LENGTH
    assert (len(answer.ids), answer.usage and answer.usage.completion_tokens) == (room, room)
    assert (await ask(engine, request(PROMPT, adapter, room))).ids == answer.ids
    with pytest.raises(InvalidRequest, match=f"at most {room} .*got {room + 1}") as refusal:
        await ask(engine, request(PROMPT, adapter, room + 1))
    assert refusal.value.field == "stopping.max_tokens"


@pytest.mark.parametrize(("adapter", "longest"), [("", CONTEXT - 1), ("prefix", CONTEXT - 6)])
async def test_a_prompt_leaves_room_for_one_token(engine: LocalEngine, adapter: str, longest: int) -> None:
    prompt = [3 + i % 90 for i in range(longest + 1)]
    answer = await ask(engine, request(prompt[:longest], adapter, None))
    assert (len(answer.ids), answer.finish) == (1, FinishReason.LENGTH)
    with pytest.raises(InvalidRequest, match=f"at most {longest} tokens.*got {longest + 1}") as refusal:
        await ask(engine, request(prompt, adapter, None))
    assert refusal.value.field == "input"


async def test_log_probabilities_are_as_many_as_asked_for(engine: LocalEngine) -> None:
    none = await ask(engine, request(PROMPT, logprobs=None))
    assert (none.logprobs, none.prompt_logprobs) == ([], [])
    answer = await ask(engine, request(PROMPT, logprobs=3, prompt_logprobs=2))
    assert [entry.token_id for entry in answer.logprobs] == answer.ids == none.ids
    for entry in answer.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0][0] == entry.token_id  # greedy
        assert entry.top[0][1] == pytest.approx(entry.logprob)
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    assert [len(entry.top) for entry in answer.prompt_logprobs] == [0, 2, 2, 2, 2]
    everything = await ask(engine, request(PROMPT, logprobs=96, max_tokens=1))
    assert sum(math.exp(value) for _, value in everything.logprobs[0].top) == pytest.approx(1.0, abs=1e-4)


async def test_the_first_delta_has_the_prompt_and_the_last_the_usage(engine: LocalEngine) -> None:
    async with opened(engine, request(PROMPT, "lora", prompt_logprobs=0)) as stream:
        deltas = [delta async for delta in stream]
    assert [len(delta.prompt_logprobs) for delta in deltas] == [5] + [0] * (len(deltas) - 1)
    assert [delta.usage is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert {delta.adapter_revision for delta in deltas} == {engine.get_adapter("lora").revision}


async def test_without_streaming_there_is_one_delta(engine: LocalEngine) -> None:
    streamed = await ask(engine, request(PROMPT, max_tokens=12, prompt_logprobs=1))
    whole = await ask(engine, request(PROMPT, max_tokens=12, prompt_logprobs=1, stream=False))
    assert whole.deltas == 1
    assert (whole.ids, whole.text) == (streamed.ids, streamed.text)
    assert whole.values == pytest.approx(streamed.values)
    assert len(whole.prompt_logprobs) == 5


async def test_what_a_slow_reader_missed_is_merged(engine: LocalEngine) -> None:
    expected = await ask(engine, request(PROMPT, max_tokens=30))
    async with opened(engine, request(PROMPT, max_tokens=30)) as stream:
        first = await anext(stream)
        while engine.stats().running:
            await asyncio.sleep(0.002)
        rest = [delta async for delta in stream]
    assert len(rest) < 5
    assert [*first.token_ids, *(token for delta in rest for token in delta.token_ids)] == expected.ids
    assert first.text + "".join(delta.text for delta in rest) == expected.text
    assert len(first.logprobs) + sum(len(delta.logprobs) for delta in rest) == 30
    assert rest[-1].finish_reason is FinishReason.LENGTH


GOOD = request(PROMPT)
NAN, INFINITY = math.nan, math.inf
_BAD_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, NAN, INFINITY),
    "top_p": (0.0, 1.1, NAN),
    "top_k": (-1,),
    "min_p": (-0.1, 1.1, NAN),
    "repetition_penalty": (0.0, NAN, INFINITY),
    "presence_penalty": (NAN,),
    "frequency_penalty": (INFINITY,),
    "logit_bias": ({96: 1.0}, {-1: 1.0}),
}
BAD: dict[str, tuple[GenerationRequest, str]] = {
    "no prompt": (replace(GOOD, prompt=()), "input"),
    "a token past the vocabulary": (replace(GOOD, prompt=(3, 96)), "input"),
    "a negative token": (replace(GOOD, prompt=(3, -1)), "input"),
    **{
        f"{name}={value}": (replace(GOOD, sampling=SamplingParams(**{name: value})), f"sampling.{name}")
        for name, values in _BAD_SAMPLING.items()
        for value in values
    },
    "a bias that is not finite": (
        replace(GOOD, sampling=SamplingParams(logit_bias={3: NAN})),
        "sampling.logit_bias[3]",
    ),
    **{
        f"{name}={value}": (replace(GOOD, stopping=StoppingParams(**settings)), f"stopping.{name}")
        for name, value, settings in (
            ("max_tokens", 0, {"max_tokens": 0}),
            ("max_tokens", -1, {"max_tokens": -1}),
            ("min_tokens", -1, {"min_tokens": -1}),
            ("min_tokens", 5, {"min_tokens": 5, "max_tokens": 4}),
            ("stop[0]", "empty", {"stop": ("",)}),
            ("stop_token_ids", 96, {"stop_token_ids": (96,)}),
            ("stop_token_ids", -1, {"stop_token_ids": (-1,)}),
        )
    },
    "logprobs=97": (replace(GOOD, output=OutputOptions(logprobs=97)), "output.logprobs"),
    "prompt_logprobs=-1": (replace(GOOD, output=OutputOptions(prompt_logprobs=-1)), "output.prompt_logprobs"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_values_are_refused_by_field(engine: LocalEngine, case: str) -> None:
    wanted, field = BAD[case]
    with pytest.raises(InvalidRequest, match=r"expected .*, got") as refusal:
        await ask(engine, wanted)
    assert refusal.value.field == field


@pytest.mark.parametrize("adapter", ["nobody", "lora@0123456789", "lora@abc"])
async def test_unknown_adapters_and_revisions(engine: LocalEngine, adapter: str) -> None:
    with pytest.raises(AdapterNotFound):
        await ask(engine, request(PROMPT, adapter))


async def test_a_revision_may_be_named(engine: LocalEngine) -> None:
    digest = engine.get_adapter("lora").revision
    expected = await ask(engine, request(PROMPT, "lora"))
    for wanted in (digest, digest[:8]):
        assert (await ask(engine, request(PROMPT, f"lora@{wanted}"))).ids == expected.ids


async def test_what_the_cache_cannot_hold_is_refused() -> None:
    memory = 9 * 4 * 3 * 2 * 16 * 4
    settings: dict[str, Any] = {"block_size": 4, "kv_cache_memory": memory}
    async with running(**settings) as small:
        answer = await ask(small, request(PROMPT, max_tokens=None))
        assert len(answer.ids) == 8 * 4 + 1 - len(PROMPT)
        with pytest.raises(InvalidRequest, match="KV cache") as refusal:
            await ask(small, request(PROMPT, max_tokens=60))
        assert refusal.value.field == "stopping.max_tokens"
        with pytest.raises(InvalidRequest, match="KV cache"):
            await ask(small, request([5] * 40, max_tokens=None))
