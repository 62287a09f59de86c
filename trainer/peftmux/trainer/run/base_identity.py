"""What tells one base model's files from another's, wherever they lie."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from transformers.utils.hub import cached_file

VERSION = "2"
"""Of what is hashed."""
_BLOCKS, _BLOCK = 64, 4096
"""Of each file of weights so many pieces of so many bytes are read, from its begin to its end."""
_ALWAYS = ("config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_VOCABULARIES = (("tokenizer.json",), ("vocab.*", "merges.txt", "*.model", "tekken.json"))
_WEIGHTS = (
    ("model.safetensors",),
    ("model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
)
"""Of each, transformers reads the first that is there."""


def base_identity(name: str) -> str | None:
    """VERSION:sha256 (hex) of a folder's, or a loaded hub model's, config, tokenizer and weights, these by samples.

    Weights that a training has changed differ in nearly every byte. Files that no model is made of change nothing: a
    hub model's folder gets more of them. None where the files are not on this machine.
    """
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return None
        folder = Path(found).parent
    files = sorted({*_found(folder, _ALWAYS), *_first(folder, _VOCABULARIES), *_first(folder, _WEIGHTS)})
    states = [path.stat() for path in files]
    return _digest(tuple(files), tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states))


def _first(folder: Path, kinds: tuple[tuple[str, ...], ...]) -> list[Path]:
    return next(filter(None, (_found(folder, patterns) for patterns in kinds)), [])


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in folder.resolve().glob(pattern)]


@lru_cache(maxsize=8)
def _digest(files: tuple[Path, ...], states: tuple[tuple[int, ...], ...]) -> str:
    """Made once for jobs of one base; the files' states say that they are still the same."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(_samples(path) if path.suffix in (".safetensors", ".bin") else path.read_bytes())
    return f"{VERSION}:{digest.hexdigest()}"


def _samples(path: Path) -> bytes:
    last = max(path.stat().st_size - _BLOCK, 0)
    with path.open("rb") as file:
        parts = []
        for number in range(_BLOCKS):
            file.seek(last * number // (_BLOCKS - 1))
            parts.append(file.read(_BLOCK))
    return b"".join(parts)
