"""Images in a request: where they stand, what they are, and what is refused before the engine sees it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from transformers import AutoTokenizer

from peftmux.runtime.engine.text import Text
from peftmux.runtime.params import Image, ImagePatches
from peftmux.v1 import inference_pb2 as pb
from tests.engine.harness import base
from tests.server.conftest import Served, answer_of

PATCHES = pb.ImagePatches(rows=1, columns=2, values=b"\1\2\3\4")
ONE, TWO = pb.Image(patches=PATCHES), pb.Image(encoded=b"png")
CONTENT: tuple[ImagePatches | bytes, ...] = (ImagePatches(1, 2, b"\1\2\3\4"), b"png")


def at(image: pb.Image, position: int) -> pb.Image:
    return (
        pb.Image(encoded=image.encoded, position=position)
        if image.encoded
        else pb.Image(patches=image.patches, position=position)
    )


@pytest.mark.parametrize(
    ("fields", "prompt", "positions"),
    [
        ({"text": "ab<image>c<image>"}, "abc", (2, 3)),
        ({"text": "<image><image>ab"}, "ab", (0, 0)),
        ({"text": "ab"}, "ab", (0, 0)),
        ({"text": "a<image>b", "images": [at(ONE, 1), at(TWO, 3)]}, "a<image>b", (1, 3)),
        ({"token_ids": pb.TokenIds(ids=[97, 98])}, "ab", (0, 0)),
        ({"token_ids": pb.TokenIds(ids=[97, 98]), "images": [at(ONE, 0), at(TWO, 2)]}, "ab", (0, 2)),
        (
            {"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="u", content="<image>x<image>y")])},
            "u:xy;",
            (2, 3),
        ),
    ],
)
async def test_images_reach_the_engine(
    served: Served, fields: dict[str, Any], prompt: str, positions: tuple[int, int]
) -> None:
    for kind, call in ((pb.GenerateRequest, served.inference.Generate), (pb.GenerateStreamRequest, None)):
        message = kind(**{"images": [ONE, TWO], **fields})
        if call is not None:
            await call(message)
        else:
            _ = [m async for m in served.inference.GenerateStream(message)]
    for request in served.engine.requests:
        assert request.prompt == tuple(map(ord, prompt))
        assert request.images == tuple(Image(p, c) for p, c in zip(positions, CONTENT, strict=True))


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"text": "a<image>"}, "images", "(1), got 2"),
        ({"text": "a<image>b<image>c<image>"}, "images", "(3), got 2"),
        ({"text": "a", "images": [ONE, at(TWO, 0)]}, "images[1].position", "all images"),
        ({"text": "a", "images": [ONE, pb.Image()]}, "images[1]", "encoded, patches"),
    ],
)
async def test_bad_images_are_violations(served: Served, fields: dict[str, Any], field: str, words: str) -> None:
    failure = await answer_of(served.inference.Generate(pb.GenerateRequest(**{"images": [ONE, TWO], **fields})))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in failure.fields[field]
    assert not served.engine.requests


def test_a_marker_is_text_without_images_and_no_token_with_them() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base())
    text = Text(tokenizer)
    plain = text.encode("w4 w5 w6")
    first, second = text.encode_around("w4 w5<image> w6", "<image>")
    assert first + second == plain
    assert text.encode_around("w4 w5 w6", "<image>") == (plain,)
    assert text.encode_around("<image>w4", "<image>")[0] == text.encode("")
