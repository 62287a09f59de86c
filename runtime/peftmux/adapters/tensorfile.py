"""The safetensors container, read without trust: header first, then only the bytes the header rightly describes.

Read with pread rather than mapped, so that a file cut short while it is being loaded is an error and not a SIGBUS.
Format: header length (u64, little-endian), JSON header {name: {dtype, shape, data_offsets}}, data without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from peftmux.adapters.errors import AdapterInvalid, Reason

MAX_HEADER_BYTES = 2 << 20
MAX_TENSORS = 16_384
"""A DoRA over every linear layer of an 80-layer model has 1,680."""
MAX_DIMENSIONS = 8
MAX_NAME = 512

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDICES = {"I32": torch.int32, "I64": torch.int64}
"""Of tensors whose names end with _indices, and of no others."""
_READ_BYTES = 64 << 20
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""torch.save's zip file, and a bare pickle. With what follows them both are a header length far over the limit, which
these two bytes alone are not: a header of 640 bytes begins like a pickle."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor. Offsets are bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """A checked header: the tensors lie in order, without holes, and end where the file ends."""

    tensors: Mapping[str, TensorInfo]
    data_start: int


class _Malformed(Exception):
    """Says what is wrong, not with which file."""


def read_index(fd: int, file_bytes: int, file: str) -> TensorIndex:
    """Read and check the header of the open file `file` of `file_bytes` bytes. Raises AdapterInvalid."""
    try:
        return _read_index(fd, file_bytes, file)
    except _Malformed as error:
        raise AdapterInvalid(Reason.MALFORMED_TENSORS, f"{file}: {error}") from None


def _read_index(fd: int, file_bytes: int, file: str) -> TensorIndex:
    if file_bytes < 8:
        raise _Malformed(f"expected at least 8 bytes, got {file_bytes}")
    start = _pread(fd, 8, 0)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES and start.startswith(_PICKLE_STARTS):
        raise AdapterInvalid(
            Reason.PICKLE,
            f"{file}: expected safetensors, got a pickle: convert the folder offline with `peftmux adapters convert`",
        )
    if length > file_bytes - 8:
        raise _Malformed(f"the header claims {length} bytes, but only {file_bytes - 8} follow")
    if length > MAX_HEADER_BYTES:
        raise _Malformed(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
    return TensorIndex(_parse_header(_pread(fd, length, 8), file_bytes - 8 - length), 8 + length)


def _parse_header(raw: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors that the JSON header names; they must cover exactly `data_bytes` bytes."""
    if count_containers(raw) > 3 * MAX_TENSORS:
        raise _Malformed(f"expected at most {MAX_TENSORS} tensors, with three brackets each")
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _Malformed(f"expected the header to be an object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    infos = {name: _info(name, entry) for name, entry in header.items()}
    position = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise _Malformed(f"tensor {name!r} should begin at byte {position} of the data, but begins at {info.begin}")
        position = info.end
    if position != data_bytes:
        raise _Malformed(f"the header describes {position} bytes of data, the file has {data_bytes}")
    return infos


def count_containers(raw: bytes) -> int:
    """An upper bound on the lists and objects in JSON, which cost a parser 30 times their two bytes."""
    return raw.count(b"[") + raw.count(b"{")


def read_tensors(fd: int, index: TensorIndex) -> dict[str, Tensor]:
    """Every tensor of the file, in its stored dtype, on the CPU."""
    return {name: _read_tensor(fd, index.data_start, info) for name, info in index.tensors.items()}


def _read_tensor(fd: int, data_start: int, info: TensorInfo) -> Tensor:
    tensor = torch.empty(info.shape, dtype=info.dtype)
    if not tensor.numel():
        return tensor
    view = byte_view(tensor)
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _READ_BYTES]], data_start + info.begin + done)
        if not got:
            raise AdapterInvalid(Reason.CHANGED_WHILE_LOADING, "the tensor file became shorter while it was being read")
        done += got
    return tensor


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _info(name: str, entry: Any) -> TensorInfo:
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise _Malformed(f"expected printable tensor names of 1 to {MAX_NAME} characters, got {name[:40]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"tensor {name!r}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = _INDICES if name.endswith("_indices") else _DTYPES
    if not isinstance(dtype, str) or dtype not in known:
        raise AdapterInvalid(
            Reason.UNSUPPORTED_DTYPE, f"tensor {name!r}: expected dtype {', '.join(known)}, got {dtype!r:.40}"
        )
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Malformed(f"tensor {name!r}: expected a shape of at most {MAX_DIMENSIONS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _Malformed(f"tensor {name!r}: expected two data offsets")
    expected, span = prod(shape) * known[dtype].itemsize, offsets[1] - offsets[0]
    if span != expected:
        raise _Malformed(f"tensor {name!r}: its shape and dtype need {expected} bytes, its offsets span {span}")
    return TensorInfo(known[dtype], tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _pread(fd: int, size: int, offset: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise _Malformed(f"expected {size} bytes at {offset}, got {len(data)}")
    return data
