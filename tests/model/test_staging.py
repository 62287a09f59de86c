"""Numbers to the device and back, on the CPU; tests/gpu has the copies."""

from __future__ import annotations

import torch

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
