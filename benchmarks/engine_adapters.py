"""Random adapters of several kinds, as the parts that lowering makes, on the device where they are served."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peftmux.adapters.base import LinearSite
from peftmux.adapters.parts import Bottleneck, InputScale, KVPrefix, LinearPart, LoweredAdapter, Parts
from peftmux.runtime.model.loaded import LoadedModel

_SCALE = 0.01
_BOTTLENECK = 64


class Maker:
    """The tensors of one adapter."""

    def __init__(self, model: LoadedModel, rank: int, prefix: int, seed: int) -> None:
        self.model = model
        self.rank = rank
        self.prefix = prefix
        self._generator = torch.Generator(model.device).manual_seed(seed)

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self.model.device) * _SCALE

    def near_one(self, size: int) -> Tensor:
        return 1 + self.random(size)

    def sites(self, *names: str) -> Mapping[str, LinearSite]:
        """The layers' linear sites, those with these last names where any are given; never the output projection."""
        return {
            path: site
            for path, site in self.model.linear_sites.items()
            if path != self.model.head and (not names or path.rsplit(".", 1)[-1] in names)
        }


def _lora(make: Maker) -> Parts:
    return Parts(
        linear={
            path: LinearPart(make.random(make.rank, site.in_features), make.random(site.out_features, make.rank))
            for path, site in make.sites().items()
        }
    )


def _dora(make: Maker) -> Parts:
    return Parts(
        linear={
            path: LinearPart(
                make.random(make.rank, site.in_features),
                make.random(site.out_features, make.rank),
                out_scale=make.near_one(site.out_features),
            )
            for path, site in make.sites().items()
        }
    )


def _ia3(make: Maker) -> Parts:
    outputs = make.sites("k_proj", "v_proj")
    inputs = make.sites("down_proj")
    return Parts(
        linear={path: LinearPart(out_scale=make.near_one(site.out_features)) for path, site in outputs.items()},
        others={path: (InputScale(make.near_one(site.in_features)),) for path, site in inputs.items()},
    )


def _bias(make: Maker) -> Parts:
    return Parts(linear={path: LinearPart(bias=make.random(site.out_features)) for path, site in make.sites().items()})


def _prefix(make: Maker) -> Parts:
    shapes = make.model.kv_shapes
    keys = tuple(make.random(make.prefix, shape.kv_heads, shape.key_dim) for shape in shapes)
    values = tuple(make.random(make.prefix, shape.kv_heads, shape.value_dim) for shape in shapes)
    return Parts(prefix=KVPrefix(keys, values, make.prefix))


def _bottleneck(make: Maker) -> Parts:
    width = make.model.hidden_size
    inner = min(_BOTTLENECK, width)

    def part() -> Bottleneck:
        scale = torch.ones(1, device=make.model.device)
        return Bottleneck(
            make.random(inner, width), make.random(inner), make.random(width, inner), make.random(width), scale, "relu"
        )

    wanted = [name for name, branch in make.model.branches.items() if branch.role == "feed_forward"]
    return Parts(others={name: (part(),) for name in wanted})


KINDS: Mapping[str, Callable[[Maker], Parts]] = {
    "lora": _lora,
    "dora": _dora,
    "ia3": _ia3,
    "bias": _bias,
    "prefix": _prefix,
    "bottleneck": _bottleneck,
}


def random_adapter(model: LoadedModel, kind: str, rank: int, prefix: int, seed: int) -> LoweredAdapter:
    digest = hashlib.sha256(f"{kind} {rank} {prefix} {seed}".encode()).hexdigest()
    return LoweredAdapter(kind, digest, KINDS[kind](Maker(model, rank, prefix, seed)))
