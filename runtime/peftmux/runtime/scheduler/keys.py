"""What a cached block holds, as a key: two rows may share a block exactly when their keys are equal.

A key chains: the digest of block i covers the digest of block i - 1, so it names every token before it as well. The
root covers whatever else decides keys and values: the adapter's salt and the position of the first token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Equality compares parent and tokens too, so that equal digests of different content are not a hit."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]


def _tagged(*fields: tuple[bytes, bytes]) -> bytes:
    """sha256 over (tag, length, value) triples: no two different field lists share an encoding."""
    encoded = b"".join(tag + len(value).to_bytes(8, "little") + value for tag, value in fields)
    return sha256(encoded).digest()


def root_digest(salt: bytes, position_offset: int) -> bytes:
    """The parent of a row's first block."""
    return _tagged((b"salt", salt), (b"offs", position_offset.to_bytes(8, "little", signed=True)))


def block_key(parent: bytes, tokens: Sequence[int]) -> BlockKey:
    """The key of a full block. `tokens` may hold negative pseudo-ids of virtual tokens."""
    digest = _tagged((b"prnt", parent), (b"toks", array("q", tokens).tobytes()))
    return BlockKey(digest, parent, tuple(tokens))
