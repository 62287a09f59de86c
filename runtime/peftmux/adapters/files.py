"""A PEFT adapter folder, read: `adapter_config.json` and `adapter_model.safetensors`. Nothing in it is trusted."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from peftmux.adapters.digest import adapter_digest
from peftmux.adapters.errors import AdapterInvalid, Reason, SourceForbidden, SourceNotFound
from peftmux.adapters.tensorfile import TensorIndex, TensorInfo, count_containers, read_index, read_tensors

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CHECKPOINT_FILE = "adapter_state.safetensors"
"""What a training run keeps of an adapter in its checkpoints: no adapter yet."""
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 16
MAX_CONFIG_CONTAINERS = 16_384
MAX_TENSOR_BYTES = 16 << 30

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MAX_LISTED = 4096


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter in memory: its config as parsed, its tensors in their stored dtype on the CPU, its identity."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    digest: str


@dataclass(frozen=True, slots=True)
class OpenFile:
    path: Path
    fd: int
    signature: tuple[int, ...]

    def check_unchanged(self) -> None:
        try:
            now = [_signature(os.fstat(self.fd)), _signature(os.stat(self.path))]
        except OSError:
            now = []
        if now != [self.signature] * 2:
            raise AdapterInvalid(Reason.CHANGED_WHILE_LOADING, f"{self.path.name} changed while it was being read")


@dataclass(frozen=True, slots=True)
class _Member:
    """One pair of files, and what stands before its tensors' names."""

    prefix: str
    index: TensorIndex
    config_file: OpenFile
    tensor_file: OpenFile


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    """A folder whose configs and tensor headers are read and checked, and whose tensors are not read yet."""

    config: Mapping[str, Any]
    members: tuple[_Member, ...]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {m.prefix + name: info for m in self.members for name, info in m.index.tensors.items()}

    def read(self) -> AdapterFiles:
        """Read the tensors. Raises AdapterInvalid(CHANGED_WHILE_LOADING) if a file was touched since opening."""
        tensors: dict[str, Tensor] = {}
        for member in self.members:
            read = read_tensors(member.tensor_file.fd, member.index)
            tensors |= {member.prefix + name: tensor for name, tensor in read.items()}
        for member in self.members:
            member.config_file.check_unchanged()
            member.tensor_file.check_unchanged()
        return AdapterFiles(self.config, tensors, adapter_digest(self.config, tensors))


class FolderReader:
    """Opens files of one adapter's folder, each below `inside` after symbolic links, until `stack` closes them."""

    def __init__(self, stack: ExitStack, folder: Path, inside: Path, max_bytes: int) -> None:
        self._stack = stack
        self._folder = folder
        self._inside = inside
        self._max_bytes = max_bytes

    def has(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def config(self, name: str) -> tuple[OpenFile, dict[str, Any]]:
        file = _open(self._stack, self._folder, name, self._inside)
        return file, parse_config(_read_all(file, name), name)

    def member(self, prefix: str, config_file: OpenFile, tensor_name: str) -> _Member:
        tensor_file = _open(self._stack, self._folder, tensor_name, self._inside)
        size = tensor_file.signature[2]
        if size > self._max_bytes:
            raise AdapterInvalid(
                Reason.TOO_LARGE, f"{tensor_name}: expected at most {self._max_bytes} bytes, got {size}"
            )
        return _Member(prefix, read_index(tensor_file.fd, size, tensor_name), config_file, tensor_file)


def read_adapter(folder: str | Path, *, root: str | Path | None = None) -> AdapterFiles:
    """Read a whole adapter folder. Arguments and errors as `open_adapter`."""
    with open_adapter(folder, root=root) as adapter:
        return adapter.read()


@contextmanager
def open_adapter(
    folder: str | Path, *, root: str | Path | None = None, max_bytes: int = MAX_TENSOR_BYTES
) -> Iterator[OpenAdapter]:
    """Open a folder and check all that can be checked without reading its tensors.

    After symbolic links both files must lie under `root` (the folder itself by default); `max_bytes` bounds the tensor
    file. Raises SourceNotFound, SourceForbidden, AdapterInvalid.
    """
    from peftmux.adapters import hub

    real = Path(os.path.realpath(folder))
    if not real.is_dir():
        raise SourceNotFound(f"no adapter folder {Path(folder).name!r}")
    inside = Path(os.path.realpath(root)) if root is not None else real
    with ExitStack() as stack:
        reader = FolderReader(stack, real, inside, max_bytes)
        if (fusion := hub.find_fusion(reader)) is not None:
            yield hub.open_fusion(reader, fusion)
            return
        config_file, config = reader.config(CONFIG_FILE)
        if hub.is_hub_config(config):
            yield hub.open_single(reader, config_file, config)
        else:
            yield OpenAdapter(config, (reader.member("", config_file, TENSOR_FILE),))


def parse_config(raw: bytes, file: str = CONFIG_FILE) -> dict[str, Any]:
    """The fields of a config. `file` is for messages. Raises AdapterInvalid(MALFORMED_CONFIG)."""
    if count_containers(raw) > MAX_CONFIG_CONTAINERS:
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{file}: expected at most {MAX_CONFIG_CONTAINERS} brackets")
    try:
        config = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{file} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        got = type(config).__name__
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{file}: expected an object, got {got}")
    if _deeper_than(config, MAX_CONFIG_DEPTH):
        raise AdapterInvalid(Reason.MALFORMED_CONFIG, f"{file}: expected at most {MAX_CONFIG_DEPTH} levels")
    return config


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects nest deeper, told level by level: nothing after this may recurse without bound."""
    level = [value]
    for _ in range(levels):
        containers = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [inner for container in containers for inner in container]
    return bool(level)


def _open(stack: ExitStack, folder: Path, name: str, inside: Path) -> OpenFile:
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(inside):
        raise SourceForbidden(f"{name} is a link that leaves the adapter's folder")
    try:  # O_NONBLOCK: opening a named pipe must not wait for its writer
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        _refuse_missing(folder, name)
    except OSError as error:
        raise AdapterInvalid(Reason.MISSING_FILE, f"{name}: expected a readable file, got: {error.strerror}") from None
    stack.callback(os.close, fd)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise AdapterInvalid(Reason.MISSING_FILE, f"{name}: expected a regular file")
    return OpenFile(path, fd, _signature(status))


def _refuse_missing(folder: Path, name: str) -> NoReturn:
    """Say what is there instead, where that helps: a pickle, or AdapterHub's files."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, _MAX_LISTED))
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if name.endswith(".safetensors") and pickles:
        raise AdapterInvalid(
            Reason.PICKLE,
            f"expected {name}, got {pickles[0]}: pickles are never opened here because they can run code; "
            "convert the folder offline with `peftmux adapters convert`",
        )
    raise AdapterInvalid(Reason.MISSING_FILE, f"expected {name}, got {', '.join(names[:8]) or 'an empty folder'}")


def _read_all(file: OpenFile, name: str) -> bytes:
    if file.signature[2] > MAX_CONFIG_BYTES:
        raise AdapterInvalid(
            Reason.TOO_LARGE, f"{name}: expected at most {MAX_CONFIG_BYTES} bytes, got {file.signature[2]}"
        )
    return os.pread(file.fd, MAX_CONFIG_BYTES, 0)


def _signature(status: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size and times: unchanged means the same file with the same content."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
