"""What loading a model finds out, it finds out without slowing down the steps that come after."""

from __future__ import annotations

import torch

from peftmux.runtime.model.first_pass import shows_its_hidden_state
from peftmux.runtime.model.load import fit_model
from tests.model.families import build


def test_no_layer_runs_a_hook() -> None:
    model = fit_model(build("llama"), None, "llama")
    hooked = {name for name, one in model.module.named_modules() if one._forward_hooks or one._forward_pre_hooks}
    assert hooked == {"model"}, "the decoder's own, which catches final states"


def test_states_can_be_asked_for_again() -> None:
    module = build("llama")
    assert shows_its_hidden_state(module)
    states = module(input_ids=torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states
    assert len(states) == module.config.num_hidden_layers + 1
