"""Ladder side-tuning (Sung et al., 2022, arXiv 2206.06522): a narrow transformer beside the base, which only reads it.

No gradient passes through the base's layers, and none of their activations are kept: backward runs through the side
network and the output projection alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from peftmux.adapters.methods.ladder import STEM, assemble
from peftmux.adapters.stream import decoders, stream_in, stream_out
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.ladder import ACTIVATIONS, Attend, Ladder, causal, climb, finish, rotation, start
from peftmux.trainer.errors import OptionError
from peftmux.trainer.host.host import Host
from peftmux.trainer.host.inputs import visible
from peftmux.trainer.methods.base import AttachContext, AttachedAdapter, Method
from peftmux.trainer.methods.linear import uniform

_HEAD_DIM = 64
"""At most."""
_NARROWEST = 64
"""Where the base is at least as wide: a side network of fewer learns little."""
_CLOSED = -0.5
"""Where a merging gate starts: almost all of what the head reads is the base's."""


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Ladder side-tuning's options."""

    reduction_factor: int = field(default=8, metadata={"help": "the base's width over the side network's (64 or more)"})
    layers: list[int] | None = field(
        default=None, metadata={"help": "numbers of the base's layers with a side block; default: all"}
    )
    hidden_act: str = field(default="silu", metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})
    temperature: float = field(default=0.1, metadata={"help": "of the gates: sigmoid(p / temperature)"})
    merge: Literal["replace", "add", "gate"] = field(
        default="replace",
        metadata={"help": "what the head reads: the ladder (replace), base + ladder (add), a gated mean (gate)"},
    )

    def __post_init__(self) -> None:
        if self.reduction_factor < 1:
            raise OptionError("reduction-factor", f"expected 1 or more, got {self.reduction_factor}")
        if self.hidden_act not in ACTIVATIONS:
            raise OptionError("hidden-act", f"expected one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")
        if not 1e-4 <= self.temperature < 1e30:
            raise OptionError("temperature", f"expected a number from 0.0001 on, got {self.temperature}")


class SideNetwork(nn.Module):
    """The tensors of a ladder, named as in its file."""

    def __init__(self, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(tensor))

    def file_tensors(self) -> dict[str, Tensor]:
        return {f"{STEM}{name}": parameter for name, parameter in self.named_parameters()}

    def part(self) -> Ladder:
        return assemble(self.file_tensors(), self._fields)


@dataclass(slots=True)
class _Climb:
    """One forward of a side network, over the adapter's rows of the batch."""

    ladder: Ladder
    rows: slice
    turn: tuple[Tensor, Tensor]
    attend: Attend
    recompute: bool
    side: Tensor
    done: int = 0
    """Rungs."""

    def step(self, layer: int, h: Tensor) -> None:
        rungs = self.ladder.rungs
        if self.done < len(rungs) and rungs[self.done].layer == layer:
            given = (self.side, h[self.rows].detach(), rungs[self.done], self.ladder, self.turn, self.attend)
            if self.recompute and torch.is_grad_enabled():
                self.side = checkpoint(climb, *given, use_reentrant=False)
            else:
                self.side = climb(*given)
            self.done += 1

    def end(self, states: Tensor) -> Tensor:
        new = finish(self.side, states[self.rows].detach(), self.ladder)
        if self.rows == slice(None):
            return new
        return torch.cat([states[: self.rows.start], new, states[self.rows.stop :]])


class LadderAdapter(AttachedAdapter):
    """Nothing at the base's places: it watches the layers, and changes what the decoder gives to the head."""

    def __init__(self, model: Any, network: SideNetwork, fields: Mapping[str, object], layers: Sequence[str]) -> None:
        """layers: paths of the base's."""
        self._network = network
        self._layers = [model.get_submodule(path) for path in layers]
        self._ends = decoders(model)
        self._hooks: list[RemovableHandle] = []
        self._running: _Climb | None = None
        self._positions: Tensor | None = None
        self._mask: Tensor | None = None
        self._recompute = False
        super().__init__("ladder", model, {}, fields, {"ladder": network})

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {f"{STEM}{name}": parameter for name, parameter in self._network.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self._network.file_tensors().items()}

    def sites(self) -> Mapping[str, int]:
        """By rung, and what stands before and after them."""
        counts: dict[str, int] = {}
        for name, parameter in self._network.named_parameters():
            first, *rest = name.split(".")
            place = f"ladder.{first}.{rest[0]}" if first == "rungs" else f"ladder.{first}"
            counts[place] = counts.get(place, 0) + parameter.numel()
        return counts

    def checkpoint_activations(self) -> bool:
        """The base keeps no activations for it: what is recomputed is the side network."""
        self._recompute = True
        return True

    def installed(self) -> None:
        self._hooks.append(self._model.register_forward_pre_hook(self._take, with_kwargs=True))
        self._hooks.append(self._layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks += [layer.register_forward_hook(self._after(i)) for i, layer in enumerate(self._layers)]
        self._hooks += [end.register_forward_hook(self._end) for end in self._ends]

    def removed(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _take(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What says which tokens see each other. Rows beside other adapters' are whole, filled up on the right."""
        self._positions = self._mask = self._running = None
        if Host.of(self._model).rows_of(self.key) == slice(None):
            if kwargs.get("past_key_values") is not None:
                raise ValueError("a model with a ladder attached takes whole sequences, without past_key_values")
            self._positions, self._mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
            if self._mask is not None and self._mask.dim() != 2:
                raise ValueError(f"expected an attention mask [B, T] with a ladder, got {tuple(self._mask.shape)}")

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h, rows = stream_in(args, kwargs), Host.of(self._model).rows_of(self.key)
        if h is None or rows is None:
            return
        ladder = self._network.part()
        positions = self._positions
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)
        seen = visible(self._positions, self._mask)
        attend: Attend = causal if seen is None else lambda q, k, v: causal(q, k, v, seen)
        side = start(h[rows].detach(), ladder)
        self._running = _Climb(ladder, rows, rotation(positions, ladder), attend, self._recompute, side)

    def _after(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def watch(_module: nn.Module, _args: Any, output: Any) -> None:
            h = stream_out(output)
            if self._running is not None and h is not None:
                self._running.step(layer, h)

        return watch

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Of nested decoders the inner one comes first. Layers that are recomputed later find nothing running."""
        running, self._running = self._running, None
        if running is None:
            return output
        states = running.end(output[0])
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output


def _attach(model: Any, config: LadderConfig, context: AttachContext) -> AttachedAdapter:
    base = TorchBase(model)
    layers = base.stream_layers
    if not layers:
        raise OptionError("method", "ladder needs decoder layers that each read what the one before gives")
    numbers = sorted(set(range(len(layers)) if config.layers is None else config.layers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= len(layers):
        raise OptionError("layers", f"expected numbers below {len(layers)}, got {config.layers}")
    width = max(base.hidden_size // config.reduction_factor, min(_NARROWEST, base.hidden_size))
    heads = -(-width // _HEAD_DIM)
    fields: dict[str, Any] = {
        "peft_type": "LADDER",
        "reduction_factor": config.reduction_factor,
        "layers": numbers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "temperature": config.temperature,
        "merge": config.merge,
    }
    tensors = _initial(base.hidden_size, base.state_width, width, fields, context.seed, model.device)
    return LadderAdapter(model, SideNetwork(tensors, fields), fields, layers)


def _initial(
    stream: int, final: int, width: int, fields: Mapping[str, Any], seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Uniform with the variance 1 / (3 in), as torch's linear layers.

    With merge "add" and "gate" the way up is zero, so that a run starts from the base, or nearly. What the head reads
    of the base must then be unlearned: "replace", the paper's form, learns new tasks several times faster.
    """
    generator = torch.Generator().manual_seed(seed)
    queries = 2 * -(-width // (2 * fields["num_attention_heads"])) * fields["num_attention_heads"]
    inner = -(-8 * width // 3)

    def linear(out: int, inside: int) -> Tensor:
        return uniform((out, inside), inside**-0.5, generator, device).detach()

    tensors = {"first.weight": linear(width, stream)}
    for layer in fields["layers"]:
        rung, block = f"rungs.{layer}.", f"rungs.{layer}.block."
        tensors[f"{rung}down.weight"] = linear(width, stream)
        tensors[f"{rung}gate"] = torch.zeros(1, device=device)
        tensors[f"{block}input_layernorm.weight"] = torch.ones(width, device=device)
        for name in "qkv":
            tensors[f"{block}self_attn.{name}_proj.weight"] = linear(queries, width)
        tensors[f"{block}self_attn.o_proj.weight"] = linear(width, queries)
        tensors[f"{block}post_attention_layernorm.weight"] = torch.ones(width, device=device)
        tensors[f"{block}mlp.gate_proj.weight"] = linear(inner, width)
        tensors[f"{block}mlp.up_proj.weight"] = linear(inner, width)
        tensors[f"{block}mlp.down_proj.weight"] = linear(width, inner)
    tensors["norm.weight"] = torch.ones(width, device=device)
    up = linear(final, width)
    tensors["up.weight"] = up if fields["merge"] == "replace" else torch.zeros_like(up)
    if fields["merge"] == "gate":
        tensors["merge_gate"] = torch.full((1,), _CLOSED, device=device)
    return tensors


LADDER = Method(
    name="ladder",
    summary="a narrow transformer beside the base, trained without backward through it",
    config_class=LadderConfig,
    attach=_attach,
    learning_rate=lambda hidden_size: 1e-2 * (max(hidden_size / 8, _NARROWEST) / _NARROWEST) ** -0.5,
)
