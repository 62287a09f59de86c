"""Preference losses on an adapter, against the base model without it.

DPO (Rafailov et al., 2023, arXiv 2305.18290, equation 7):
    -log sigmoid(beta * (r_chosen - r_rejected))
KTO (Ethayarajh et al., 2024, arXiv 2402.01306, equation 8):
    w_d * (1 - sigmoid(beta * (r - z))) where desirable, w_u * (1 - sigmoid(beta * (z - r))) otherwise
with r = log p(completion | prompt) - log p_reference(completion | prompt), and z the mean of r over completions of
other prompts, in the batches of all processes; not below zero and without a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.host.processes import mean


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the learned tokens of each row, summed. logits: [B, T, V], labels: [B, T] -> [B] float32."""
    targets = labels[:, 1:]
    losses = cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(targets.shape).sum(1)


def dpo(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """policy, reference: [B, 2] log-probabilities of (chosen, rejected) -> [B]."""
    ratios = policy - reference
    return -logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))


def kto(policy: Tensor, reference: Tensor, desirable: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """policy, reference: [B, 2] of (own completion, another row's); desirable: [B] bool; weights: w_d, w_u -> [B]."""
    ratios = policy - reference
    z = mean(ratios[:, 1]).clamp(min=0)
    gain = torch.where(desirable, 1.0, -1.0) * (ratios[:, 0] - z)
    return torch.where(desirable, weights[0], weights[1]) * torch.sigmoid(-beta * gain)
