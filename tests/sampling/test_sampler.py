"""The sampler against the reference, its distribution, and its indifference to everything but the row."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftmux.runtime.model.sampler import prompt_logprobs, sample
from peftmux.runtime.model.sampling_filters import filtered
from peftmux.runtime.model.sampling_noise import draw_key, log_exponential
from peftmux.runtime.model.sampling_penalties import change_logits
from peftmux.runtime.params import SamplingParams

VOCABULARY = 300


def logits_of(rows: int, seed: int = 0, scale: float = 3.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * scale


def tokens_of(logits, rows):
    return [token for token, _ in sample(logits, rows)]


IDS = st.integers(0, VOCABULARY - 1)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 7, 100, 1000]),
    min_p=st.sampled_from([0.0, 0.02, 0.4]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    logit_bias=st.dictionaries(IDS, st.sampled_from([-100.0, -1.0, 2.0, 100.0]), max_size=3),
)
ROW = st.tuples(
    SAMPLING,
    st.lists(IDS, min_size=1, max_size=6),
    st.lists(IDS, max_size=6),
    st.lists(IDS, max_size=2, unique=True),
)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_equals_the_reference_row_by_row(plan, reference, rows, seed):
    logits = logits_of(len(rows), seed)
    plans = [plan(s, prompt=tuple(p), output=tuple(o), suppressed=tuple(x)) for s, p, o, x in rows]
    expected = [reference.token(one, p) for one, p in zip(logits, plans, strict=True)]
    assert tokens_of(logits, plans) == expected


@pytest.mark.parametrize("seed", range(4))
def test_changes_are_the_formulas_to_the_bit(plan, seed):
    """float32 arithmetic in the order that is written above `change_logits`, id by id, over long histories."""
    chance = random.Random(seed)
    kinds = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.1},
        {"frequency_penalty": -0.3, "repetition_penalty": 0.77, "logit_bias": {3: 1.7, 5: -100.0}},
        {"logit_bias": {0: 0.1}},
        {},
        {"presence_penalty": -0.9},
    ]
    rows, told = [], []
    for kind in kinds:
        prompt, output = (tuple(chance.choices(range(0, 90, 1 + len(kind)), k=n)) for n in (300, chance.randrange(400)))
        suppressed = (7, 9) if chance.random() < 0.5 else ()
        rows.append(plan(SamplingParams(**kind), prompt=prompt, output=output, suppressed=suppressed))
        told.append((prompt, output))
    logits = logits_of(len(rows), seed)
    changed = logits.clone()
    change_logits(changed, rows)
    for i, (row, (prompt, output)) in enumerate(zip(rows, told, strict=True)):
        sampling = row.sampling
        for id in range(VOCABULARY):
            value, count = np.float32(logits[i, id].item()), output.count(id)
            penalty = np.float32(sampling.repetition_penalty)
            if id in prompt + output:
                value = value / penalty if value > 0 else value * penalty
            if count:
                value += np.float32(-(sampling.presence_penalty + sampling.frequency_penalty * count))
            value += np.float32(sampling.logit_bias.get(id, 0.0))
            assert changed[i, id].item() == (-math.inf if id in row.suppressed else value), (i, id)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=2, max_size=6), seed=st.integers(0, 1000), data=st.data())
def test_neighbours_change_nothing(plan, rows, seed, data):
    logits = logits_of(len(rows), seed)
    plans = [plan(s, prompt=tuple(p), output=tuple(o), suppressed=tuple(x), logprobs=2) for s, p, o, x in rows]
    together = sample(logits, plans)
    order = data.draw(st.permutations(range(len(rows))))
    assert sample(logits[order], [plans[i] for i in order]) == [together[i] for i in order]
    for i, one in enumerate(plans):
        ((token, entry),) = sample(logits[i : i + 1], [one])
        assert token == together[i][0]
        assert entry.logprob == pytest.approx(together[i][1].logprob, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference_in_the_models_dtype(plan, reference, dtype):
    logits = logits_of(40, 5).to(dtype)
    kinds = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1, "top_p": 0.9}, {"temperature": 0.0}]
    plans = [plan(SamplingParams(seed=i, **kinds[i % 5]), output=(3,) * i) for i in range(40)]
    assert tokens_of(logits, plans) == [reference.token(one, p) for one, p in zip(logits, plans, strict=True)]


def test_leaves_the_logits_alone(plan):
    logits = logits_of(3)
    before = logits.clone()
    biased = SamplingParams(logit_bias={4: 5.0}, repetition_penalty=1.5)
    sample(logits, [plan(biased), plan(SamplingParams(temperature=0)), plan(SamplingParams(top_k=4))])
    assert torch.equal(logits, before)


def test_the_draws_follow_the_distribution(plan):
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02])
    draws = 20000
    logits = probabilities.log().expand(draws, -1)
    for kind, kept in (({}, 5), ({"top_p": 0.7}, 2), ({"top_k": 3}, 3), ({"min_p": 0.1}, 4)):
        base = plan(SamplingParams(seed=9, **kind))
        tokens = tokens_of(logits, [_at(base, i) for i in range(draws)])
        counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
        expected = (probabilities[:kept] / probabilities[:kept].sum()).double() * draws
        assert counts[kept:].sum() == 0
        chi_squared = ((counts[:kept] - expected) ** 2 / expected).sum().item()
        assert chi_squared < 23.5, (kind, counts)  # 4 degrees of freedom: p = 1e-4


def _at(row, index):
    """The same request, `index` tokens later."""
    return replace(row, generated=index)


def test_temperature_sharpens_and_flattens(plan):
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    logits = probabilities.log().expand(20000, -1)
    for temperature in (0.5, 2.0):
        base = plan(SamplingParams(temperature=temperature, seed=4))
        tokens = torch.tensor(tokens_of(logits, [_at(base, i) for i in range(20000)]))
        expected = probabilities ** (1 / temperature) / (probabilities ** (1 / temperature)).sum()
        got = torch.bincount(tokens, minlength=3) / 20000
        assert torch.allclose(got, expected, atol=0.015)


def test_seeds_and_indices_draw_independently(plan):
    """Pairs of draws over 4 equal tokens: neither neighbouring seeds nor indices nor both predict one another."""
    count = 12000
    logits = torch.zeros(count, 4)
    by_seed = torch.tensor(tokens_of(logits, [plan(SamplingParams(seed=i)) for i in range(count)]))
    by_index = torch.tensor(tokens_of(logits, [_at(plan(SamplingParams(seed=1)), i) for i in range(count)]))
    for a, b in ((by_seed[:-1], by_seed[1:]), (by_index[:-1], by_index[1:]), (by_seed, by_index)):
        pairs = torch.bincount(a * 4 + b, minlength=16).double()
        expected = len(a) / 16
        assert ((pairs - expected) ** 2 / expected).sum() < 45  # 15 degrees of freedom: p = 8e-5


def test_noise_is_exponential():
    log_noise = log_exponential([draw_key(7, 3)], torch.arange(200_000, dtype=torch.int32)[None])[0]
    noise = log_noise.exp().double().sort().values
    ranks = (torch.arange(200_000) + 0.5) / 200_000
    distance = ((1 - (-noise).exp()) - ranks).abs().max().item()
    assert distance < 2.2 / 200_000**0.5  # Kolmogorov-Smirnov, p < 1e-4
    assert torch.isfinite(log_noise).all()


def test_the_same_seed_gives_the_same_tokens_and_another_others(plan):
    logits = logits_of(1, scale=0.1).expand(50, -1)
    drawn = [tokens_of(logits, [_at(plan(SamplingParams(seed=s)), i) for i in range(50)]) for s in (1, 1, 2, 2**64 - 1)]
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn}) == 3


def test_a_tiny_temperature_is_greedy(plan):
    logits = logits_of(4)
    plans = [plan(SamplingParams(temperature=1e-38, seed=i)) for i in range(4)]
    assert tokens_of(logits * 100, plans) == logits.argmax(1).tolist()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_top_p_widens_until_the_mass_is_reached(reference, top_p, scale):
    """At scale 0.01 the mass is spread over nearly the whole vocabulary: past every width but the last."""
    scores = logits_of(2, 3, scale, vocabulary=9000)
    scores -= scores.amax(1, keepdim=True)
    sampling = SamplingParams(top_p=top_p)
    found: dict[int, int] = {}
    for rows, kept, _ in filtered(scores, [sampling] * 2):
        found |= zip(rows, kept.isfinite().sum(1).tolist(), strict=True)
    for i in range(2):
        expected = len(reference.survivors(scores[i].tolist(), sampling))
        assert abs(found[i] - expected) <= 1 + expected // 2000  # float32 sums against float64


def test_top_k_wider_than_the_first_width(reference):
    scores = logits_of(1, 3, 0.5, vocabulary=3000)
    scores -= scores.amax(1, keepdim=True)
    for sampling in (SamplingParams(top_k=700), SamplingParams(top_k=700, top_p=0.5), SamplingParams(top_k=2999)):
        ((_, kept, ids),) = filtered(scores, [sampling])
        found = set(ids[0][kept[0].isfinite()].tolist())
        assert len(found ^ reference.survivors(scores[0].tolist(), sampling)) <= 1


def test_equal_scores_at_the_border_all_stay():
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    for sampling in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        ((_, kept, ids),) = filtered(scores, [sampling])
        assert set(ids[0][kept[0].isfinite()].tolist()) == {0, 1, 2, 3}


def test_equal_scores_stay_beyond_the_first_width_too():
    scores = torch.full((1, 400), -9.0)
    scores[0, 0], scores[0, 50:250] = 0.0, -1.0
    ((_, kept, _),) = filtered(scores, [SamplingParams(top_k=2)])
    assert kept.isfinite().sum() == 201


def test_suppressed_tokens_are_not_drawn_even_when_biased(plan):
    logits = torch.zeros(1, 8)
    logits[0, 5] = 50.0
    for sampling in (SamplingParams(temperature=0, logit_bias={5: 100.0}), SamplingParams(logit_bias={5: 100.0})):
        assert tokens_of(logits, [plan(sampling, suppressed=(5,))])[0] != 5


def test_repetition_counts_the_prompt_and_the_others_do_not(plan):
    logits = torch.tensor([[2.0, 1.9, 1.0, -3.0]])

    def greedy(prompt, output=(), **penalty):
        return tokens_of(logits, [plan(SamplingParams(temperature=0, **penalty), prompt=prompt, output=output)])[0]

    assert greedy((0,), repetition_penalty=2.0) == 1
    assert greedy((0,), presence_penalty=2.0, frequency_penalty=2.0) == 0
    assert greedy((3,), (0,), presence_penalty=2.0) == 1
    assert greedy((3,), (0, 1), frequency_penalty=0.6) == 0
    assert greedy((3,), (0, 0, 1), frequency_penalty=0.6) == 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 5}])
def test_logits_that_are_not_finite_fail_their_row_only(plan, poison, kind):
    logits = logits_of(4)
    plans = [plan(SamplingParams(**kind), logprobs=3, id=i) for i in range(4)]
    good = sample(logits, plans)
    bad = logits.clone()
    bad[2, 17] = poison
    got = sample(bad, plans)
    assert got[2] == (None, None)
    assert [got[i] for i in (0, 1, 3)] == [good[i] for i in (0, 1, 3)]
    bad[2] = float("-inf")
    assert sample(bad, plans)[2] == (None, None)


def test_masked_vocabulary_is_not_a_failure(plan):
    logits = logits_of(1)
    logits[0, 10:] = float("-inf")
    for sampling in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.99)):
        assert tokens_of(logits, [plan(sampling)])[0] < 10


def test_logprobs_are_of_the_raw_distribution(plan):
    logits = logits_of(3)
    sampling = SamplingParams(temperature=0.2, repetition_penalty=1.5, top_k=3, logit_bias={9: 4.0}, seed=2)
    exact = logits.double().log_softmax(1)
    counts = (0, 5, 100)
    got = sample(logits, [plan(sampling, logprobs=n, id=i) for i, n in enumerate(counts)])
    for i, (n, (token, entry)) in enumerate(zip(counts, got, strict=True)):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(exact[i, token].item(), abs=1e-5)
        values, ids = exact[i].topk(n)
        assert [id for id, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_only_rows_that_ask_get_logprobs(plan):
    got = sample(logits_of(3), [plan(logprobs=None), plan(logprobs=0), plan(SamplingParams(temperature=0))])
    assert [entry is None for _, entry in got] == [True, False, True]


def test_alternatives_stop_at_the_vocabulary(plan):
    ((_, entry),) = sample(logits_of(1, vocabulary=7), [plan(logprobs=100)])
    assert len(entry.top) == 7
    assert sum(torch.tensor([value for _, value in entry.top]).exp()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs_of_a_long_chunk(dtype):
    logits = logits_of(150).to(dtype)
    targets = [(7 * i) % VOCABULARY for i in range(150)]
    exact = logits.double().log_softmax(1)
    for top in (0, 4):
        entries = prompt_logprobs(logits, targets, top)
        assert [entry.token_id for entry in entries] == targets
        assert all(len(entry.top) == top for entry in entries)
        expected = exact[torch.arange(150), torch.tensor(targets)].tolist()
        assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-5)


def test_prompt_logprobs_of_bad_logits_are_none_at_all():
    logits = logits_of(5)
    logits[3, 0] = float("nan")
    assert prompt_logprobs(logits, [1] * 5, 2) == ()
    assert len(prompt_logprobs(logits[:3], [1] * 3, 2)) == 3
