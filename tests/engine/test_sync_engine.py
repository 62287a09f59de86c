"""`peftmux.runtime.Engine`: the same numbers without asyncio, from any thread, and a clean end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime import Engine
from peftmux.runtime.engine.api import AdapterState, Pooling
from peftmux.runtime.errors import (
    AdapterNotFound,
    Draining,
    EngineDead,
    InvalidRequest,
    TaskMismatch,
    UnsupportedModel,
)
from peftmux.runtime.params import FinishReason, OutputOptions, SamplingParams, StoppingParams
from tests.engine.harness import adapters, base
from tests.parity.fixtures import cases

GREEDY = SamplingParams(temperature=0.0)
SIX = StoppingParams(max_tokens=6, ignore_eos=True)


def make(**settings: object) -> Engine:
    return Engine(base(), adapters_root=adapters(), dtype="float32", num_threads=1, **settings)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make(max_queued_requests=8, max_rows=4) as engine:
        engine.load_adapter("lora", "lora")
        engine.load_adapter("prefix", "prefix")
        yield engine
        until = time.monotonic() + 10  # the other prompts of a refused call are given up between steps
        while engine.stats().running + engine.stats().waiting and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.stats().running == engine.stats().waiting == 0


def test_one_prompt(engine: Engine) -> None:
    case = next(case for case in cases("llama") if case.folder == "lora")
    answer = engine.generate(
        case.ids, adapter="lora", sampling=GREEDY, stopping=SIX, output=OutputOptions(logprobs=0, prompt_logprobs=1)
    )
    assert list(answer.token_ids) == case.greedy
    assert (answer.finish_reason, answer.usage.completion_tokens) == (FinishReason.LENGTH, 6)
    assert (len(answer.logprobs), len(answer.prompt_logprobs)) == (6, 10)
    assert answer.adapter_revision == engine.get_adapter("lora").revision


def test_several_prompts_with_adapters_of_their_own(engine: Engine) -> None:
    """More at once than the queue takes."""
    wanted = [case for case in cases("llama") if case.folder in ("lora", "prefix")] * 6
    answers = engine.generate(
        [case.ids for case in wanted], adapter=[case.folder for case in wanted], sampling=GREEDY, stopping=SIX
    )
    assert [list(answer.token_ids) for answer in answers] == [case.greedy for case in wanted]


def test_text_prompts(engine: Engine) -> None:
    text = "a b"
    by_text = engine.generate(text, sampling=GREEDY, stopping=SIX)
    assert by_text == engine.generate(list(engine.encode(text)), sampling=GREEDY, stopping=SIX)
    assert by_text == engine.generate(list(np.array(engine.encode(text))), sampling=GREEDY, stopping=SIX)
    assert engine.generate([text, text], sampling=GREEDY, stopping=SIX) == [by_text, by_text]
    assert engine.generate(list[str]()) == []
    with pytest.raises(InvalidRequest, match="chat template"):
        engine.encode_chat([("user", "hello")])


def test_without_sampling_each_call_draws_anew(engine: Engine) -> None:
    drawn = {engine.generate([5, 6], stopping=SIX).token_ids for _ in range(4)}
    assert len(drawn) > 1
    seeded = {engine.generate([5, 6], sampling=SamplingParams(seed=7), stopping=SIX).token_ids for _ in range(3)}
    assert len(seeded) == 1


def test_a_stream(engine: Engine) -> None:
    whole = engine.generate([5, 6, 7], adapter="prefix", sampling=GREEDY, stopping=SIX)
    deltas = list(engine.stream([5, 6, 7], adapter="prefix", sampling=GREEDY, stopping=SIX))
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].usage == whole.usage


@pytest.mark.parametrize("by", ["close", "garbage"])
def test_a_stream_that_is_left_frees_its_row(engine: Engine, by: str) -> None:
    stream = engine.stream([5, 6, 7], adapter="lora", stopping=StoppingParams(ignore_eos=True))
    next(stream)
    if by == "close":
        stream.close()  # type: ignore[attr-defined]
    del stream
    gc.collect()
    until = time.monotonic() + 5
    while engine.stats().running or engine.get_adapter("lora").requests_in_flight:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_errors_come_as_they_are(engine: Engine) -> None:
    with pytest.raises(AdapterNotFound):
        engine.generate([5], adapter="nobody")
    with pytest.raises(InvalidRequest):
        next(engine.stream([5, 96]))
    with pytest.raises(InvalidRequest, match="one for each of 2, got 1"):
        engine.generate([[5], [6]], adapter=["lora"])
    with pytest.raises(InvalidRequest):
        engine.generate([[5], [96], [6]], stopping=SIX)
    with pytest.raises(AdapterInvalid):
        engine.load_adapter("a", "xlora")
    assert [info.name for info in engine.list_adapters()] == ["lora", "prefix"]


def test_adapters_come_and_go(engine: Engine) -> None:
    assert engine.load_adapter("a", "lora_dora").state is AdapterState.READY
    assert engine.generate([5], adapter="a", stopping=SIX).adapter_revision == engine.get_adapter("a").revision
    assert engine.unload_adapter("a").state is AdapterState.UNLOADED
    with pytest.raises(AdapterNotFound):
        engine.get_adapter("a")


def test_threads_share_it(engine: Engine) -> None:
    wanted = [case for case in cases("llama") if case.folder in ("lora", "prefix")]

    def one(i: int) -> bool:
        case = wanted[i % len(wanted)]
        answer = engine.generate(case.ids, adapter=case.folder, sampling=GREEDY, stopping=SIX)
        return list(answer.token_ids) == case.greedy

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(24)))


def test_after_close_it_is_dead() -> None:
    before = threading.active_count()
    engine = make()
    left = engine.stream([5], stopping=StoppingParams(ignore_eos=True))
    next(left)
    engine.close()
    engine.close()
    with pytest.raises((EngineDead, Draining)):
        list(left)
    with pytest.raises(EngineDead):
        engine.generate([5])
    with pytest.raises(EngineDead):
        engine.load_adapter("a", "lora")
    assert not engine.stats().healthy
    assert threading.active_count() <= before + 2, "the loop, the engine and the loader have ended"


def test_a_caller_in_another_thread_is_answered_when_it_closes() -> None:
    engine = make()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.generate, [5], stopping=StoppingParams(ignore_eos=True))
        while not engine.stats().running:
            assert not running.done()
        engine.close()
        with suppress(Draining, EngineDead):  # it may have finished just before
            assert running.result(5).finish_reason is FinishReason.LENGTH


def test_a_bad_model_raises_where_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="cannot load"):
        Engine(str(tmp_path))
    with pytest.raises(TypeError, match="no_such_setting"):
        make(no_such_setting=1)


def test_an_adapter_of_the_start_that_fails_ends_the_start() -> None:
    with pytest.raises(AdapterInvalid):
        make(adapters=(("a", f"{adapters()}/xlora"),))


def test_plain_values_do_not_import_torch() -> None:
    """`Engine` is imported when it is asked for."""
    code = "import sys, peftmux.runtime.params, peftmux.runtime.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_classes_and_embeddings(engine: Engine) -> None:
    engine.load_adapter("seq", "lora.seq_cls")
    prompts = [[5, 9, 17], [44, 12, 80, 3]]
    both = engine.classify(prompts, adapter="seq")
    for answer, one in zip(both, prompts, strict=True):
        assert answer.logits[0] == pytest.approx(engine.classify(one, adapter="seq").logits[0], abs=1e-5)
    states = engine.embed(prompts, adapter=["", "lora"], pooling=Pooling.LAST)
    assert states[0].values != engine.embed(prompts[0], adapter="lora", pooling=Pooling.LAST).values
    unit = engine.embed("w5 w9", normalize=True).values
    assert sum(value * value for value in unit) == pytest.approx(1)
    with pytest.raises(TaskMismatch):
        engine.classify(prompts, adapter=["seq", "lora"])
    with pytest.raises(TaskMismatch):
        engine.generate(prompts[0], adapter="seq")
    with pytest.raises(InvalidRequest):
        engine.embed(prompts, adapter=["lora"])
