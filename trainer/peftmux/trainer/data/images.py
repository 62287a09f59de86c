"""The images of rows: a list of file paths, data URLs, base64 texts or bytes in the column `images`."""

from __future__ import annotations

import base64
import binascii
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peftmux.adapters.images import (
    MARKER,
    MAX_IMAGES,
    ImageInvalid,
    ImageRule,
    check_image,
    cut_patches,
    decode_image,
)
from peftmux.trainer.errors import DataError

COLUMN = "images"
_KEPT = 256 << 20
"""Bytes of patches that a store holds on to."""


@dataclass(frozen=True, slots=True)
class RowImage:
    """An image file, or its bytes, and the row that has it."""

    file: Path | bytes
    data: Path
    line: int
    index: int

    def check(self) -> None:
        """Reads the file's beginning. Raises DataError."""
        try:
            check_image(self.file)
        except ImageInvalid as error:
            raise self._error(error) from None

    def patches(self, rule: ImageRule) -> Tensor:
        """[N, 3 * p * p]. Raises DataError."""
        try:
            return cut_patches(decode_image(self.file, rule), rule.patch_size)[2]
        except ImageInvalid as error:
            raise self._error(error) from None

    def _error(self, error: ImageInvalid) -> DataError:
        where = f"images[{self.index}]" if isinstance(self.file, bytes) else f"images[{self.index}] ({self.file})"
        return DataError(self.data, self.line, f"{where}: {error}")


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image that stands before token `at` of a row's own tokens."""

    at: int
    image: RowImage


class ImageStore:
    """The images of a run by number, decoded when they are asked for."""

    def __init__(self, rule: ImageRule) -> None:
        self._rule = rule
        self._images: list[RowImage] = []
        self._decoded: OrderedDict[int, Tensor] = OrderedDict()
        self._held = 0

    def add(self, image: RowImage) -> int:
        """Its number."""
        self._images.append(image)
        return len(self._images) - 1

    def patches(self, number: int) -> Tensor:
        """[N, 3 * p * p] float32 on the CPU; the last ones asked for are kept. Raises DataError."""
        found = self._decoded.pop(number, None)
        if found is None:
            found = self._images[number].patches(self._rule)
            self._held += found.nbytes
        self._decoded[number] = found
        while self._held > _KEPT and len(self._decoded) > 1:
            self._held -= self._decoded.popitem(last=False)[1].nbytes
        return found


def row_images(path: Path, line: int, record: Mapping[str, object]) -> tuple[RowImage, ...] | None:
    """What the record has in its column `images`, each seen to be an image; None without the column.

    Paths are relative to the data file's folder. Raises DataError.
    """
    given = record.get(COLUMN)
    if given is None:
        return None
    if not isinstance(given, list) or len(given) > MAX_IMAGES:
        found = f"{len(given)} of them" if isinstance(given, list) else type(given).__name__
        raise DataError(path, line, f"column {COLUMN!r}: expected a list of at most {MAX_IMAGES} images, found {found}")
    images = tuple(RowImage(_file(path, line, i, item), path, line, i) for i, item in enumerate(given))
    for image in images:
        image.check()
    return images


def _file(path: Path, line: int, index: int, item: object) -> Path | bytes:
    """A Parquet file of the Hub's has {"bytes", "path"}."""
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes) and item:
        return item
    if isinstance(item, str) and item:
        if item.startswith("data:"):
            return _decoded(path, line, index, item.partition(",")[2])
        if len(item) < 4096 and (file := path.parent / item).is_file():
            return file
        return _decoded(path, line, index, item)
    raise DataError(path, line, f"{COLUMN}[{index}]: expected a file's path or base64, found {type(item).__name__}")


def _decoded(path: Path, line: int, index: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        shown = text if len(text) < 80 else f"{text[:80]}..."
        message = f"{COLUMN}[{index}]: expected a file that exists, or base64; found {shown!r}"
        raise DataError(path, line, message) from None


def split_at_images(texts: list[str], images: int, path: str | Path, line: int) -> list[list[str]]:
    """Of each text its pieces between the markers. Raises DataError where there are not as many as images."""
    pieces = [text.split(MARKER) for text in texts]
    markers = sum(len(p) - 1 for p in pieces)
    if markers and markers != images:
        raise DataError(path, line, f"expected as many images as the row has {MARKER!r} ({markers}), found {images}")
    return pieces


def stacked(store: ImageStore, numbers: Tensor) -> Tensor:
    """[n, N, 3 * p * p] of these images, on the numbers' device."""
    return torch.stack([store.patches(int(i)) for i in numbers.tolist()]).to(numbers.device)
