"""How AdapterHub's library attaches to a model: by classes of its own for a few, by hooks that a file describes else.

`adapter_interface.json`, saved beside an adapter of the second sort, names the layers (`layer_intermediate_proj`, ...)
and where a hook reads the residual stream (`layer_pre_self_attn`, `layer_pre_ffn`). Without it: as in its own classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftmux.adapters.base import BaseModel, ResidualBranch
from peftmux.adapters.config import show
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.hub_fields import INTERFACE

_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "c_attn": "qkv",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    **dict.fromkeys(("up_proj", "mlp.c_fc", "fc_in", "fc1", "dense_h_to_4h"), "i"),
    **dict.fromkeys(("down_proj", "mlp.c_proj", "fc_out", "fc2", "dense_4h_to_h"), "o"),
}
_CROSSED = ("LlamaFor", "MistralFor")
"""The classes in which the library calls down_proj intermediate and up_proj output."""
_OF_LAYER = {
    "q": ("layer_self_attn", "attn_q_proj"),
    "k": ("layer_self_attn", "attn_k_proj"),
    "v": ("layer_self_attn", "attn_v_proj"),
    "qkv": ("layer_self_attn", "attn_qkv_proj"),
    "i": ("layer_intermediate_proj",),
    "o": ("layer_output_proj",),
}
_HOOKS = {"attention": ("layer_pre_self_attn", "layer_ln_1"), "feed_forward": ("layer_pre_ffn", "layer_ln_2")}
"""By the branch's role: where the stream is read, and the norm of the branch's output."""


@dataclass(frozen=True, slots=True)
class Interface:
    """table: role letters by the path below a block, whole or its end. hooks: None for the library's own classes."""

    table: Mapping[str, str]
    hooks: Mapping[str, Any] | None = None

    def roles(self, path: str) -> str:
        """The letters of a layer ("qkv" for a fused one, "i" intermediate, "o" output); "" for one without."""
        return next((r for end, r in self.table.items() if path == end or path.endswith(f".{end}")), "")

    def check_branches(self, branches: Iterable[ResidualBranch], reads: str, after: bool) -> None:
        """Raises AdapterInvalid where hooked bottlenecks compute anything else than the library's own classes.

        reads: as `Bottleneck.reads`; after: the field original_ln_after.
        """
        if self.hooks is None:
            return
        if not after:
            raise AdapterInvalid(Reason.UNSUPPORTED_FIELD, f"field original_ln_after: expected true beside {INTERFACE}")
        for branch in branches:
            stream, norm = _HOOKS[branch.role]
            if self.hooks.get(norm) is not None:
                _refuse(norm, "null", self.hooks[norm])
            own = branch.norm.rsplit(".", 1)[-1]
            if reads != "branch" and self.hooks.get(stream) != own:
                _refuse(stream, f"{own!r}, which reads the residual stream", self.hooks.get(stream))


def read_interface(config: Any, base: BaseModel) -> Interface:
    """config: of the file, None where there is none. Raises AdapterInvalid."""
    if config is None:
        table = dict(_ROLES)
        if base.architecture.startswith(_CROSSED):
            table |= {"down_proj": "i", "up_proj": "o"}
        return Interface(table)
    hooks = config.get("interface")
    if not isinstance(hooks, dict):
        _refuse("interface", "an object", hooks)
    table = {}
    for role, names in _OF_LAYER.items():
        found = [hooks.get(name) for name in names]
        for name, value in zip(names, found, strict=True):
            if value is not None and (not isinstance(value, str) or not value):
                _refuse(name, "a layer's name or null", value)
        if None not in found:
            table[".".join(found)] = role
    return Interface(table, hooks)


def _refuse(field: str, expected: str, got: Any) -> None:
    raise AdapterInvalid(
        Reason.UNSUPPORTED_FIELD, f"field {field} of {INTERFACE}: expected {expected}, got {show(got)}"
    )
