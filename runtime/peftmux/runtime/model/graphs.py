"""Decode steps that are launched as one: captured once for each number of rows, then replayed.

A step of one token a row is a few hundred kernels whose launches cost more than their work. A CUDA graph launches them
together, with the addresses that it was captured with: so a bucket of rows has inputs that stay where they are, and a
step with fewer rows fills it up with tokens that nobody reads (they are written to the null block, under no adapter).

What an operator decides on the host it decides when it is captured. So a graph may be replayed only for steps whose
adapters live in sites that read everything from device tables (`Operators.serves`). Steps with other adapters, and
those that prefill, read states or report prompts, run as they come. Sites that held nothing when a graph was captured
are not in it; adapters at sites that are in it come and go, at any rank, without a new capture.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftmux.kernels.attention import choose_attention
from peftmux.kernels.lowrank import Segments
from peftmux.runtime.model.cache import PagedCache
from peftmux.runtime.model.launched import Launched
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.sites import Site
from peftmux.runtime.model.staging import packed, pieces, room
from peftmux.runtime.model.step import StepInputs
from peftmux.runtime.model.tables import DeviceOperators, Operators, Tables
from peftmux.runtime.scheduler.plan import RowPlan

logger = logging.getLogger(__name__)

_STEPS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a bucket. Decode reads the weights: filling up costs little."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Of a forward that reads fixed inputs: what runs it again, and gives its logits in memory that the next run reuses."""


def rerun(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures nothing."""
    return forward


class CudaCapture:
    """Captures on the current device. All graphs share one pool of memory: only one of them runs at a time."""

    _WARM_RUNS = 2

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Torch hands out streams of one priority in turn, so a later one can be the uploads': what a loader thread
        # copies would then be captured. Of this priority there is no other.
        self._stream = torch.cuda.Stream(priority=-1)

    def __call__(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries take their workspaces before the capture
            for _ in range(self._WARM_RUNS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: loader threads may allocate and copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


class Bucket:
    """The inputs of steps of at most `tokens` rows: tensors that stay where they are."""

    def __init__(self, tokens: int, tables: Tables, device: torch.device) -> None:
        self.tokens = tokens
        self.tables = tables
        self._device = device
        self._sizes = [tokens] * 3
        self._integers = torch.zeros(room(self._sizes), dtype=torch.int64, device=device)
        ids, positions, slots = pieces(self._integers, self._sizes)
        self._base = Segments.build([0], [tokens], device)
        self._keep = torch.arange(tokens, device=device)
        self._inputs = StepInputs(
            ids=ids.unsqueeze(0),
            positions=positions.unsqueeze(0),
            slots=slots,
            rows=tables.rows,
            segments=self._base,
            keep=self._keep,
            kept=self._base,
        )

    def fill(self, rows: Sequence[RowPlan], cache: PagedCache, before: Launched | None) -> None:
        """Take a step's rows, in their order. What fills up is token 0 at position 0 of the null block."""
        filling = [0] * (self.tokens - len(rows))
        ids = [row.tokens[0] for row in rows] + filling
        positions = [row.start + row.position_offset for row in rows] + filling
        slots = [cache.slot(row.blocks, row.start) for row in rows] + filling
        self._integers.copy_(packed([ids, positions, slots], self._device), non_blocking=True)
        self.tables.fill([row.start + 1 for row in rows], [row.blocks for row in rows], [slot_of(row) for row in rows])
        if before is not None:
            before.fill_in(self._inputs.ids[0], rows)

    def inputs(self, adapted: bool) -> StepInputs:
        """The step that was filled in last; without `adapted` all of it under no adapter."""
        segments = self.tables.segments if adapted else self._base
        return replace(self._inputs, rows=self.tables.rows, segments=segments, kept=segments)


@dataclass(frozen=True, slots=True)
class _Captured:
    """`sites` held adapters that graphs serve when this was captured; `generation` is the operators' of then."""

    replay: Callable[[], Tensor]
    sites: frozenset[int]
    generation: int


def slot_of(row: RowPlan) -> int:
    """The adapter of a row's one token."""
    return row.slot if row.start >= row.active_from else 0


def replayable(rows: Sequence[RowPlan], most: int, eager: Container[int]) -> bool:
    """Is this a step that only decodes, of at most `most` rows, with no adapter whose slot is in `eager`?

    A row with a readout reads states, one that reports prompts needs more logits than its own, and what stands for a
    virtual token or an image comes as a vector: none of it is in a graph.
    """
    return len(rows) <= most and all(
        len(row.tokens) == 1
        and row.samples
        and row.tokens[0] >= 0
        and row.readout is None
        and not row.next_tokens
        and not row.images
        and row.slot not in eager
        for row in rows
    )


class DecodeGraphs:
    """Of one model. Used by the thread that runs steps.

    After a failed capture every step runs as it comes: said once in the log, and to `failed`.
    """

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        device: torch.device,
        max_rows: int,
        operators: Operators,
        capture: Capture,
        failed: Callable[[], None],
    ) -> None:
        self._forward = forward
        self._device = device
        self._operators = operators
        self._capture = capture
        self._failed = failed
        self._sizes = [n for n in _STEPS if n < max_rows] + [n for n in _STEPS if n >= max_rows][:1]
        self._buckets: dict[int, Bucket] = {}
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._held: Counter[int] = Counter()
        """Adapters that graphs serve at each site, by the site's identity."""
        self._sites: frozenset[int] = frozenset()
        self._eager: set[int] = set()
        """Slots of adapters that no graph serves."""
        self._off = False
        self.captures = 0
        self.replays = 0

    @property
    def in_use(self) -> bool:
        """False once a capture has failed."""
        return not self._off

    def placed(self, slot: int, sites: Collection[Site]) -> None:
        """What adapters that no graph serves hold counts for none: where only they are, a capture may leave out what
        others need."""
        if all(map(self._operators.serves, sites)):
            self._held.update(map(id, sites))
            self._sites = frozenset(self._held)
        else:
            self._eager.add(slot)

    def removed(self, slot: int, sites: Collection[Site]) -> None:
        if slot in self._eager:
            self._eager.remove(slot)
        else:
            self._held.subtract(map(id, sites))
            self._held = +self._held
            self._sites = frozenset(self._held)

    def takes(self, rows: Sequence[RowPlan]) -> bool:
        return not self._off and replayable(rows, self._sizes[-1], self._eager)

    def warm_up(self) -> None:
        """Capture the base's steps, and those with adapters where there are any; larger ones first, so that they
        leave room for the smaller."""
        self._operators.reserve()
        for tokens in reversed(self._sizes):
            for adapted in (False, True) if self._sites else (False,):
                if not self._off:
                    self._replay(self._bucket(tokens), adapted)

    def run(self, rows: Sequence[RowPlan], cache: PagedCache, before: Launched | None) -> Tensor:
        """Logits [R, V] of rows that `takes` takes, in memory that the next call overwrites."""
        bucket = self._bucket(self._sizes[bisect_left(self._sizes, len(rows))])
        bucket.fill(rows, cache, before)
        return self._replay(bucket, any(map(slot_of, rows)))[: len(rows)]

    def _bucket(self, tokens: int) -> Bucket:
        if tokens not in self._buckets:
            self._buckets[tokens] = Bucket(tokens, self._operators.tables(tokens), self._device)
        return self._buckets[tokens]

    def _replay(self, bucket: Bucket, adapted: bool) -> Tensor:
        """Run the step that `bucket` holds, captured anew where what is captured is not it any more."""
        key = (bucket.tokens, adapted)
        found = self._captured.get(key)
        if found is None or not self._holds(found, adapted):
            found = self._take(bucket, adapted)
            if found is None:
                return self._forward(bucket.inputs(adapted))
            self._captured[key] = found
        self.replays += 1
        return found.replay()

    def _holds(self, captured: _Captured, adapted: bool) -> bool:
        """The base's steps read no adapter's table: nothing that moves is in them."""
        if not adapted:
            return True
        return captured.generation == self._operators.generation() and self._sites <= captured.sites

    def _take(self, bucket: Bucket, adapted: bool) -> _Captured | None:
        """None where it fails: then no graph is used from now on."""
        started = time.monotonic()
        try:
            replay = self._capture(lambda: self._forward(bucket.inputs(adapted)))
        except Exception:
            logger.warning("decode steps cannot be captured on this device: they run as they come", exc_info=True)
            self._off = True
            self._captured.clear()
            self._failed()
            return None
        self.captures += 1
        seconds = time.monotonic() - started
        logger.debug("captured a decode step of %d rows in %.2f s", bucket.tokens, seconds)
        return _Captured(replay, self._sites, self._operators.generation())


def decode_graphs(
    model: LoadedModel, max_rows: int, step_tokens: int, block_size: int, failed: Callable[[], None]
) -> DecodeGraphs | None:
    """What replays this model's decode steps, of which no step has more than `step_tokens`.

    None where its attention reads rows on the host: on the CPU, where a launch costs nothing, and without Triton.
    """
    if model.device.type != "cuda" or choose_attention(model.device, model.dtype).name != "triton":
        return None
    row_blocks = -(-model.context_length // block_size)
    operators = DeviceOperators(model.device, model.dtype, step_tokens, row_blocks, block_size)
    return DecodeGraphs(model.forward, model.device, max_rows, operators, CudaCapture(), failed)
