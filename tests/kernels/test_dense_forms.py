"""The base's linear layers: every form against the definition, their weights, and rows that do not know each other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from peftmux.kernels import native
from peftmux.kernels.dense import DenseForm, choose_dense, dense
from peftmux.kernels.dense.layout import pack, packed_elements, unpack
from peftmux.kernels.dense.native_path import NativeForm
from peftmux.kernels.dense.torch_path import PackedDense, PlainDense
from peftmux.kernels.native import levels, library
from tests.kernels.native_here import needs_level, skip_without

CPU = torch.device("cpu")
TORCH = (PackedDense, PlainDense)
SHAPES = [(48, 32), (1, 1), (16, 31), (33, 64), (100, 90), (130, 33), (768, 256), (1000, 768)]
ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 70, 257, 300]


@pytest.fixture(scope="module")
def tiles() -> NativeForm:
    """Our own form, where this machine can compile and run it."""
    amx = next((level for level in levels.runnable() if "amx_bf16" in level.needs), None)
    if amx is None:
        pytest.skip("needs a CPU with AMX: amx_bf16 in /proc/cpuinfo")
    skip_without(amx)
    product = library.open_level(amx).dense(torch.bfloat16)
    if product is None:
        pytest.skip("needs a system that lets processes use AMX: Linux 5.16 or newer")
    return NativeForm(product)


def made(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs * 10_000 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    return weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


def close(got: Tensor, expected: Tensor) -> None:
    """Sums of float32 in another order, rounded once: bfloat16 may fall to the neighbour, 2^-7 of the value away."""
    bound = 2**-7 if got.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), expected.float(), rtol=bound, atol=1e-3 * bound + 1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_tiles_give_the_definition(tiles: NativeForm, outputs: int, inputs: int, biased: bool) -> None:
    weight, bias = made(outputs, inputs)
    layer = tiles(weight, bias if biased else None)
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        got = layer(x)
        assert got.shape == (rows, outputs)
        assert got.dtype is torch.bfloat16
        close(got, dense(x, weight, bias if biased else None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["chosen", "plain"])
def test_torch_forms_give_the_definition(plain: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    form = PlainDense if plain else choose_dense(CPU, dtype)
    assert form in TORCH
    weight, bias = made(100, 90, dtype)
    x = torch.randn(2, 7, 90).to(dtype)
    layer = form(weight, bias)
    close(layer(x), dense(x, weight, bias))
    assert torch.equal(layer.weight(), weight)


@pytest.mark.parametrize(("outputs", "inputs"), [(1000, 768), (100, 90)])
def test_a_row_is_the_same_in_every_batch(tiles: NativeForm, outputs: int, inputs: int) -> None:
    weight, bias = made(outputs, inputs)
    layer = tiles(weight, bias)
    x = torch.randn(300, inputs).bfloat16()
    alone = torch.cat([layer(row.unsqueeze(0)) for row in x])
    for rows in ROWS:
        assert torch.equal(layer(x[:rows]), alone[:rows])
        assert torch.equal(layer(x[-rows:]), alone[-rows:])
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    assert torch.equal(layer(poisoned)[::2], alone[::2])


def outputs_alone(form: DenseForm, dtype: torch.dtype, cuts: Sequence[tuple[int, int]]) -> None:
    """Layers over some outputs of one give the whole one's numbers, also cut out of one another."""
    weight, bias = made(200, 90, dtype)
    x = torch.randn(2, 7, 90).to(dtype)
    for given in (None, bias):
        layer = form(weight, given)
        for start, stop in cuts:
            own = layer.columns(start, stop)
            close(own(x), layer(x)[..., start:stop])
            assert torch.equal(own.weight(), weight[start:stop])
            again = own.columns(1, stop - start)
            close(again(x), layer(x)[..., start + 1 : stop])
            assert torch.equal(again.weight(), weight[start + 1 : stop])


CUTS = ((0, 200), (64, 150), (96, 128), (32, 200), (7, 41), (190, 200))
"""Some begin a panel of 32 outputs, some do not."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", TORCH)
def test_some_outputs_alone(form: DenseForm, dtype: torch.dtype) -> None:
    outputs_alone(form, dtype, CUTS)


def test_some_outputs_alone_on_tiles(tiles: NativeForm) -> None:
    outputs_alone(tiles, torch.bfloat16, CUTS)
    weight, bias = made(200, 90)
    layer, x = tiles(weight, bias), torch.randn(40, 90).bfloat16()
    assert torch.equal(layer.columns(64, 150)(x), layer(x)[:, 64:150])


def test_threads_do_not_change_it(tiles: NativeForm) -> None:
    weight, bias = made(1000, 768)
    layer, x = tiles(weight, bias), torch.randn(33, 768).bfloat16()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(layer(x))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_inputs_of_any_layout(tiles: NativeForm) -> None:
    weight, _ = made(96, 64)
    layer, x = tiles(weight, None), torch.randn(2, 5, 160).bfloat16()
    for view in (x[..., :64], x[0, :, 32:96], x.transpose(0, 1)[..., 5:69], x[0, :, ::2][:, :64], x[0, :1, :64][0]):
        close(layer(view), dense(view, weight, None))
        assert layer(view).shape == (*view.shape[:-1], 96)
    assert layer(x[0, :0, :64]).shape == (0, 96)


@pytest.mark.parametrize(("outputs", "inputs"), [*SHAPES, (7, 2050)])
def test_the_weight_comes_back(outputs: int, inputs: int) -> None:
    weight, _ = made(outputs, inputs)
    packed = torch.full((packed_elements(outputs, inputs),), torch.nan, dtype=torch.bfloat16)
    pack(weight, packed)
    assert torch.equal(unpack(packed, outputs, inputs), weight)
    assert packed.count_nonzero() == weight.count_nonzero()


def test_layers_of_a_model_keep_their_weights_apart(tiles: NativeForm) -> None:
    weights = [made(n, k)[0] for n, k in ((40, 40), (4096, 4160), (33, 65), (4128, 4096), (8192, 4352), (16, 16))]
    layers = [tiles(weight, None) for weight in weights]  # past one map, and one weight above a map's size
    assert all(torch.equal(layer.weight(), weight) for layer, weight in zip(layers, weights, strict=True))


def test_wrong_inputs_are_refused(tiles: NativeForm) -> None:
    weight, bias = made(48, 32)
    layer = tiles(weight, bias)
    with pytest.raises(ValueError, match=r"expected torch.bfloat16 \[..., 32\], got torch.float32 \(3, 32\)"):
        layer(torch.zeros(3, 32))
    with pytest.raises(ValueError, match=r"got torch.bfloat16 \(3, 33\)"):
        layer(torch.zeros(3, 33).bfloat16())
    with pytest.raises(ValueError, match=r"expected torch.bfloat16, got torch.float32"):
        tiles(weight.float(), None)
    with pytest.raises(ValueError, match=r"bias of shape \(48,\), got \(47,\)"):
        tiles(weight, bias[:47])


def test_the_form_follows_dtype_device_and_processor(tiles: NativeForm, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {level.name: library.open_level(level) for level in levels.runnable()}
    for name, found in chosen.items():
        monkeypatch.setattr(native, "load", lambda found=found: found)
        assert isinstance(choose_dense(CPU, torch.bfloat16), NativeForm) == name.endswith("amx")
        assert choose_dense(CPU, torch.float32) in TORCH
    monkeypatch.setattr(native, "load", lambda: None)
    assert choose_dense(CPU, torch.bfloat16) in TORCH
    assert choose_dense(CPU, torch.float16) is PlainDense
    assert choose_dense(torch.device("cuda"), torch.bfloat16) is PlainDense


@needs_level
def test_an_older_compiler_builds_the_next_level(monkeypatch: pytest.MonkeyPatch) -> None:
    level = levels.best()
    assert level is not None
    skip_without(level)
    newest = levels.Level("newest", ("-mof-a-later-compiler",))
    monkeypatch.setattr(library, "runnable", lambda: (newest, level))
    monkeypatch.delenv("PEFTMUX_NATIVE", raising=False)
    status = library.status.__wrapped__()
    assert status.library is not None
    assert status.level == level.name
