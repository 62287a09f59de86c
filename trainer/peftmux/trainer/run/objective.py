"""A preference loss in the place of the model's own, and the base model's answers that it compares with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer

from peftmux.adapters.probing import evaluating
from peftmux.trainer.data.preference import DESIRABLE, REFERENCE, PreferenceCollator
from peftmux.trainer.host.host import Host
from peftmux.trainer.host.processes import processes, rank, summed
from peftmux.trainer.run.preference import dpo, kto, log_probabilities

EXTRAS = (REFERENCE, DESIRABLE)
"""What a batch holds that the model is not given."""


@contextmanager
def replaced_loss(model: Any, function: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """Within it a causal LM of transformers computes this of its logits and labels. Gives the model's own."""
    own = model.loss_function
    model.loss_function = function
    try:
        yield own
    finally:
        model.loss_function = own


@dataclass(slots=True)
class Preference:
    """kind: "dpo" or "kto". beta: how dear a distance from the base is. weights: KTO's, (desirable, undesirable)."""

    kind: str
    beta: float
    weights: tuple[float, float] = (1.0, 1.0)
    _seen: Tensor | None = None
    """Of the rows trained on since the last `metrics`: the sum of their (implied) rewards, each positive where it goes
    the wanted way, how many are positive, and how many there are."""

    def loss(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """Mean over the batch's rows. logits: [2 B, K, V], labels: [2 B, K], pair by pair."""
        policy = log_probabilities(logits, labels).view(-1, 2)
        reference = extras[REFERENCE].to(policy.device)
        ratios = (policy - reference).detach()
        if self.kind == "dpo":
            self._note(logits, ratios[:, 0] - ratios[:, 1])
            return dpo(policy, reference, self.beta).mean()
        desirable = extras[DESIRABLE].to(policy.device)
        self._note(logits, torch.where(desirable, ratios[:, 0], -ratios[:, 0]))
        return kto(policy, reference, desirable, self.beta, self.weights).mean()

    def _note(self, logits: Tensor, gains: Tensor) -> None:
        """Nothing of an evaluation, whose logits have no gradient."""
        if logits.requires_grad:
            rows = torch.stack([self.beta * gains, gains > 0, torch.ones_like(gains)]).sum(1)
            self._seen = rows if self._seen is None else self._seen + rows

    def metrics(self) -> dict[str, float]:
        """Since the last call, of all processes: the mean margin, and the share of rows that have one."""
        if self._seen is None:
            return {}
        margin, right, rows = summed(self._seen).tolist()
        self._seen = None
        return {"reward_margin": margin / rows, "reward_accuracy": right / rows}

    def add_references(self, trainer: Trainer, features: Sequence[dict[str, Any]]) -> None:
        """Put the base model's log-probabilities into each feature: the model's with all adapters aside.

        Of several processes, each of which calls this, each scores its share of the batches.
        """
        model: Any = trainer.model
        collator = trainer.data_collator
        assert isinstance(collator, PreferenceCollator)
        size = trainer.args.per_device_eval_batch_size
        starts = range(0, len(features), size)
        found = torch.zeros(len(features), 2, device=model.device)
        with evaluating(model), Host.of(model).aside(), trainer.compute_loss_context_manager():
            turns = range(rank(), len(starts) + rank(), processes())  # as many in each: weights may be held in shards
            for turn in tqdm(turns, "reference", unit="batch", disable=not sys.stderr.isatty()):
                start = starts[min(turn, len(starts) - 1)]
                chunk = slice(start, start + size)
                batch = {
                    name: value.to(model.device) if isinstance(value, Tensor) else value
                    for name, value in collator.inner([s for f in features[chunk] for s in f["pair"]]).items()
                }
                labels = batch.pop("labels")
                sums = log_probabilities(model(**batch).logits, labels).view(-1, 2)
                if turn < len(starts):
                    found[chunk] = sums
        for feature, pair in zip(features, summed(found).tolist(), strict=True):
            feature[REFERENCE] = pair
