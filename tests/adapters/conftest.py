"""Fixture bases, and an oracle: lowered parts run on a plain transformers model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from peftmux.adapters.base import ResidualBranch
from peftmux.adapters.branches import residual_branches
from peftmux.adapters.feed_forward import feed_forward
from peftmux.adapters.parts import (
    Bottleneck,
    EmbeddingPart,
    ExpertsPart,
    Fusion,
    InputScale,
    Ladder,
    LinearPart,
    LoweredAdapter,
    MixturePart,
    NormPart,
    ReplacedRows,
    RouterPart,
    SparsePart,
)
from peftmux.adapters.tables import table_scale
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.bottleneck import apply_bottleneck, apply_fusion
from peftmux.kernels.embedding import apply_embedding_part, scaled_part
from peftmux.kernels.inputs import scale_input
from peftmux.kernels.ladder import apply_ladder
from peftmux.kernels.lowrank import apply_linear_part
from peftmux.kernels.mixture import apply_mixture_part
from peftmux.kernels.norms import apply_norm_part
from peftmux.kernels.rows import apply_replaced_rows
from peftmux.kernels.sparse import apply_sparse_part

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Bases and adapters as other libraries saved them."""
    return FIXTURES


@pytest.fixture(scope="session")
def load_base() -> Any:
    """(name, dtype) -> a fixture base; made once each. Eager attention, as the expected logits were."""

    @cache
    def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
        path = FIXTURES / "base" / name
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()

    return load


@pytest.fixture(scope="session")
def llama(load_base: Any) -> TorchBase:
    return TorchBase(load_base("llama"))


@pytest.fixture(scope="session")
def qwen2(load_base: Any) -> TorchBase:
    return TorchBase(load_base("qwen2"))


@pytest.fixture(scope="session")
def adapted_logits() -> Any:
    """(module, lowered adapter, ids [rows, T], tasks of the rows) -> logits [rows, T, vocabulary]."""
    return _logits


_CHANGES: dict[type, Any] = {
    LinearPart: apply_linear_part,
    ReplacedRows: apply_replaced_rows,
    EmbeddingPart: apply_embedding_part,
    SparsePart: apply_sparse_part,
}


def _hook_norm(norm: nn.Module, part: NormPart, active: Tensor) -> Any:
    plain = copy.deepcopy(norm)  # without the hook

    def changed(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where(_along(active, output), apply_norm_part(plain, inputs[0], part), output)

    return norm.register_forward_hook(changed)


def _hook_branch(module: nn.Module, branch: ResidualBranch, part: Bottleneck | Fusion, active: Tensor) -> list[Any]:
    """The stream is what the branch's norm reads; an attention module gives its output first of a tuple."""
    stream: list[Tensor] = []

    def read(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream.append(inputs[0])

    def changed(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        y, h = output[0] if isinstance(output, tuple) else output, stream.pop()
        apply: Any = apply_bottleneck if isinstance(part, Bottleneck) else apply_fusion
        flat = [t.reshape(-1, t.shape[-1]) for t in (y, h)]
        new = torch.where(active, apply(*flat, part), flat[0]).view_as(y)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    norm, own = module.get_submodule(branch.norm), module.get_submodule(branch.name)
    return [norm.register_forward_pre_hook(read), own.register_forward_hook(changed)]


def _hook_ladder(module: Any, ladder: Ladder) -> list[Any]:
    stream: list[Tensor] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        stream[:] = [args[0] if args else kwargs["hidden_states"]]

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        stream.append(output[0] if isinstance(output, tuple) else output)

    def end(_module: nn.Module, _args: Any, output: Any) -> Any:
        final = output.last_hidden_state
        output.last_hidden_state = apply_ladder(stream, final, ladder, torch.arange(final.shape[1]))
        return output

    layers = [module.get_submodule(path) for path in TorchBase(module).stream_layers]
    hooks = [layer.register_forward_hook(leave) for layer in layers]
    begin = layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    return [begin, *hooks, module.get_decoder().register_forward_hook(end)]


def _hook_block(module: nn.Module, part: MixturePart, active: Tensor) -> Any:
    block = feed_forward(module)
    assert block is not None
    layers = {name: copy.deepcopy(getattr(module, name)) for name in (*block.inner, block.outer)}  # without hooks

    def changed(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        inner = {name: layers[name](x) for name in block.inner}
        hidden, added = apply_mixture_part(x, inner, block.activate, block.outer, part)
        new = layers[block.outer](hidden.to(x.dtype)) + added
        return torch.where(active, new, output.reshape(new.shape)).view_as(output).to(output.dtype)

    return module.register_forward_hook(changed)


def _along(active: Tensor, output: Tensor) -> Tensor:
    """active: [rows * T, 1], shaped for an output [rows * T, D], [rows, T, ..., D] or [rows, heads, T, D]."""
    if output.dim() == 2:
        return active
    rows = output.shape[0]
    if output.shape[1] * rows == len(active):
        return active.view(rows, -1, *[1] * (output.dim() - 2))
    return active.view(rows, 1, -1, 1)


def _hook_input(layer: nn.Module, part: InputScale, active: Tensor) -> Any:
    def scaled(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (torch.where(active.view(*x.shape[:-1], 1), scale_input(x, part), x), *inputs[1:])

    return layer.register_forward_pre_hook(scaled)


@contextmanager
def _parts(module: nn.Module, adapter: LoweredAdapter, ids: Tensor) -> Iterator[None]:
    """Within it, `module` also does what the adapter says to rows `ids` [rows, T]."""
    active = _active(ids, adapter.invocation).flatten().unsqueeze(-1)  # [rows * T, 1]

    factor = table_scale(module.get_input_embeddings()) or 1.0  # type: ignore[operator]

    def hook(change: Any, part: Any) -> Any:
        part = scaled_part(part, factor) if change is apply_embedding_part else part

        def changed(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            y = output.reshape(-1, output.shape[-1])
            x = inputs[0].reshape(-1) if change is apply_embedding_part else inputs[0].reshape(len(y), -1)
            return torch.where(active, change(y, x, part), y).view_as(output)

        return changed

    parts = [(s, p) for s, ps in adapter.parts.others.items() for p in ps] + [*adapter.parts.linear.items()]
    branches = residual_branches(module)  # before there are hooks
    weights = [(module.get_parameter(s), p) for s, p in parts if isinstance(p, ExpertsPart | RouterPart)]
    before = [weight.detach().clone() for weight, _ in weights]
    for weight, part in weights:
        delta = part.scale * part.b @ part.a  # [E, out, in], or a router's [E, in]
        weight.data += delta if delta.shape == weight.shape else delta.transpose(1, 2)
    handles = [
        module.get_submodule(s).register_forward_hook(hook(_CHANGES[type(p)], p))
        for s, p in parts
        if type(p) in _CHANGES
    ]
    for _, p in parts:
        if isinstance(p, Ladder):
            handles += _hook_ladder(module, p)
    handles += [_hook_norm(module.get_submodule(s), p, active) for s, p in parts if isinstance(p, NormPart)]
    for s, p in parts:
        if isinstance(p, Bottleneck | Fusion):
            handles += _hook_branch(module, branches[s], p, active)
    handles += [_hook_block(module.get_submodule(s), p, active) for s, p in parts if isinstance(p, MixturePart)]
    handles += [_hook_input(module.get_submodule(s), p, active) for s, p in parts if isinstance(p, InputScale)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (weight, _), old in zip(weights, before, strict=True):
            weight.data = old


def _active(ids: Tensor, invocation: tuple[int, ...]) -> Tensor:
    """[rows, T]: from each row's last occurrence of the invocation on; never where a row has none."""
    if not invocation:
        return torch.ones_like(ids, dtype=torch.bool)
    starts = ids.unfold(1, len(invocation), 1).eq(torch.tensor(invocation)).all(-1)  # [rows, T - n + 1]
    starts = torch.nn.functional.pad(starts, (0, len(invocation) - 1))
    later = starts.flip(1).cumsum(1).flip(1)  # occurrences at or after each token
    return ((later == 0) | ((later == 1) & starts)).logical_and(starts.any(1, keepdim=True))


@torch.no_grad()
def _logits(module: Any, adapter: LoweredAdapter, ids: Tensor, tasks: tuple[int, ...] = ()) -> Tensor:
    """The adapted model's logits for unpadded rows `ids` [rows, T]: [rows, T, vocabulary], virtual tokens in front."""
    with _parts(module, adapter, ids):
        if adapter.parts.virtual is not None:
            prompts = adapter.parts.virtual.embeddings[list(tasks or (0,))].to(module.dtype)  # [rows or 1, n, D]
            real = module.get_input_embeddings()(ids)
            embeddings = torch.cat([prompts.expand(len(ids), -1, -1), real], 1)
            whole: Tensor = module(inputs_embeds=embeddings).logits
            return whole
        if adapter.parts.prefix is None:
            plain: Tensor = module(input_ids=ids).logits
            return plain
        rows, length = ids.shape
        prefix = adapter.parts.prefix
        stored = DynamicCache(config=module.config)
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            k, v = (t.to(module.dtype).transpose(0, 1).expand(rows, -1, -1, -1).contiguous() for t in (k, v))
            stored.update(k, v, layer)
        positions = torch.arange(prefix.first_position, prefix.first_position + length).expand(rows, -1)
        mask = torch.ones(rows, prefix.length + length, dtype=torch.long)
        out = module(input_ids=ids, past_key_values=stored, position_ids=positions, attention_mask=mask)
        prefixed: Tensor = out.logits
        return prefixed
