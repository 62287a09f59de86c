"""transformers' continuous batching over the same random Llama, with PEFT's LoRA where peft is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.engine_model import synchronize

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ContinuousBatching:
    """One model, kept running between workloads."""

    def __init__(self, module: PreTrainedModel, rows: int, row_tokens: int, batch_tokens: int) -> None:
        fields = ContinuousBatchingConfig.__dataclass_fields__
        block = "page_size" if "page_size" in fields else "block_size"
        blocks = rows * (-(-row_tokens // 16) + 1) + 16
        settings: dict[str, Any] = {block: 16, "num_blocks": blocks, "max_batch_tokens": batch_tokens}
        batching = ContinuousBatchingConfig(**settings)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=row_tokens)
        module.set_attn_implementation("sdpa")
        self._device = module.device
        model: Any = module
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()

    def generate(self, prompts: Sequence[tuple[int, ...]], new_tokens: int, seconds: float) -> float:
        """Tokens a second. TimeoutError after so many seconds."""
        started = time.perf_counter()
        waiting = {self._manager.add_request(list(prompt), max_new_tokens=new_tokens) for prompt in prompts}
        tokens = 0
        while waiting:
            if time.perf_counter() - started > seconds:
                raise TimeoutError(f"expected an answer within {seconds:.0f} s")
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped")
            if result is not None and result.is_finished():
                waiting.discard(result.request_id)
                tokens += len(result.generated_tokens)
        synchronize(self._device)
        return tokens / (time.perf_counter() - started)

    def close(self) -> None:
        self._manager.stop(block=True)


def with_peft(module: PreTrainedModel, rank: int) -> PreTrainedModel | None:
    """The same model with one of PEFT's LoRAs on every linear layer of its blocks; None where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig

    model: Any = module
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS, init_lora_weights=False))
    return module


def room_for(module: PreTrainedModel) -> bool:
    """Is there room on the device for one more model of this size, and as much again for its cache and activations?"""
    if module.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(module.device)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return bool(free > 1.5 * size)
