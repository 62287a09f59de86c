"""Known pickles to safetensors, offline. A server never opens a pickle; who converts one trusts where it is from."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from peftmux.adapters.aside import check_new
from peftmux.adapters.convert_hub import ADAPTER as HUB_PICKLE
from peftmux.adapters.convert_hub import gather_hub
from peftmux.adapters.convert_xlora import gather_xlora
from peftmux.adapters.errors import AdapterInvalid, Reason, SourceNotFound
from peftmux.adapters.files import CONFIG_FILE, parse_config, read_adapter
from peftmux.adapters.writer import write_adapter, write_files

PICKLE_FILE = "adapter_model.bin"


def convert_adapter(source: str | Path, destination: str | Path) -> str:
    """Write PEFT's two files of a folder whose tensors are in adapter_model.bin; returns the content's digest.

    AdapterHub's folder keeps its own files (`convert_hub`), and an X-LoRA folder is gathered from its pieces instead
    (`convert_xlora`). The pickle is opened by torch's restricted loader, which builds tensors and plain containers
    only. Raises SourceNotFound, and AdapterInvalid where the folder is not such an adapter or the pickle holds anything
    else.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_dir():
        raise SourceNotFound(f"no adapter folder {str(source)!r}")
    if (source / HUB_PICKLE).is_file():
        check_new(destination)
        write_files(destination, gather_hub(source, _tensors))
        return read_adapter(destination).digest
    xlora = _is_xlora(source)
    for name in (CONFIG_FILE, *(() if xlora else (PICKLE_FILE,))):
        if not (source / name).is_file():
            raise AdapterInvalid(Reason.MISSING_FILE, f"expected {CONFIG_FILE} and {PICKLE_FILE}, found no {name}")
    check_new(destination)
    config = parse_config((source / CONFIG_FILE).read_bytes())
    if xlora:
        return write_adapter(destination, *gather_xlora(source, config))
    return write_adapter(destination, config, _tensors(source / PICKLE_FILE))


def _is_xlora(folder: Path) -> bool:
    config = folder / CONFIG_FILE
    return config.is_file() and parse_config(config.read_bytes()).get("peft_type") == "XLORA"


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AdapterInvalid(
            Reason.MALFORMED_TENSORS, f"{path.name}: expected a pickle of tensors, got: {reason}"
        ) from error
    if not isinstance(content, dict) or not content:
        raise AdapterInvalid(
            Reason.MALFORMED_TENSORS, f"{path.name}: expected tensors by name, got {type(content).__name__}"
        )
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise AdapterInvalid(Reason.MALFORMED_TENSORS, f"{path.name}: expected tensors by name, got {name!r}")
    return content
