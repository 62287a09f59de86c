"""A corpus of broken adapters, of every kind that is served: each is refused, soon, and no row beside it changes."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peftmux.adapters.errors import AdapterInvalid
from peftmux.runtime.engine.local import LocalEngine
from tests.adapters.test_hub_refusals import BOTTLENECK, FUSED
from tests.adapters.test_hub_refusals import LORA as HUB_LORA
from tests.adapters.test_ladder_refusals import LADDER, save_ladder
from tests.adapters.test_refusals import LORA, PREFIX
from tests.adapters.test_vocabulary_refusals import ALL
from tests.engine.harness import FIXTURES, ask, check_quiet, load, request, running
from tests.folders import GENERATES

SECONDS = 2.0
PROMPTS = [[5, 9, 17, 33, 60, 7], [44, 12, 80], [21] * 9]
BESIDE = ["", "lora", "ia3", "prefix"]

Damage = Callable[[Path], object]


def tensors_of(folder: Path) -> Path:
    found = [*folder.glob("**/adapter_model.safetensors"), *folder.glob("**/adapter.safetensors")]
    return sorted(found)[0]


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = tensors_of(folder)
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return damage


def first(tensors: dict[str, torch.Tensor]) -> str:
    """A copy of the base's weight may be missing, so it is none of these."""
    own = {name: t for name, t in tensors.items() if t.numel() and t.is_floating_point() and "base_layer" not in name}
    return min(own)


def grown(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors)
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def typed(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors)
    tensors[name] = tensors[name].to(torch.int16)


def with_field(folder: Path) -> None:
    path = tensors_of(folder).parent / "adapter_config.json"
    config = json.loads(path.read_text())
    config.get("config", config)["from_the_future"] = 3
    path.write_text(json.dumps(config))


DAMAGES: dict[str, Damage] = {
    "a tensor missing": edited(lambda tensors: tensors.pop(first(tensors))),
    "a tensor too many": edited(lambda tensors: tensors.update({"base_model.model.odd.weight": torch.ones(2)})),
    "a shape": edited(grown),
    "not finite": edited(poisoned),
    "a dtype": edited(typed),
    "a field": with_field,
    "cut short": lambda folder: tensors_of(folder).write_bytes(tensors_of(folder).read_bytes()[:-7]),
}


def corpus(root: Path) -> Iterator[str]:
    """Names of broken folders below `root`."""
    folders = {name: FIXTURES / name for name in GENERATES if "/llama/" in name}
    folders["ladder"] = save_ladder(root / "ladder")
    made = [(folder, DAMAGES[damage]) for folder in folders.values() for damage in DAMAGES]
    known: dict[Path, dict[str, Any]] = {FIXTURES / "peft/llama" / name: cases for name, cases in ALL.items()}
    known |= {FIXTURES / "peft/llama/lora": dict(LORA), FIXTURES / "peft/llama/prefix": dict(PREFIX)}
    hub = {"lora": HUB_LORA, "pfeiffer_seq_bn": BOTTLENECK, "fusion": FUSED}
    known |= {FIXTURES / "adapterhub/llama" / name: dict(cases) for name, cases in hub.items()}
    known[folders["ladder"]] = dict(LADDER)
    made += [(folder, cases[case][2]) for folder, cases in known.items() for case in cases]
    for index, (source, damage) in enumerate(made):
        folder = root / f"broken-{index}"
        shutil.copytree(source, folder)
        damage(folder)
        yield folder.name


async def generate(engine: LocalEngine) -> list[list[int]]:
    jobs = [request(ids, name, 24) for name in BESIDE for ids in PROMPTS]
    return [answer.ids for answer in await asyncio.gather(*(ask(engine, job) for job in jobs))]


async def test_each_is_refused_and_no_row_changes(tmp_path: Path) -> None:
    for name in BESIDE[1:]:
        shutil.copytree(FIXTURES / "peft/llama" / name, tmp_path / name)
    names = list(corpus(tmp_path))
    assert len(names) >= 300
    async with running(adapters_root=str(tmp_path)) as engine:
        usage = engine.stats().kv_cache_usage
        for name in BESIDE[1:]:
            await load(engine, name)
        expected = await generate(engine)
        held = engine.stats().kv_cache_usage
        running_rows = asyncio.create_task(generate(engine))
        messages = set()
        for name in names:
            started = time.monotonic()
            try:
                await load(engine, name)
            except AdapterInvalid as refusal:
                messages.add(str(refusal))
            else:
                raise AssertionError(f"{name} was loaded")
            assert time.monotonic() - started < SECONDS, name
            if running_rows.done():
                assert running_rows.result() == expected
                running_rows = asyncio.create_task(generate(engine))
        assert await running_rows == expected
        assert [info.name for info in engine.list_adapters()] == sorted(BESIDE[1:])
        assert engine.stats().kv_cache_usage == held
        assert len(messages) > len(names) / 3, "messages name what is wrong with each"
        for name in BESIDE[1:]:
            await engine.unload_adapter(name)
        await check_quiet(engine, usage)
