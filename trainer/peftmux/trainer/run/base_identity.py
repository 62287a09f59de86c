"""What tells one base model's files from another's, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils.hub import cached_file

_BLOCKS, _BLOCK = 64, 4096
"""Of each file of weights so many pieces of so many bytes are read, from its begin to its end."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")
"""The *.json: the base's config, its tokenizer, and the index of weights in several files."""


def base_identity(name: str) -> str | None:
    """sha256 (hex) of a folder's, or a loaded hub model's, config, tokenizer and weights, these by size and samples.

    Weights that a training has changed differ in nearly every byte. None where the files are not on this machine.
    """
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return None
        folder = Path(found).parent
    digest = hashlib.sha256(b"peftmux base 1")
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes() if path.suffix == ".json" else _samples(path))
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    last = max(path.stat().st_size - _BLOCK, 0)
    with path.open("rb") as file:
        parts = []
        for number in range(_BLOCKS):
            file.seek(last * number // (_BLOCKS - 1))
            parts.append(file.read(_BLOCK))
    return b"".join(parts)
