"""The images of a generation request, and where in its prompt they stand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from peftmux.adapters.images import MARKER
from peftmux.runtime.params import Image, ImagePatches
from peftmux.runtime.server.errors import InvalidFields
from peftmux.v1 import inference_pb2


def named_positions(message: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest) -> bool:
    """Whether the images say where they stand. Raises InvalidFields where one is empty, or only some of them say so."""
    given = [image.HasField("position") for image in message.images]
    for i, image in enumerate(message.images):
        if image.WhichOneof("content") is None:
            raise InvalidFields(((f"images[{i}]", "expected one of encoded, patches, got none"),))
        if given[i] != given[0]:
            raise InvalidFields(((f"images[{i}].position", "expected all images to have one or none, got both"),))
    return bool(given) and given[0]


def marked_positions(pieces: Sequence[Sequence[int]], images: int) -> tuple[tuple[int, ...], list[int]]:
    """The tokens between the markers -> (the whole prompt, where its images stand); all in front without a marker."""
    prompt = tuple(token for piece in pieces for token in piece)
    if len(pieces) == 1:
        return prompt, [0] * images
    if len(pieces) - 1 != images:
        expected = f"as many images as the input has {MARKER!r}"
        raise InvalidFields((("images", f"expected {expected} ({len(pieces) - 1}), got {images}"),))
    return prompt, list(accumulate(len(piece) for piece in pieces[:-1]))


def images_at(
    message: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest, positions: Sequence[int]
) -> tuple[Image, ...]:
    return tuple(Image(at, _content(image)) for at, image in zip(positions, message.images, strict=True))


def _content(image: inference_pb2.Image) -> ImagePatches | bytes:
    if image.WhichOneof("content") == "encoded":
        return image.encoded
    return ImagePatches(image.patches.rows, image.patches.columns, image.patches.values)
