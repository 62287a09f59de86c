"""The heads in AdapterHub's folders: a classification head, or the language-model head that it saves with any adapter.

A fusion has one head: its own, which stands beside its own files; else the one that its adapters brought, if it is the
same in all that brought one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftmux.adapters.base import BaseModel
from peftmux.adapters.config import show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import HEAD_CONFIG, HEAD_OUTER, read_outer
from peftmux.adapters.methods.ledger import Ledger
from peftmux.adapters.methods.registry import Shapes
from peftmux.adapters.parts import Part, ReplacedRows
from peftmux.kernels.head import Head
from peftmux.kernels.tree import tensors as tensors_of

if TYPE_CHECKING:
    from peftmux.adapters.heads import HeadPlan

Built = tuple[Head | None, dict[str, tuple[Part, ...]]]
"""A classification head, and the parts of a language-model head."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What one head_config.json describes: a classification head, the weight of a language-model head, or nothing."""

    owner: str
    prefix: str
    classes: HeadPlan | None = None
    language: str | None = None

    def classifier(self, tensors: Mapping[str, Tensor]) -> Head:
        assert self.classes is not None
        return self.classes.build({name: tensors[self.prefix + name] for name in self.classes.tensors})


def plan_hub_heads(
    config: Mapping[str, Any], shapes: Shapes, ledger: Ledger, base: BaseModel
) -> Callable[[Mapping[str, Tensor]], Built]:
    """Claims the tensors of all heads. config: the folder's, as `adapters.hub` makes it."""
    brought = [_plan(f"adapter {name}", f"head/{name}/", own, shapes, ledger, base) for name, own in _heads(config)]
    own = config.get("fusion_head")
    fusions = [] if own is None else [_plan("the fusion", "fusion_head/", own, shapes, ledger, base)]
    classes = [f for f in fusions if f.classes] or [f for f in brought if f.classes]
    language = [f for f in fusions if f.language] or [f for f in brought if f.language]

    def build(tensors: Mapping[str, Tensor]) -> Built:
        heads = [found.classifier(tensors) for found in classes]
        weights = [tensors[str(found.language)] for found in language]
        _check_same(classes, heads)
        _check_same(language, weights)
        return (heads[0] if heads else None), (_language_head(weights[0], base) if weights else {})

    return build


def _heads(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    heads = config.get("heads")
    return list(heads.items()) if isinstance(heads, dict) else []


def _plan(owner: str, prefix: str, head: Any, shapes: Shapes, ledger: Ledger, base: BaseModel) -> _Found:
    from peftmux.adapters.heads import plan_hub_head  # which reads this package's ledger

    read_outer(head, HEAD_OUTER, HEAD_CONFIG, base)
    config, name = head.get("config"), head.get("name")
    own = {tensor[len(prefix) :]: shape for tensor, shape in shapes.items() if tensor.startswith(prefix)}
    if isinstance(config, dict):
        if not isinstance(name, str) or not name:
            raise AdapterInvalid(
                Reason.MALFORMED_CONFIG, f"field name of {HEAD_CONFIG}: expected a text, got {show(name)}"
            )
        plan = plan_hub_head(config, name, own, base)
        for tensor in own:
            ledger.claim(prefix + tensor, shapes[prefix + tensor])
        return _Found(owner, prefix, classes=plan)
    if config is not None:
        raise AdapterInvalid(
            Reason.MALFORMED_CONFIG, f"field config of {HEAD_CONFIG}: expected an object or null, got {show(config)}"
        )
    if not own:
        return _Found(owner, prefix)
    site = base.linear_sites[base.head] if base.head else None
    if site is None:
        raise AdapterInvalid(Reason.UNSUPPORTED_SITE, "expected a base with an output projection for the head")
    ledger.claim(f"{prefix}{base.head}.weight", (site.out_features, site.in_features))
    return _Found(owner, prefix, language=f"{prefix}{base.head}.weight")


def _check_same(found: Sequence[_Found], heads: Sequence[Head | Tensor]) -> None:
    for one, head in zip(found[1:], heads[1:], strict=True):
        if not _same(heads[0], head):
            raise AdapterInvalid(
                Reason.UNUSED_TENSOR,
                f"expected one head, or the fusion's own beside its files, got different ones of {found[0].owner} and "
                f"{one.owner}",
            )


def _same(a: Head | Tensor, b: Head | Tensor) -> bool:
    described = [(h.kind, h.labels, h.activation) if isinstance(h, Head) else None for h in (a, b)]
    values = [list(tensors_of(h)) for h in (a, b)]
    return (
        described[0] == described[1]
        and len(values[0]) == len(values[1])
        and all(torch.equal(x, y) for x, y in zip(*values, strict=True))
    )


def _language_head(weight: Tensor, base: BaseModel) -> dict[str, tuple[Part, ...]]:
    """Nothing where it is the base's own, which it is unless it was trained."""
    assert base.head is not None
    own = base.weight(base.head)
    if torch.equal(weight.to(own.device, own.dtype), own):
        return {}
    return {base.head: (ReplacedRows(weight, None, base.bias(base.head)),)}
