"""Served == PEFT's own numbers: alone and mixed, prefix cache on and off, prompts in one chunk and in several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftmux.adapters.errors import AdapterInvalid
from tests.engine.harness import FIXTURES, Answer, ask, ask_all, load, request, running
from tests.folders import REFUSED
from tests.parity.conftest import Served
from tests.parity.fixtures import INVOCATION, cases, folders, task_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

VOCABULARY = 96
TOLERANCE = 3e-4
"""float32: the fixtures agree to 1e-5 where summing in another order does not meet a near-cancellation."""
SAME_ROW = 1e-5
"""One row of one engine, computed in other chunks."""
BFLOAT16 = 5e-2
"""Mean over the vocabulary; PEFT's own run is at 4.2e-2 for the worst of these prompts."""


def table(answer: Answer, vocabulary: int = VOCABULARY) -> Tensor:
    """[T - 1, V]: the distributions that predict the prompt's second token and those after it."""
    rows = torch.full((len(answer.prompt_logprobs) - 1, vocabulary), torch.nan)
    for row, entry in zip(rows, answer.prompt_logprobs[1:], strict=True):
        ids, values = zip(*entry.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return rows


def check(answer: Answer, ids: list[int], logprobs: Tensor, greedy: list[int], tolerance: float = TOLERANCE) -> None:
    assert [entry.token_id for entry in answer.prompt_logprobs] == ids
    assert answer.prompt_logprobs[0].logprob is None
    torch.testing.assert_close(table(answer), logprobs[:-1], rtol=0, atol=tolerance)
    chosen = torch.tensor([entry.logprob for entry in answer.prompt_logprobs[1:]])
    expected = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(chosen, expected, rtol=0, atol=tolerance)
    assert answer.ids == greedy
    assert answer.values[0] == pytest.approx(float(logprobs[-1, greedy[0]]), abs=tolerance)


async def test_alone(served: Served) -> None:
    for case in served.cases:
        answer = await ask(
            served.engine, request(case.ids, case.folder, len(case.greedy), prompt_logprobs=VOCABULARY, task=case.task)
        )
        check(answer, case.ids, case.logprobs, case.greedy)
        assert answer.revision == served.engine.get_adapter(case.folder).revision
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(case.ids)


async def test_all_in_one_batch_with_base_rows(served: Served, reference) -> None:
    prompts = [case.ids for case in served.cases[:2]]
    module = reference(served.base)
    served.steps.tokens.clear()
    wanted = [request(c.ids, c.folder, len(c.greedy), prompt_logprobs=VOCABULARY, task=c.task) for c in served.cases]
    wanted += [request(ids, "", 6, prompt_logprobs=VOCABULARY) for ids in prompts]
    answers = await ask_all(served.engine, wanted)
    for case, answer in zip(served.cases, answers, strict=False):
        check(answer, case.ids, case.logprobs, case.greedy)
    for ids, answer in zip(prompts, answers[len(served.cases) :], strict=True):
        check(answer, ids, module.logprobs(ids), module.greedy(ids, 6))
        assert answer.revision == ""
    if served.settings == "chunked":
        assert max(served.steps.tokens) == 4
    else:
        assert max(served.steps.tokens) > 100, "the rows did not share a step"


async def test_the_base_differs_from_every_adapter(served: Served) -> None:
    """Otherwise the parity above would prove nothing."""
    changed = [case for case in served.cases if case.invoked]
    assert {case.folder for case in changed} == {*folders(served.base)}
    wanted = [request(case.ids, "", prompt_logprobs=VOCABULARY) for case in changed]
    for case, answer in zip(changed, await ask_all(served.engine, wanted), strict=True):
        assert float((table(answer) - case.logprobs[:-1]).abs().max()) > 30 * TOLERANCE


async def test_a_second_request_reads_the_cache(served: Served) -> None:
    """Prompts that no other test uses, so that the first of each pair computes all of it."""
    names = ["", *folders(served.base)]
    wanted = [request([*INVOCATION, *range(40, 56)], name, task=task_of(served.base, name)) for name in names]
    first = await ask_all(served.engine, wanted)
    again = await ask_all(served.engine, wanted)
    for name, a, b in zip(names, first, again, strict=True):
        assert b.ids == a.ids, name
        assert b.values == pytest.approx(a.values, abs=SAME_ROW), name
        # 18 tokens; behind a prefix of 5 the row's blocks hold 3, 4, 4, 4 and 3 of them
        assert a.cached == 0
        assert (b.cached > 0) is (served.settings != "uncached"), name


async def test_adapters_do_not_share_a_cache() -> None:
    async with running(block_size=4) as engine:
        names = ["", *folders("llama")]
        for name in names[1:]:
            await load(engine, name)
        ids = [*INVOCATION, *range(20, 38)]
        for name in names:
            assert (await ask(engine, request(ids, name, task=task_of("llama", name)))).cached == 0, name


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
async def test_bfloat16_is_as_exact_as_peft(together: bool, half_reference) -> None:
    """Each rounding differs (another attention kernel alone moves PEFT's logits by 0.26), so the yardstick is the same
    bfloat16 weights computed in float32: on average no further from it than PEFT's own bfloat16 run."""
    async with running(dtype="bfloat16") as engine:
        found = cases("llama", half=True)
        for name in folders("llama", half=True):
            await load(engine, name)
        wanted = [request(c.ids, c.folder, prompt_logprobs=VOCABULARY) for c in found]
        wanted += [request(found[0].ids)] * 3
        answers = await ask_all(engine, wanted) if together else [await ask(engine, one) for one in wanted]
    ours, pefts = [], []
    for case, answer in zip(found, answers, strict=False):
        exact = half_reference(case.folder, case.ids)[:-1]
        ours.append(float((table(answer) - exact).abs().mean()))
        pefts.append(float((case.logprobs[:-1] - exact).abs().mean()))
        assert answer.ids[0] == case.greedy[0]
    assert max(ours) < BFLOAT16
    assert sum(ours) < 1.2 * sum(pefts)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
async def test_folders_of_other_kinds_are_refused(name: str) -> None:
    async with running(name, adapters_root=str(FIXTURES)) as engine:
        for folder in [f for f in REFUSED if f.split("/")[1] == name]:
            with pytest.raises(AdapterInvalid):
                await engine.load_adapter("refused", folder)
        assert engine.list_adapters() == ()
