"""Numbers to the device and back, on the CPU; tests/gpu has the copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from peftmux.kernels.virtual import VirtualRows, VirtualSite
from peftmux.runtime.model import virtual
from peftmux.runtime.model.staging import Readback, packed, pieces, room, to_device

LISTS = [[1, 2, 3], [], [4], [5, 6]]
CPU = torch.device("cpu")


def test_one_tensor_for_each_list():
    assert [t.tolist() for t in to_device(LISTS, CPU)] == LISTS
    assert all(t.dtype is torch.int64 for t in to_device(LISTS, CPU))


def test_pieces_of_one_copy_begin_as_memory_of_their_own_would():
    whole = packed(LISTS, CPU)
    sizes = [len(values) for values in LISTS]
    assert len(whole) == room(sizes)
    found = pieces(whole, sizes)
    assert [t.tolist() for t in found] == LISTS
    assert all((t.data_ptr() - whole.data_ptr()) % 16 == 0 for t in found)


def test_values_come_back_as_they_are():
    values = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    assert Readback(values).tolist() == [[1.5, -2.0]]


class Row(NamedTuple):
    slot: int
    tokens: tuple[int, ...]


def test_virtual_tokens_of_all_rows_are_one_copy(monkeypatch):
    """`torch.tensor` on a GPU would wait for the step before."""
    copies: list[Any] = []

    def counted(lists: Any, device: torch.device) -> list[torch.Tensor]:
        copies.append(lists)
        return to_device(lists, device)

    monkeypatch.setattr(virtual, "to_device", counted)
    site = VirtualSite(torch.float32, CPU)
    tables = {slot: torch.randn(3, 2) for slot in (1, 2)}
    for slot, values in tables.items():
        site.put(slot, site.prepare(VirtualRows(values)))
    rows: Any = [Row(1, (5, -1, -3)), Row(3, (-1, 4)), Row(2, (-2,)), Row(1, (6,))]
    found = virtual.virtual_vectors(rows, site)
    assert found is not None
    assert found[0].tolist() == [1, 2, 5]
    assert torch.equal(found[1], torch.stack([tables[1][0], tables[1][2], tables[2][1]]))
    assert len(copies) == 1
    assert virtual.virtual_vectors([Row(1, (6,))], site) is None
    assert len(copies) == 1
