"""Builds an engine from its configuration: the one place that knows all of its pieces."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import torch

from peftmux.adapters.lower import served_kinds
from peftmux.runtime.engine.adapters import AdapterManager
from peftmux.runtime.engine.api import ModelInfo
from peftmux.runtime.engine.core import Deliveries, EngineCore
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import EngineObserver
from peftmux.runtime.engine.placement import DevicePlacement, prepare
from peftmux.runtime.engine.request import ActiveRequest
from peftmux.runtime.engine.text import Text
from peftmux.runtime.engine.thread import EngineThread
from peftmux.runtime.errors import InvalidRequest, UnsupportedModel
from peftmux.runtime.model.cache import block_bytes
from peftmux.runtime.model.graphs import decode_graphs
from peftmux.runtime.model.load import load_model
from peftmux.runtime.model.loaded import LoadedModel
from peftmux.runtime.model.runner import Runner
from peftmux.runtime.residency.loader import Loader
from peftmux.runtime.scheduler import Scheduler
from peftmux.runtime.threads import in_own_thread

_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BLOCK_SIZE = 16
"""Tokens of a cache block, unless configured."""
_HOST_CACHE_BYTES = 4 << 30
_DEVICE_CACHE_SHARE = 0.85
"""Of the memory that is free on the GPU once the model is loaded."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is built from; None lets the device decide."""

    model: str
    adapters_root: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    """(name, folder), loaded at start."""
    watch_seconds: float | None = None
    """Between two looks at the adapter root, whose folders are loaded as they appear; None loads only what is asked."""
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    """nf4, int8 (bitsandbytes) or fp8 (torchao): quantise the base's linear layers while loading."""
    max_batch_tokens: int | None = None
    """Tokens a step: 512 on the CPU, 2048 on a GPU."""
    max_rows: int = 256
    max_queued_requests: int = 256
    kv_cache_memory: int | None = None
    """Bytes: at most 4 GiB on the CPU, 85 % of what is free on a GPU; never more than all rows at full length need."""
    adapter_memory: int | None = None
    """Bytes that adapters may hold on the device; None is no limit."""
    block_size: int = BLOCK_SIZE
    prefix_caching: bool = True
    num_threads: int | None = None
    context_length: int | None = None


async def start_engine(config: EngineConfig, observer: EngineObserver) -> LocalEngine:
    """Load the model and its start-up adapters and start the engine's thread, for the running loop.

    Raises UnsupportedModel, InvalidRequest for a bad setting, and AdapterError for an adapter that cannot be loaded.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, dtype = _device(config.device), _dtype(config.dtype)
    loop = asyncio.get_running_loop()

    def build() -> LocalEngine:
        model = load_model(
            config.model,
            device=device,
            dtype=dtype,
            context_length=config.context_length,
            quantization=config.quantization,
        )
        return build_engine(model, config, observer, loop)

    engine = await asyncio.wrap_future(in_own_thread(build, "peftmux-start"))
    try:
        for name, folder in config.adapters:
            await engine.load_at_start(name, folder)
        await engine.warm_up()
        if config.watch_seconds is not None:
            await _follow(engine, config.adapters_root, config.watch_seconds)
    except BaseException:
        await engine.drain(0.0)
        raise
    return engine


def build_engine(
    model: LoadedModel,
    config: EngineConfig,
    observer: EngineObserver,
    loop: asyncio.AbstractEventLoop | None = None,
) -> LocalEngine:
    """As `start_engine`, over a model that is loaded already, for `loop` or the one that runs."""
    num_blocks = _num_blocks(model, config)
    budget = config.max_batch_tokens or (512 if model.device.type == "cpu" else 2048)
    scheduler = Scheduler(num_blocks, config.block_size, budget, config.max_rows, config.prefix_caching)
    graphs = decode_graphs(model, config.max_rows, budget, config.block_size, observer.graphs_failed)
    runner = Runner(model, num_blocks, config.block_size, graphs)

    def release(active: ActiveRequest) -> None:
        if active.revision is not None:
            adapters.store.release(active.revision)

    def deliver(deliveries: Deliveries) -> None:
        engine.deliver(deliveries)

    core = EngineCore(scheduler, runner, observer, release, config.max_queued_requests, _runs_ahead(model))
    thread = EngineThread(core, deliver, config.num_threads)
    loader = Loader(model, config.adapters_root, lambda lowered: prepare(model, lowered, config.block_size))
    placement = DevicePlacement(scheduler, runner, config.adapter_memory)
    adapters = AdapterManager(loader, placement, thread, observer)
    info = _info(model, budget, config.max_queued_requests)
    engine = LocalEngine(
        info,
        Text(model.tokenizer),
        core,
        thread,
        adapters,
        model.end_token_ids,
        model.pad_token_id,
        loop or asyncio.get_running_loop(),
    )
    thread.start()
    return engine


async def _follow(engine: LocalEngine, root: str | None, seconds: float) -> None:
    if root is None:
        raise InvalidRequest("watch_seconds", "expected an adapter root to watch, got none")
    try:
        await engine.follow_root(root, seconds)
    except OSError as error:
        raise InvalidRequest("adapters_root", f"the adapter root cannot be read: {error}") from error


def _runs_ahead(model: LoadedModel) -> bool:
    """Where a step is launched and not waited for."""
    return model.device.type == "cuda"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel("expected a CUDA device, got none: torch sees no GPU here")
    if name not in ("cpu", "cuda"):
        raise InvalidRequest("device", f"expected auto, cpu or cuda, got {name!r}")
    return torch.device(name)


def _dtype(name: str) -> torch.dtype | None:
    if name not in _DTYPES:
        raise InvalidRequest("dtype", f"expected one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _num_blocks(model: LoadedModel, config: EngineConfig) -> int:
    """Blocks the cache memory holds, the padding block included. UnsupportedModel where not one row fits."""
    size = block_bytes(model.kv_shapes, config.block_size, model.dtype)
    useful = config.max_rows * -(-model.context_length // config.block_size) + 1
    memory = config.kv_cache_memory if config.kv_cache_memory is not None else _cache_memory(model.device)
    blocks = min(useful, memory // size)
    if blocks < 2:
        raise UnsupportedModel(
            f"expected KV cache memory for at least 2 blocks of {size} bytes, got {memory} bytes in all"
        )
    return blocks


def _cache_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _DEVICE_CACHE_SHARE)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_HOST_CACHE_BYTES, available // 2)


def _info(model: LoadedModel, max_batch_tokens: int, max_queued_requests: int) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        architecture=model.architecture,
        vocabulary_size=model.vocab_size,
        context_length=model.context_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        parameters=model.parameters,
        adapter_kinds=served_kinds(model),
        max_batch_tokens=max_batch_tokens,
        max_queued_requests=max_queued_requests,
    )
