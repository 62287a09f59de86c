"""The cache's blocks: who holds each, which hold content worth finding again, and in which order that is given up.

A block is in exactly one state:
    null     block 0: padding points at it, nobody ever holds it
    blank    free, its content means nothing
    cached   free, registered under a key: found again or, least recently used first, overwritten
    held     referenced by one or more rows or by a prefix; registered or not
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from peftmux.runtime.scheduler.keys import BlockKey


class IntegrityError(RuntimeError):
    """A block has no owner, two states, or a count that is not its owners'. Always a bug of the scheduler."""


class BlockPool:
    """Every operation is O(1) for each block it touches. Not thread-safe: it belongs to the scheduler."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"expected at least 2 blocks (one is the null block) of at least 1 token, "
                f"got {num_blocks} of {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now; cached ones lose their content when they are."""
        return len(self._blank) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; blank ones first. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._by_digest[key.digest]
        self._keys[block] = None

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of the longest leading run of `keys` that is registered. Takes no references."""
        found: list[int] = []
        for key in keys:
            block = self._by_digest.get(key.digest)
            if block is None or self._keys[block] != key:
                break
            found.append(block)
        return found

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        return sum(1 for block in blocks if not self._references[block])

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference to each of `blocks`, which `match` has just returned."""
        for block in blocks:
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of `blocks` (a row's, in order).

        Tails become free first and so are overwritten first: the head of a chain is what others can still use.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released but not held"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, key: BlockKey) -> None:
        """`block` is full and computed: others may find it. Content that is registered already stays where it is."""
        assert self._references[block] > 0, f"block {block} is registered but not held"
        assert self._keys[block] is None, f"block {block} is registered twice"
        if key.digest not in self._by_digest:
            self._by_digest[key.digest] = block
            self._keys[block] = key

    def check(self, owners: Mapping[int, int]) -> None:
        """Prove that every block has exactly one state. `owners`: references that rows and prefixes hold, by block."""
        free = [*self._blank, *self._cached]
        if len(set(free)) != len(free):
            raise IntegrityError(f"a block is free twice: {sorted(free)}")
        held = {block for block, count in enumerate(self._references) if count}
        if 0 in held or 0 in free or held & set(free) or len(held) + len(free) != self.num_usable:
            raise IntegrityError(f"held {sorted(held)} and free {sorted(free)} do not part blocks 1..{self.num_usable}")
        counted = {block: self._references[block] for block in held}
        if counted != dict(owners):
            raise IntegrityError(f"references are {counted}, owners hold {dict(owners)}")
        self._check_keys()

    def _check_keys(self) -> None:
        registered = {key.digest: block for block, key in enumerate(self._keys) if key is not None}
        if registered != self._by_digest:
            raise IntegrityError("the index of keys and the blocks' keys differ")
        if any(self._keys[block] is None for block in self._cached):
            raise IntegrityError("a cached block has no key")
        if any(self._keys[block] is not None for block in self._blank):
            raise IntegrityError("a blank block has a key")
