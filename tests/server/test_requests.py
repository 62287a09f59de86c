"""Every bad field is named with what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peftmux.runtime.engine.api import ModelInfo
from peftmux.runtime.server.errors import InvalidFields
from peftmux.runtime.server.requests import Checks, check_generation, check_lengths, check_name
from peftmux.v1 import inference_pb2 as pb

INFO = ModelInfo("m", "A", 1000, 128, "float32", "cpu", 1, ("lora",), 64, 256)


def request(**fields: Any) -> pb.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "hello"
    return pb.GenerateRequest(**fields)


def sampling(**fields: Any) -> pb.GenerateRequest:
    return request(sampling=pb.SamplingParams(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return request(stopping=pb.StoppingParams(**fields))


def chat(*turns: tuple[str, str]) -> pb.GenerateRequest:
    return request(chat=pb.ChatMessages(messages=[pb.ChatMessage(role=r, content=c) for r, c in turns]))


def ids(*values: int) -> pb.GenerateRequest:
    return request(token_ids=pb.TokenIds(ids=values))


def violations(message: pb.GenerateRequest) -> dict[str, str]:
    with pytest.raises(InvalidFields) as caught:
        check_generation(message, INFO)
    return dict(caught.value.violations)


BAD = {
    "no input": (pb.GenerateRequest(), "input", "one of text, token_ids, chat"),
    "empty text": (pb.GenerateRequest(text=""), "text", "at least one character"),
    "no ids": (ids(), "token_ids.ids", "at least one token id, got none"),
    "id past vocabulary": (ids(1, 1000), "token_ids.ids", "below the vocabulary's 1000, got 1000"),
    "largest id": (ids(2**32 - 1), "token_ids.ids", "got 4294967295"),
    "no messages": (chat(), "chat.messages", "at least one message"),
    "no role": (chat(("user", "x"), ("", "y")), "chat.messages[1].role", "an empty role"),
    "temperature nan": (sampling(temperature=math.nan), "sampling.temperature", "got nan"),
    "temperature inf": (sampling(temperature=math.inf), "sampling.temperature", "got inf"),
    "temperature negative": (sampling(temperature=-0.5), "sampling.temperature", "finite number >= 0, got -0.5"),
    "top_p zero": (sampling(top_p=0), "sampling.top_p", "in (0, 1], got 0"),
    "top_p past 1": (sampling(top_p=1.5), "sampling.top_p", "in (0, 1], got 1.5"),
    "top_p nan": (sampling(top_p=math.nan), "sampling.top_p", "got nan"),
    "min_p negative": (sampling(min_p=-0.25), "sampling.min_p", "in [0, 1], got -0.25"),
    "min_p past 1": (sampling(min_p=2), "sampling.min_p", "in [0, 1], got 2"),
    "min_p nan": (sampling(min_p=math.nan), "sampling.min_p", "got nan"),
    "repetition zero": (sampling(repetition_penalty=0), "sampling.repetition_penalty", "> 0, got 0"),
    "repetition inf": (sampling(repetition_penalty=math.inf), "sampling.repetition_penalty", "got inf"),
    "repetition nan": (sampling(repetition_penalty=math.nan), "sampling.repetition_penalty", "got nan"),
    "presence past 2": (sampling(presence_penalty=2.5), "sampling.presence_penalty", "in [-2, 2], got 2.5"),
    "presence nan": (sampling(presence_penalty=math.nan), "sampling.presence_penalty", "got nan"),
    "frequency below -2": (sampling(frequency_penalty=-3), "sampling.frequency_penalty", "in [-2, 2], got -3"),
    "bias id": (sampling(logit_bias={1000: 1.0}), "sampling.logit_bias", "below the vocabulary's 1000, got 1000"),
    "bias nan": (sampling(logit_bias={7: math.nan}), "sampling.logit_bias[7]", "got nan"),
    "bias -inf": (sampling(logit_bias={7: -math.inf}), "sampling.logit_bias[7]", "got -inf"),
    "max_tokens zero": (stopping(max_tokens=0), "stopping.max_tokens", "at least 1, got 0"),
    "min past max": (stopping(max_tokens=2, min_tokens=3), "stopping.min_tokens", "(2), got 3"),
    "empty stop": (stopping(stop=["a", ""]), "stopping.stop[1]", "1 to 1024 characters, got 0"),
    "long stop": (stopping(stop=["a" * 1025]), "stopping.stop[0]", "1 to 1024 characters, got 1025"),
    "many stops": (stopping(stop=["a"] * 65), "stopping.stop", "at most 64 strings, got 65"),
    "stop id": (stopping(stop_token_ids=[1000]), "stopping.stop_token_ids", "got 1000"),
    "many stop ids": (stopping(stop_token_ids=[1] * 1025), "stopping.stop_token_ids", "at most 1024, got 1025"),
    "logprobs": (request(output=pb.OutputOptions(logprobs=101)), "output.logprobs", "at most 100, got 101"),
    "prompt_logprobs": (
        request(output=pb.OutputOptions(prompt_logprobs=2**31)),
        "output.prompt_logprobs",
        "at most 100, got 2147483648",
    ),
    "adapter name": (request(adapter="../x"), "adapter", "got '../x'"),
    "adapter revision": (request(adapter="a@"), "adapter", "got 'a@'"),
    "base with task": (request(adapter_task=0), "adapter_task", "unset for the base model"),
    "both adapters": (request(adapter="a", adapters=[pb.WeightedAdapter(adapter="b", weight=1)]), "adapters", "both"),
    "weighted name": (
        request(adapters=[pb.WeightedAdapter(adapter="", weight=1)]),
        "adapters[0].adapter",
        "got ''",
    ),
    "too many terms": (
        request(adapters=[pb.WeightedAdapter(adapter="a", weight=1)] * 33),
        "adapters",
        "at most 32, got 33",
    ),
    "weight nan": (
        request(adapters=[pb.WeightedAdapter(adapter="a", weight=math.nan)]),
        "adapters[0].weight",
        "got nan",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_field_is_named(case):
    message, field, expected = BAD[case]
    found = violations(message)
    assert list(found) == [field]
    assert expected in found[field]


def test_all_bad_fields_are_named_at_once():
    message = request(
        sampling=pb.SamplingParams(temperature=-1, top_p=2), stopping=pb.StoppingParams(max_tokens=0, stop=[""])
    )
    assert list(violations(message)) == [
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
        "stopping.stop[0]",
    ]


def test_unset_fields_take_the_contracts_defaults():
    params, stop, output = check_generation(request(), INFO)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert params.logit_bias == {}
    assert (stop.max_tokens, stop.min_tokens, stop.stop, stop.stop_token_ids, stop.ignore_eos) == (
        None,
        0,
        (),
        (),
        False,
    )
    assert (output.logprobs, output.prompt_logprobs) == (None, None)


def test_an_unset_seed_is_drawn_and_a_set_one_kept():
    drawn = {check_generation(request(), INFO)[0].seed for _ in range(4)}
    assert len(drawn) == 4
    assert check_generation(sampling(seed=0), INFO)[0].seed == 0
    assert check_generation(sampling(seed=2**64 - 1), INFO)[0].seed == 2**64 - 1


def test_set_fields_arrive():
    params, stop, output = check_generation(
        request(
            sampling=pb.SamplingParams(
                temperature=0,
                top_p=0.5,
                top_k=7,
                min_p=0.25,
                repetition_penalty=2,
                presence_penalty=-2,
                frequency_penalty=1.5,
                logit_bias={999: -100, 0: 5},
            ),
            stopping=pb.StoppingParams(
                max_tokens=9, min_tokens=9, stop=["é", "x" * 1024], stop_token_ids=[3, 999], ignore_eos=True
            ),
            output=pb.OutputOptions(logprobs=0, prompt_logprobs=100),
        ),
        INFO,
    )
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 0.5, 7, 0.25)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (2.0, -2.0, 1.5)
    assert params.logit_bias == {999: -100.0, 0: 5.0}
    assert (stop.max_tokens, stop.min_tokens, stop.stop_token_ids, stop.ignore_eos) == (9, 9, (3, 999), True)
    assert stop.stop == ("é", "x" * 1024)
    assert (output.logprobs, output.prompt_logprobs) == (0, 100)


def test_alternatives_past_a_small_vocabulary_are_all_of_it():
    small = ModelInfo("m", "A", 50, 128, "float32", "cpu", 1, (), 64, 256)
    assert check_generation(request(output=pb.OutputOptions(logprobs=100)), small)[2].logprobs == 50


@pytest.mark.parametrize(
    ("prompt", "fields", "bad"),
    [
        (0, {}, ["text"]),
        (127, {}, []),
        (128, {}, ["text"]),
        (28, {"max_tokens": 100}, []),
        (28, {"max_tokens": 101}, ["stopping.max_tokens"]),
        (28, {"max_tokens": 2**32 - 1}, ["stopping.max_tokens"]),
        (28, {"min_tokens": 101}, ["stopping.min_tokens"]),
    ],
)
def test_the_context_holds_prompt_and_answer(prompt, fields, bad):
    try:
        check_lengths(stopping(**fields), range(prompt), INFO)
        found = []
    except InvalidFields as error:
        found = [field for field, _ in error.violations]
    assert found == bad


@pytest.mark.parametrize("name", ["a", "A9._-", "org/name", "a" * 128, "0"])
def test_good_names(name):
    checks = Checks()
    check_name(checks, "name", name)
    assert checks.violations == []


@pytest.mark.parametrize("name", ["", ".a", "a/", "/a", "a/b/c", "a,b", "a b", "a" * 129, "é", "a\n", "a@1", "../a"])
def test_bad_names(name):
    checks = Checks()
    check_name(checks, "name", name)
    assert [field for field, _ in checks.violations] == ["name"]
