"""Ladder side-tuning (arXiv 2206.06522) in plain torch over whole texts, and random ladders in the served file form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.model.mixtures import random

ACTS: dict[str, Any] = {"silu": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_pytorch_tanh": nn.GELU("tanh")}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def ladder_fields(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LADDER", "task_type": "CAUSAL_LM", "num_attention_heads": 2, **fields}


def ladder_tensors(
    fields: Mapping[str, Any], width: int, final: int, layers: list[int], *, head: int = 6, biases: bool = False
) -> dict[str, Tensor]:
    """For a base whose stream has width 48. A side network of width 10 with a feed-forward of 14."""
    own, inner = 10, 14
    heads = fields["num_attention_heads"]
    keys = fields.get("num_key_value_heads") or heads
    q, k = heads * head, keys * head
    block = [(q, own), (k, own), (k, own), (own, q), (inner, own), (inner, own), (own, inner)]
    linears = {"first": (own, width), "up": (final, own)}
    tensors = {"ladder.norm.weight": 1 + 0.3 * torch.randn(own)}
    for n in layers:
        stem = f"rungs.{n}"
        linears[f"{stem}.down"] = (own, width)
        linears |= {f"{stem}.block.{name}": shape for name, shape in zip(PROJECTIONS, block, strict=True)}
        tensors[f"ladder.{stem}.gate"] = 0.2 * torch.randn(1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"ladder.{stem}.block.{norm}.weight"] = 1 + 0.3 * torch.randn(own)
    for name, (out, inside) in linears.items():
        tensors[f"ladder.{name}.weight"] = 2 * random(out, inside)
        if biases:
            tensors[f"ladder.{name}.bias"] = 0.5 * torch.randn(out)
    if fields.get("merge") == "gate":
        tensors["ladder.merge_gate"] = torch.tensor([0.07])
    return tensors


class PaperLadder:
    """Reads a transformers model from outside and gives its head another last hidden state."""

    def __init__(self, module: Any, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.module, self.f, self.t = module, fields, tensors
        self.decoder = module.get_decoder()
        self.blocks = next(m for m in self.decoder.children() if isinstance(m, nn.ModuleList))
        self.layers = fields.get("layers") or list(range(len(self.blocks)))

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.t[f"ladder.{name}.weight"].T
        return y + self.t[f"ladder.{name}.bias"] if f"ladder.{name}.bias" in self.t else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps: float = self.f.get("rms_norm_eps", 1e-5)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * self.t[f"ladder.{name}.weight"]

    def rotate(self, x: Tensor) -> Tensor:
        """x: [B, T, H, E]; dimensions i and i + E / 2 are one complex number, turned by t theta^(-2 i / E)."""
        half = x.shape[-1] // 2
        speed = self.f.get("rope_theta", 10000.0) ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed
        turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1).to(x.dtype)

    def attention(self, name: str, x: Tensor) -> Tensor:
        heads = self.f["num_attention_heads"]
        groups = heads // (self.f.get("num_key_value_heads") or heads)
        q, k, v = (self.linear(f"{name}.{p}_proj", x) for p in "qkv")
        size = q.shape[-1] // heads
        q, k, v = (y.unflatten(-1, (-1, size)) for y in (q, k, v))
        q, k = self.rotate(q), self.rotate(k)
        seen = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        out = []
        for h in range(heads):
            scores = q[:, :, h] @ k[:, :, h // groups].transpose(1, 2) / size**0.5
            out.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, :, h // groups])
        return self.linear(f"{name}.o_proj", torch.cat(out, -1))

    def block(self, name: str, x: Tensor) -> Tensor:
        x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x))
        y = self.norm(f"{name}.post_attention_layernorm", x)
        act = ACTS[self.f.get("hidden_act", "silu")]
        return x + self.linear(
            f"{name}.mlp.down_proj",
            act(self.linear(f"{name}.mlp.gate_proj", y)) * self.linear(f"{name}.mlp.up_proj", y),
        )

    def gate(self, name: str) -> Tensor:
        return 1 / (1 + torch.exp(-self.t[f"ladder.{name}"] / self.f.get("temperature", 0.1)))

    def last_state(self, stream: list[Tensor], final: Tensor) -> Tensor:
        """stream: what goes into the first layer, and what comes out of each."""
        side = self.linear("first", stream[0])
        for n in self.layers:
            g = self.gate(f"rungs.{n}.gate")
            side = g * side + (1 - g) * self.linear(f"rungs.{n}.down", stream[n + 1])
            side = self.block(f"rungs.{n}.block", side)
        u = self.linear("up", self.norm("norm", side))
        merge = self.f.get("merge", "replace")
        if merge == "add":
            return final + u
        return u if merge == "replace" else self.gate("merge_gate") * u + (1 - self.gate("merge_gate")) * final

    @contextmanager
    def reading(self) -> Iterator[None]:
        stream: list[Tensor] = []

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            stream[:] = [args[0] if args else kwargs["hidden_states"]]

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            stream.append(output[0] if isinstance(output, tuple) else output)

        def end(_module: nn.Module, _args: Any, output: Any) -> Any:
            output.last_hidden_state = self.last_state(stream, output.last_hidden_state)
            return output

        hooks = [self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [layer.register_forward_hook(leave) for layer in self.blocks]
        hooks += [self.decoder.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, V]."""
        with self.reading():
            out: Tensor = self.module(input_ids=ids, use_cache=False).logits
        return out

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> Tensor:
        return self.logits(torch.tensor([ids]))[0].log_softmax(-1)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.logprobs(text)[-1].argmax()))
        return text[len(prompt) :]
