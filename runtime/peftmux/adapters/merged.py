"""A checkpoint with an adapter merged in, as transformers loads it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from peftmux.adapters.aside import check_new, folder_aside
from peftmux.adapters.checkpoint import load_checkpoint, load_tokenizer
from peftmux.adapters.errors import AdapterInvalid, Reason
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.merge import merge
from peftmux.adapters.parts import LoweredAdapter
from peftmux.adapters.torch_base import TorchBase


def merge_checkpoint(source: str | Path, model: str, out: str | Path, dtype: str = "auto") -> LoweredAdapter:
    """Write the base `model` (a folder or a hub id) with the adapter in `source` merged in to the new folder `out`.

    dtype: of the weights written; "auto" as the base stores them. `out` appears in one rename, with the tokenizer
    where the base has one. Raises AdapterInvalid, SourceNotFound, and what `load_checkpoint` raises.
    """
    out = Path(out)
    check_new(out)
    module = load_checkpoint(model, dtype=dtype)
    if getattr(module.config, "quantization_config", None) is not None:
        raise AdapterInvalid(Reason.NOT_MERGEABLE, f"expected a base with plain weights, {model} is quantised")
    base = TorchBase(module)
    adapter = load_adapter(source, base)
    merge(base, adapter)
    _save(module, model, out, _card(model, adapter))
    return adapter


def _save(module: Any, model: str, out: Path, card: str) -> None:
    with folder_aside(out) as aside:
        module.save_pretrained(aside)
        with suppress(OSError, ValueError):  # a base without a tokenizer is served by token ids
            load_tokenizer(model).save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
        os.rename(aside, out)


def _card(model: str, adapter: LoweredAdapter) -> str:
    front = yaml.safe_dump({"base_model": model, "library_name": "transformers", "tags": ["peftmux", adapter.kind]})
    title = f"# {Path(model).name} with a {adapter.kind} adapter merged in"
    return f"---\n{front}---\n\n{title}\n\nThe adapter's revision: `{adapter.digest}`.\n"
