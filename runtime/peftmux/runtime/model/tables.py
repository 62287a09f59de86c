"""Where the operators of a replayed decode step read which rows and adapters it has."""

from __future__ import annotations

from typing import Protocol

import torch

from peftmux.kernels.attention import AttentionRows, StaticRows
from peftmux.kernels.head import HeadSite
from peftmux.kernels.lowrank import LowRankSite, Segments
from peftmux.kernels.lowrank.tiles import TileBuffer
from peftmux.kernels.lowrank.workspace import workspace
from peftmux.kernels.virtual import VirtualSite
from peftmux.kernels.vision import VisionSite
from peftmux.runtime.model.first_pass import FirstPass
from peftmux.runtime.model.ladders import Ladders
from peftmux.runtime.model.sites import Site

_FED = (FirstPass, Ladders)
"""Sites that read what a step brings beside its tokens (`StepInputs.shares`, `StepInputs.ladders`)."""
_UNREAD = (HeadSite, VirtualSite, VisionSite)
"""Sites that no step reads which draws from a token of its own."""


class Tables(Protocol):
    """Of steps of at most so many rows."""

    def fill(self, contexts: list[int], blocks: list[tuple[int, ...]], slots: list[int]) -> None:
        """Take the rows of the step that is replayed next: of each its context with the new token, its blocks, and
        its adapter's slot."""
        ...

    @property
    def rows(self) -> AttentionRows: ...

    @property
    def segments(self) -> Segments: ...


class Operators(Protocol):
    """What the layers of one model run, as far as replaying them goes."""

    def serves(self, site: Site) -> bool:
        """Whether adapters at this site may be in a step that is replayed."""
        ...

    def generation(self) -> int:
        """Rises whenever something has moved that a captured graph knows by its address."""
        ...

    def reserve(self) -> None:
        """Take the memory that the largest step needs, so that nothing moves for it later. In the steps' thread."""
        ...

    def tables(self, tokens: int) -> Tables: ...


class HostOperators:
    """Operators that read a step's tables on the host. What they run can be run again, but not captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def serves(self, site: Site) -> bool:
        return not isinstance(site, _FED)

    def generation(self) -> int:
        return 0

    def reserve(self) -> None:
        pass

    def tables(self, tokens: int) -> Tables:
        return HostTables(self._device)


class HostTables:
    """Made anew for each step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.fill([1], [(0,)], [0])

    def fill(self, contexts: list[int], blocks: list[tuple[int, ...]], slots: list[int]) -> None:
        ones = [1] * len(contexts)
        self.rows = AttentionRows.build(ones, contexts, blocks, self._device)
        self.segments = Segments.build(slots, ones, self._device)


class DeviceOperators:
    """Triton's operators, which read everything on the device."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, step_tokens: int, row_blocks: int, block_size: int
    ) -> None:
        """step_tokens: of the largest step; row_blocks: the most that a row has."""
        self._device = device
        self._dtype = dtype
        self._step_tokens = step_tokens
        self._row_blocks = row_blocks
        self._block_size = block_size

    def serves(self, site: Site) -> bool:
        if isinstance(site, LowRankSite):
            return site.path == "triton"
        return isinstance(site, _UNREAD) or bool(getattr(site, "graphed", False))

    def generation(self) -> int:
        return workspace(self._device).generation

    def reserve(self) -> None:
        # No step has more tiles than tokens and adapters, and no more adapters than tokens.
        workspace(self._device).buffers(self._step_tokens, 2 * self._step_tokens, self._dtype)

    def tables(self, tokens: int) -> Tables:
        return DeviceTables(tokens, self._row_blocks, self._block_size, self._device)


class DeviceTables:
    """Buffers that stay where they are."""

    def __init__(self, tokens: int, row_blocks: int, block_size: int, device: torch.device) -> None:
        self._tiles = TileBuffer(tokens, tokens, device)
        self.segments = Segments.over(self._tiles, device)
        self.rows = StaticRows.decode(tokens, row_blocks, block_size, device)

    def fill(self, contexts: list[int], blocks: list[tuple[int, ...]], slots: list[int]) -> None:
        ones = [1] * len(contexts)
        self._tiles.fill(Segments.build(slots, ones).runs)
        self.rows.fill(AttentionRows.build(ones, contexts, blocks, self.rows.device))
