"""Images of a request: made into patches, and given their places among the prompt's tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from peftmux.adapters.images import MAX_IMAGES, ImageInvalid, ImageRule, cut_patches, decode_image
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.model.images import patches
from peftmux.runtime.params import Image, ImagePatches
from peftmux.runtime.scheduler.plan import ImageSpan

PSEUDO_ID = -1
"""Stands for every token of an image."""


@dataclass(frozen=True, slots=True)
class DecodedImages:
    """Of one request, checked against its adapter's rule."""

    images: tuple[Image, ...]
    """Every content is patches."""
    digest: bytes


def decode_images(images: Sequence[Image], rule: ImageRule) -> DecodedImages:
    """Files made into patches, in a thread: it takes long. InvalidRequest names the first bad one."""
    if len(images) > MAX_IMAGES:
        raise InvalidRequest("images", f"expected at most {MAX_IMAGES}, got {len(images)}")
    decoded = [Image(image.position, _patches(image.content, rule, f"images[{i}]")) for i, image in enumerate(images)]
    return DecodedImages(tuple(decoded), images_digest(decoded))


def place_images(
    prompt: tuple[int, ...], images: Sequence[Image], rule: ImageRule
) -> tuple[tuple[int, ...], tuple[ImageSpan, ...]]:
    """-> (the prompt with pseudo-ids where images stand, its spans; images that touch are one span).

    The images are those of `decode_images` by the same rule. InvalidRequest for a position out of order.
    """
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
        own_patches = image.content
        assert isinstance(own_patches, ImagePatches), "images are decoded before they are placed"
        start, stop = len(tokens), len(tokens) + own_patches.rows * own_patches.columns
        tokens += [PSEUDO_ID] * (stop - start)
        own: tuple[ImagePatches, ...] = (own_patches,)
        if spans and spans[-1].stop == start:
            before = spans.pop()
            start, own = before.start, (*before.images, own_patches)
        spans.append(ImageSpan(start, stop, own, rule.both_ways))
    return (*tokens, *prompt[done:]), tuple(spans)


def images_digest(images: Sequence[Image]) -> bytes:
    """Names what a prompt's decoded images show and where they stand: their pseudo-ids do not."""
    digest = hashlib.sha256()
    for image in images:
        patches = image.content
        assert isinstance(patches, ImagePatches), "images are decoded before they are named"
        digest.update(f"{image.position} {patches.rows} {patches.columns} ".encode())
        digest.update(patches.values)
    return digest.digest()


def _patches(content: ImagePatches | bytes, rule: ImageRule, field: str) -> ImagePatches:
    if isinstance(content, bytes):
        return _decoded(content, rule, f"{field}.encoded")
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


def _decoded(data: bytes, rule: ImageRule, field: str) -> ImagePatches:
    try:
        rows, columns, grid = cut_patches(decode_image(data, rule), rule.patch_size)
    except ImageInvalid as error:
        raise InvalidRequest(field, str(error)) from None
    return ImagePatches(rows, columns, grid.numpy().tobytes())
