"""Images of a request: made into patches, and given their places among the prompt's tokens."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.model.images import patches
from peftmux.runtime.params import Image, ImagePatches
from peftmux.runtime.scheduler.plan import ImageSpan

MAX_IMAGES = 64
MAX_PIXELS = 1 << 26
"""Of an encoded image, before it is made smaller."""
PSEUDO_ID = -1
"""Stands for every token of an image."""


@dataclass(frozen=True, slots=True)
class ImageRule:
    """What an adapter makes of images."""

    patch_size: int
    image_size: int
    """Height and width of what an encoded image becomes."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    both_ways: bool


def decode_images(images: Sequence[Image], rule: ImageRule) -> tuple[Image, ...]:
    """Files made into patches. InvalidRequest names the first that is not what it should be."""
    if len(images) > MAX_IMAGES:
        raise InvalidRequest("images", f"expected at most {MAX_IMAGES}, got {len(images)}")
    return tuple(Image(image.position, _patches(image.content, rule, f"images[{i}]")) for i, image in enumerate(images))


def place_images(
    prompt: tuple[int, ...], images: Sequence[Image], rule: ImageRule
) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
    """-> (the prompt with pseudo-ids where images stand, its spans; images that touch are one span). InvalidRequest."""
    tokens: list[int] = []
    spans: list[ImageSpan] = []
    done = 0
    for i, image in enumerate(images):
        if not done <= image.position <= len(prompt):
            raise InvalidRequest(
                f"images[{i}].position", f"expected {done} to the prompt's {len(prompt)} tokens, got {image.position}"
            )
        tokens += prompt[done : image.position]
        done = image.position
        own_patches = _patches(image.content, rule, f"images[{i}]")
        start, stop = len(tokens), len(tokens) + own_patches.rows * own_patches.columns
        tokens += [PSEUDO_ID] * (stop - start)
        own: tuple[ImagePatches, ...] = (own_patches,)
        if spans and spans[-1].stop == start:
            before = spans.pop()
            start, own = before.start, (*before.images, own_patches)
        spans.append(ImageSpan(start, stop, own, rule.both_ways))
    return (*tokens, *prompt[done:]), tuple(spans)


def images_digest(spans: Sequence[ImageSpan]) -> bytes:
    """Names what a prompt's images show and where they stand: their pseudo-ids do not."""
    digest = hashlib.sha256()
    for span in spans:
        for image in span.images:
            digest.update(f"{span.start} {span.stop} {image.rows} {image.columns} ".encode())
            digest.update(image.values)
    return digest.digest()


def cut(pixels: Tensor, patch_size: int) -> ImagePatches:
    """pixels: [3, rows * p, columns * p] -> its patches."""
    _, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.view(3, rows, patch_size, columns, patch_size).permute(1, 3, 0, 2, 4)
    return ImagePatches(rows, columns, grid.contiguous().float().numpy().tobytes())


def _patches(content: ImagePatches | bytes, rule: ImageRule, field: str) -> ImagePatches:
    if isinstance(content, bytes):
        return cut(_decode(content, rule, f"{field}.encoded"), rule.patch_size)
    field = f"{field}.patches"
    if content.rows < 1 or content.columns < 1:
        raise InvalidRequest(field, f"expected at least 1 row and column, got {content.rows} and {content.columns}")
    size = content.rows * content.columns * 3 * rule.patch_size**2 * 4
    if len(content.values) != size:
        raise InvalidRequest(
            field,
            f"expected {size} bytes of values: {content.rows} x {content.columns} patches of 3 x {rule.patch_size} x "
            f"{rule.patch_size} float32, got {len(content.values)}",
        )
    if not bool(patches(content).isfinite().all()):
        raise InvalidRequest(field, "expected finite values, got NaN or infinity")
    return content


def _decode(data: bytes, rule: ImageRule, field: str) -> Tensor:
    """[3, S, S] float32: on a black square, made S wide by bicubic interpolation, then (value / 255 - mean) / std."""
    try:
        import PIL.Image
    except ImportError:
        raise InvalidRequest(field, "expected patches: this server has no Pillow to decode images with") from None
    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise InvalidRequest(field, f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise InvalidRequest(field, f"expected an image file such as PNG or JPEG, got: {error}") from None
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    small = square.resize((rule.image_size, rule.image_size), PIL.Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(rule.image_size, rule.image_size, 3)
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (rule.mean, rule.std))
    pixels = ((values.float() / 255 - mean) / std).permute(2, 0, 1)
    return pixels.contiguous()
