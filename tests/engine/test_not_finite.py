"""An adapter whose numbers overflow ends its own rows and leaves nothing behind, in either form of the operators."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from peftmux.kernels import native
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.errors import NotFinite
from tests.engine.harness import adapters, ask, ask_all, check_quiet, load, request, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [1, 44, 48, 90, 66, 9, 10, 41, 92, 60]


def overflowing(folder: Path, source: str) -> None:
    """Finite numbers whose products are not."""
    shutil.copytree(Path(adapters(), source), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t / t.abs().max() * 3e38 for name, t in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module", params=["native", "torch"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "load", lambda: None)
        elif native.load() is None:
            pytest.skip(f"needs the native library, which a C++ compiler makes; here {native.status()}")
        yield request.param


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(form: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalEngine]:
    """A cache of few blocks, so that those of an ended row are used again."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("lora", "prefix"):
        shutil.copytree(Path(adapters(), name), root / name)
        overflowing(root / f"huge_{name}", name)
    memory = 40 * 4 * 3 * 2 * 16 * 4
    async with running(adapters_root=str(root), block_size=4, kv_cache_memory=memory, max_batch_tokens=16) as engine:
        for name in ("lora", "prefix", "huge_lora", "huge_prefix"):
            await load(engine, name)
        usage = engine.stats().kv_cache_usage
        yield engine
        await check_quiet(engine, usage)


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
async def test_only_its_own_rows_end(engine: LocalEngine, prompt_logprobs: int | None) -> None:
    good = [request(PROMPT, name, 12) for name in ("", "lora", "prefix", "")]
    expected = [await ask(engine, one) for one in good]
    bad = [request(PROMPT, "huge_lora", 12, prompt_logprobs=prompt_logprobs)] * 3
    results = await asyncio.gather(*(ask(engine, one) for one in [*bad, *good]), return_exceptions=True)
    assert [type(r) for r in results[:3]] == [NotFinite] * 3
    for got, alone in zip(results[3:], expected, strict=True):
        assert not isinstance(got, BaseException)
        assert got.ids == alone.ids
        assert got.values == pytest.approx(alone.values, abs=1e-4)


async def test_blocks_that_held_it_serve_others(engine: LocalEngine) -> None:
    expected = await ask(engine, request(PROMPT, "", 12))
    for _ in range(3):
        for name in ("huge_lora", "huge_prefix"):
            with pytest.raises(NotFinite):
                await ask(engine, request([*PROMPT, 5, 6, 7, 8, 9, 10, 11], name, 12))
        wanted = [request([*PROMPT[:i]], name, 12) for i in range(3, 8) for name in ("", "lora")]
        for answer in await ask_all(engine, wanted):
            assert len(answer.ids) == 12
        assert (await ask(engine, request(PROMPT, "", 12))).ids == expected.ids


async def test_a_long_prompt_ends_in_its_first_chunk_that_shows_it(engine: LocalEngine) -> None:
    """Log-probabilities of the prompt are wanted before anything is drawn: that must end the row too."""
    with pytest.raises(NotFinite):
        await asyncio.wait_for(ask(engine, request(PROMPT * 5, "huge_lora", 2, prompt_logprobs=1)), 20)
