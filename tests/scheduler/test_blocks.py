"""The block pool by itself: states, eviction order, sharing, collisions, and a check that can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftmux.runtime.scheduler.blocks import BlockPool, IntegrityError
from peftmux.runtime.scheduler.keys import BlockKey, block_key, root_digest

ROOT = root_digest(b"", 0)


def chain(*tokens: int, salt: bytes = b"") -> list[BlockKey]:
    keys, parent = [], root_digest(salt, 0)
    for token in tokens:
        keys.append(block_key(parent, (token, token)))
        parent = keys[-1].digest
    return keys


def filled(pool: BlockPool, keys: list[BlockKey]) -> list[int]:
    """Blocks that hold `keys`, taken and registered."""
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.register(block, key)
    return blocks


def test_the_null_block_is_never_handed_out():
    pool = BlockPool(5, 2, True)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (8, 0)])
def test_refuses_a_pool_without_room(num_blocks, block_size):
    with pytest.raises(ValueError, match="expected at least 2 blocks"):
        BlockPool(num_blocks, block_size, True)


def test_a_released_block_is_found_until_it_is_overwritten():
    pool = BlockPool(4, 2, True)
    keys = chain(1, 2)
    blocks = filled(pool, keys)
    pool.release(blocks)
    assert pool.match(keys) == blocks
    pool.allocate(3)
    assert pool.match(keys) == []


def test_tails_are_overwritten_before_heads_and_old_before_new():
    pool = BlockPool(7, 2, True)
    old, new = chain(1, 2, 3), chain(4, 5, 6)
    old_blocks, new_blocks = filled(pool, old), filled(pool, new)
    pool.release(old_blocks)
    pool.release(new_blocks)
    assert pool.allocate(4) == [*reversed(old_blocks), new_blocks[2]]
    assert pool.match(new) == new_blocks[:2]


def test_blank_blocks_are_taken_before_cached_ones():
    pool = BlockPool(4, 2, True)
    keys = chain(1)
    pool.release(filled(pool, keys))
    pool.allocate(2)
    assert len(pool.match(keys)) == 1


def test_use_makes_a_block_recent():
    pool = BlockPool(3, 2, True)
    first, second = chain(1), chain(2)
    pool.release(filled(pool, first))
    pool.release(filled(pool, second))
    again = pool.match(first)
    pool.acquire(again)
    pool.release(again)
    pool.allocate(1)
    assert pool.match(first) == again
    assert pool.match(second) == []


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(3, 2, True)
    blocks = filled(pool, chain(1))
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2


def test_equal_digests_of_different_content_are_not_a_hit():
    pool = BlockPool(4, 2, True)
    key = chain(1)[0]
    blocks = filled(pool, [key])
    assert pool.match([key]) == blocks
    assert pool.match([replace(key, tokens=(9, 9))]) == []
    assert pool.match([replace(key, parent=b"other")]) == []


def test_content_that_is_registered_stays_where_it_is():
    pool = BlockPool(4, 2, True)
    keys = chain(1)
    first, second = filled(pool, keys), filled(pool, keys)
    assert pool.match(keys) == first
    pool.release(second)
    pool.check(dict.fromkeys(first, 1))


def test_every_field_of_a_key_counts():
    base = block_key(ROOT, (1, 2)).digest
    others = [
        block_key(ROOT, (1, -2)),
        block_key(ROOT, (2, 1)),
        block_key(root_digest(b"adapter", 0), (1, 2)),
        block_key(root_digest(b"", 8), (1, 2)),
        block_key(base, (1, 2)),
    ]
    assert len({base, *(key.digest for key in others)}) == 6


def test_field_borders_are_part_of_the_digest():
    """One salt that looks like a salt followed by an offset is another root."""
    offset = (0).to_bytes(8, "little")
    assert root_digest(b"s" + b"offs" + (8).to_bytes(8, "little") + offset, 0) != root_digest(b"s", 0)


def test_check_names_a_leak_a_double_owner_and_a_stale_key():
    pool = BlockPool(4, 2, True)
    blocks = filled(pool, chain(1))
    pool.check({blocks[0]: 1})
    with pytest.raises(IntegrityError, match="owners hold"):
        pool.check({})
    with pytest.raises(IntegrityError, match="owners hold"):
        pool.check({blocks[0]: 2})
    pool._blank.append(blocks[0])
    with pytest.raises(IntegrityError, match="do not part"):
        pool.check({blocks[0]: 1})
    pool._blank.pop()
    pool._keys[blocks[0]] = None
    with pytest.raises(IntegrityError, match="index of keys"):
        pool.check({blocks[0]: 1})
