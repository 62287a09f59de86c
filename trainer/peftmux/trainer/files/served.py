"""Whether a server will take what a run is going to write, told before its first step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from peftmux.adapters.errors import AdapterError
from peftmux.adapters.files import open_adapter, parse_config
from peftmux.adapters.lower import plan_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.adapters.writer import write_files
from peftmux.trainer.errors import OptionError
from peftmux.trainer.files.export import adapter_config
from peftmux.trainer.host.host import Host
from peftmux.trainer.methods import AttachedAdapter


def check_served(adapter: AttachedAdapter, base_model: str, model: Any) -> None:
    """Fields, and tensors' names and shapes, by the code that loads an adapter. Raises OptionError with its words.

    Nothing of a method that has no files before its training has ended.
    """
    if not adapter.has_files:
        return
    files = adapter.folder(base_model)
    try:
        with Host.of(model).aside():
            if files is None:
                shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
                plan_adapter(_as_read(adapter_config(adapter, base_model)), shapes, TorchBase(model))
            else:
                _check_folder(files, model)
    except AdapterError as error:
        raise OptionError("method", f"a server would refuse this {adapter.kind} adapter: {error}") from None


def _check_folder(files: Mapping[str, bytes], model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder, files)
        with open_adapter(folder) as found:
            plan_adapter(found.config, {name: info.shape for name, info in found.tensors.items()}, TorchBase(model))


def _as_read(config: Mapping[str, object]) -> dict[str, Any]:
    return parse_config(json.dumps(config).encode())
