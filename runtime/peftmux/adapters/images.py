"""Image files as an adapter that sees takes them: patches of fixed numbers, the same when serving and when training."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftmux.kernels.vision import VisionPart

MARKER = "<image>"
"""Where an image stands in a text, in the order of the images; without one they all stand in front."""
MAX_IMAGES = 64
"""Beside one text."""
MAX_SIDE = 8192
"""Pixels of an image file's longer side, before it is made smaller: the square around it is laid out whole."""
_WIDE = ("I", "F")
"""How Pillow's modes of more than 8 bits a channel begin. It would clip their values to 255."""


class ImageInvalid(ValueError):
    """The message says what was expected of the file, and what was found."""


@dataclass(frozen=True, slots=True)
class ImageRule:
    """What an adapter makes of images."""

    patch_size: int
    image_size: int
    """Height and width of what an image file becomes."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    both_ways: bool

    @classmethod
    def of(cls, part: VisionPart) -> ImageRule:
        return cls(part.patch_size, part.image_size, part.mean, part.std, part.bidirectional)


def check_image(file: Path | bytes) -> None:
    """Reads no more than a file's beginning. Raises ImageInvalid."""
    with _opened(file):
        pass


def decode_image(file: Path | bytes, rule: ImageRule) -> Tensor:
    """[3, S, S] float32: on a black square, made S wide by bicubic interpolation, then (value / 255 - mean) / std.

    Raises ImageInvalid.
    """
    with _opened(file) as opened:
        import PIL.Image

        try:
            picture = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise _not_an_image(error) from None
        width, height = picture.size
        side = max(width, height)
        square = PIL.Image.new("RGB", (side, side))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        small = square.resize((rule.image_size, rule.image_size), PIL.Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(rule.image_size, rule.image_size, 3)
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (rule.mean, rule.std))
    pixels = ((values.float() / 255 - mean) / std).permute(2, 0, 1)
    return pixels.contiguous()


def cut_patches(pixels: Tensor, patch_size: int) -> tuple[int, int, Tensor]:
    """pixels: [3, rows * p, columns * p] -> rows, columns, [rows * columns, 3 * p * p], each [channel, row, column]."""
    _, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.view(3, rows, patch_size, columns, patch_size).permute(1, 3, 0, 2, 4)
    return rows, columns, grid.reshape(rows * columns, -1)


def _opened(file: Path | bytes) -> Any:
    """A PIL image, to be closed. Raises ImageInvalid."""
    try:
        import PIL.Image
    except ImportError:
        raise ImageInvalid("expected patches: there is no Pillow here to decode images with") from None
    try:
        opened = PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except PIL.UnidentifiedImageError:
        raise ImageInvalid("expected an image file such as PNG or JPEG, got something else") from None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise _not_an_image(error) from None
    try:
        _check_form(*opened.size, opened.mode)
    except ImageInvalid:
        opened.close()
        raise
    return opened


def _check_form(width: int, height: int, mode: str) -> None:
    if max(width, height) > MAX_SIDE:
        raise ImageInvalid(f"expected at most {MAX_SIDE} pixels a side, got {width} x {height}")
    if mode.startswith(_WIDE):
        raise ImageInvalid(f"expected 8 bits a channel, got an image of more (mode {mode})")


def _not_an_image(error: Exception) -> ImageInvalid:
    return ImageInvalid(f"expected an image file such as PNG or JPEG, got: {error}")
