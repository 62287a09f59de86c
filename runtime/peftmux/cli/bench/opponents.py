"""transformers' own engines on the same workload, in a process of their own.

Run as a module with a model folder; reads one JSON object a line, {"engine": ..., "jobs": [...]}, and answers each with
{"seconds": ..., "tokens": ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

from peftmux.cli.bench.workload import Workload

_CACHE: dict[str, Any] = {"num_blocks": 1024, "max_batch_tokens": 512}


class ContinuousBatching:
    """`init_continuous_batching` over the paged cache, kept running between workloads."""

    def __init__(self, model: Any) -> None:
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=96)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=_batching_config()
        )
        self._manager.start()

    def __call__(self, workload: Workload) -> int:
        waiting = {self._manager.add_request(list(job.prompt), max_new_tokens=job.new_tokens) for job in workload.jobs}
        tokens = 0
        while waiting:
            result = self._manager.get_result(timeout=10)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped")
            elif result.is_finished():
                waiting.discard(result.request_id)
                tokens += len(result.generated_tokens)
        return tokens

    def close(self) -> None:
        self._manager.stop(block=True)


def _batching_config() -> ContinuousBatchingConfig:
    """Blocks of 16, under the name that this release of transformers gives them."""
    fields = ContinuousBatchingConfig.__dataclass_fields__
    block = "page_size" if "page_size" in fields else "block_size"
    return ContinuousBatchingConfig(**{block: 16, **_CACHE})


class Padded:
    """`generate` on one left-padded batch; every row runs as long as the longest."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, workload: Workload) -> int:
        width = max(len(job.prompt) for job in workload.jobs)
        longest = max(job.new_tokens for job in workload.jobs)
        ids = [[0] * (width - len(job.prompt)) + list(job.prompt) for job in workload.jobs]
        mask = [[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in workload.jobs]
        device = self._model.device
        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return workload.new_tokens  # what was asked for; the padding's tokens are nobody's

    def close(self) -> None:
        pass


ENGINES: dict[str, Callable[[Any], Any]] = {"continuous batching": ContinuousBatching, "padded generate": Padded}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", attn_implementation="sdpa")
    model = model.eval().to(args.device)
    for line in sys.stdin:
        order = json.loads(line)
        engine = ENGINES[order["engine"]](model)
        workload = Workload.from_json(json.dumps(order["jobs"]))
        engine(Workload(workload.jobs[:1]))  # start-up is not counted
        started = time.perf_counter()
        tokens = engine(workload)
        seconds = time.perf_counter() - started
        engine.close()
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
