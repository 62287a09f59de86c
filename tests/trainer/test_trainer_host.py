"""Several adapters in one live model: each changes its own rows of a batch, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftmux.adapters.probing import evaluating
from peftmux.trainer.host.host import Host
from peftmux.trainer.methods import METHODS, AttachContext, AttachedAdapter
from tests.trainer.tiny_models import build_model, random_ids, scramble

JOBS: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("lora", {"r": 4}, 2),
    ("dora", {"r": 2, "target_modules": ["q_proj", "down_proj"]}, 1),
    ("prefix", {"num_virtual_tokens": 5}, 2),
    ("rslora", {"r": 8}, 1),
    ("prefix", {"num_virtual_tokens": 3}, 1),
)


def attach(model: Any, method: str, config: dict[str, Any], seed: int) -> AttachedAdapter:
    chosen = METHODS[method]
    with Host.of(model).aside():
        adapter = chosen.attach(model, chosen.config_class(**config), AttachContext(seed))
    scramble(adapter, seed)
    return adapter


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
        len(ids), -1
    )


@pytest.mark.parametrize(("first", "kept"), [(0, 15), (1, 15), (4, 11)])
def test_cropped_logits_are_those_that_a_label_needs(first: int, kept: int):
    """Behind virtual tokens a row's first token is predicted, too: rows that are learned from their start."""
    model, ids = build_model("llama"), random_ids()
    keys = {attach(model, "prompt", {"num_virtual_tokens": n}, n).key: 1 for n in (3, 5)}
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < first, -100)
    crop = max(first - 1, 0)  # as the collator crops
    with Host.of(model).rows(keys):
        whole = model(input_ids=ids, labels=labels)
        some = model(input_ids=ids, labels=labels[:, crop:], logits_to_keep=ids.shape[1] - crop)
    torch.testing.assert_close(some.loss, whole.loss)
    assert (some.logits.shape[1], whole.logits.shape[1]) == (kept, 17)


@pytest.mark.parametrize("shape", ["llama-biased", "qwen2"])
def test_rows_of_several_adapters_are_those_of_each_alone(shape: str):
    ids = random_ids(sum(rows for *_, rows in JOBS))
    model = build_model(shape)
    adapters = [attach(model, method, config, seed) for seed, (method, config, _) in enumerate(JOBS)]
    with Host.of(model).rows({a.key: rows for a, (*_, rows) in zip(adapters, JOBS, strict=True)}):
        together = loss_of(model, ids)
        together.sum().backward()
    start = 0
    for seed, (method, config, rows) in enumerate(JOBS):
        own = build_model(shape)
        alone = attach(own, method, config, seed)
        expected = loss_of(own, ids[start : start + rows])
        expected.sum().backward()
        torch.testing.assert_close(together[start : start + rows], expected, rtol=1e-5, atol=1e-5)
        for name, parameter in alone.parameters.items():
            torch.testing.assert_close(
                adapters[seed].parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=f"{method} {name}"
            )
        start += rows


def test_a_base_row_beside_an_adapter_is_the_bases():
    model, ids = build_model("llama"), random_ids(2)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        adapter = attach(model, "lora", {}, 0)
        with Host.of(model).rows({adapter.key: 1, "": 1}):
            mixed = model(input_ids=ids).logits
    assert (mixed[0] - plain[0]).abs().max() > 1e-2
    torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=1e-6)


def test_the_model_is_bare_again_when_all_have_left():
    model = build_model("llama")
    names, ids = list(dict(model.named_modules())), random_ids(1)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        adapters = [attach(model, method, config, seed) for seed, (method, config, _) in enumerate(JOBS)]
        for adapter in adapters:
            adapter.detach()
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert list(dict(model.named_modules())) == names


def test_the_head_is_given_one_block_while_an_adapter_is_attached():
    model = build_model("llama")
    seen: list[bool] = []
    model.lm_head.register_forward_hook(lambda module, given, output: seen.append(given[0].is_contiguous()))
    ids = random_ids(3)
    alone = model(input_ids=ids, logits_to_keep=4).logits
    adapter = METHODS["lora"].attach(model, METHODS["lora"].config_class(), AttachContext(0))
    attached = model(input_ids=ids, logits_to_keep=4).logits
    adapter.detach()
    model(input_ids=ids, logits_to_keep=4)
    assert seen == [False, True, False]
    torch.testing.assert_close(attached, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_that_fails_leaves_the_model_as_it_was(training: bool):
    model = build_model("qwen2").train(training)
    host, before = Host.of(model), Host.of(model).spans

    def passes() -> None:
        with evaluating(model), host.rows({"a": 1}):
            assert not model.training
            assert not torch.is_grad_enabled()
            assert host.spans == (("a", slice(0, 1)),)
            model(input_ids=torch.tensor([[10**6]]))  # no such token

    with pytest.raises(IndexError):
        passes()
    assert (model.training, torch.is_grad_enabled(), host.spans) == (training, True, before)
