"""Proof at load that the fitted model computes what transformers' eager attention computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftmux.kernels.attention import AttentionRows
from peftmux.kernels.lowrank import Segments
from peftmux.runtime.errors import UnsupportedModel
from peftmux.runtime.model.cache import PagedCache
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.staging import to_device
from peftmux.runtime.model.step import StepInputs

_LENGTHS = (19, 6)
_STEPS = (((0, 8, 0), (0, 6, 1)), ((8, 18, 0),), ((18, 19, 0),))
"""Of each step: (start, stop, sequence). A prompt in two chunks beside another one, then a decode."""
_BLOCK = 4


def _sequences(vocab_size: int) -> list[list[int]]:
    return [[(7 * i * i + 3 * i + 11 * s) % vocab_size for i in range(n)] for s, n in enumerate(_LENGTHS)]


@torch.inference_mode()
def reference_logits(module: nn.Module) -> list[Tensor]:
    """[n, V] float32 of each test sequence, one at a time, by the module as transformers loads it."""
    device = next(module.parameters()).device
    vocab = module.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    return [
        module(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
        for ids in _sequences(vocab)
    ]


@torch.inference_mode()
def verify(model: LoadedModel, expected: list[Tensor]) -> None:
    """Run the same sequences as one flat batch over a small paged cache. Raises UnsupportedModel where they differ."""
    blocks = [[1, 2, 3, 4, 5], [6, 7]]
    cache = PagedCache(model, 8, _BLOCK)
    cache.attach()
    sequences = _sequences(model.vocab_size)
    got: list[list[Tensor]] = [[] for _ in sequences]
    for step in _STEPS:
        logits = model.forward(_inputs(model, cache, step, sequences, blocks)).float()
        for (start, stop, s), part in zip(step, logits.split([b - a for a, b, _ in step]), strict=True):
            assert len(part) == stop - start
            got[s].append(part)
    for want, parts in zip(expected, got, strict=True):
        _compare(model, want, torch.cat(parts))


def _inputs(
    model: LoadedModel,
    cache: PagedCache,
    step: tuple[tuple[int, int, int], ...],
    sequences: list[list[int]],
    blocks: list[list[int]],
) -> StepInputs:
    device = model.device
    ids = [t for a, b, s in step for t in sequences[s][a:b]]
    positions = [p for a, b, _ in step for p in range(a, b)]
    slots = [slot for a, b, s in step for slot in cache.slots(blocks[s], a, b)]
    lens = [b - a for a, b, _ in step]
    tables = [blocks[s][: -(-b // _BLOCK)] for _, b, s in step]
    segments = Segments.build([0] * len(step), lens, device)
    staged = to_device([ids, positions, slots, range(len(ids))], device)
    return StepInputs(
        ids=staged[0].unsqueeze(0),
        positions=staged[1].unsqueeze(0),
        slots=staged[2],
        rows=AttentionRows.build(lens, [b for _, b, _ in step], tables, device),
        segments=segments,
        keep=staged[3],
        kept=segments,
    )


def _compare(model: LoadedModel, want: Tensor, got: Tensor) -> None:
    """float32 logits agree to 1e-3 of their spread; half precision, where each rounding differs, on average to 5 %."""
    if not bool(want.isfinite().all()):
        raise UnsupportedModel(f"{model.name} cannot be served: its weights give logits that are not finite")
    spread = max(float(want.std()), 1e-6)
    difference = (want - got).abs()
    worst = float(difference.max() if model.dtype == torch.float32 else difference.mean()) / spread
    allowed = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not worst <= allowed:
        raise UnsupportedModel(
            f"{model.architecture} cannot be served exactly: its logits through paged attention differ from "
            f"transformers' eager attention by {worst:.2g} of their spread, expected at most {allowed:g}"
        )
