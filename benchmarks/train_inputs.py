"""What benchmarks/train.py trains on: a random Llama with a byte tokenizer, rows of one length and of mixed ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Size:
    """One size of everything. batch: rows of `length` tokens; steps: timed ones, after the first.

    jobs: (rows, tokens) of each job's micro-batch.
    """

    hidden: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    steps: int
    job_count: int
    jobs: tuple[tuple[int, int], ...]

    @property
    def mixed(self) -> tuple[int, int]:
        """The shortest and the longest row of mixed length."""
        return 8, 2 * self.length

    def job_steps(self, rows: int, tokens: int) -> int:
        """Fewer where they are longer."""
        return max(5, min(12, 1000 // (rows * tokens)))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES = {
    "full": Size(768, 12, 16000, 4, 128, 4, 8, ((1, 32), (1, 16), (2, 64), (4, 128))),
    "tiny": Size(64, 2, 300, 2, 32, 2, 3, ((1, 16), (2, 32))),
}


def make_inputs(folder: Path, size: Size, dtype: str) -> None:
    """`base`, `even.jsonl`, `mixed.jsonl`, and a file of rows for each shape of a job."""
    _make_base(folder / "base", size, dtype)
    draw = random.Random(0)
    count = size.batch * (size.steps + 1)
    _write_rows(folder / "even.jsonl", [size.length] * count, draw)
    shortest, longest = size.mixed
    drawn = (int(draw.lognormvariate(0, 0.8) * size.length / 3) for _ in range(16 * count))
    _write_rows(folder / "mixed.jsonl", [max(shortest, min(longest, length)) for length in drawn], draw)
    for rows, tokens in size.jobs:
        _write_rows(folder / f"jobs-{rows}x{tokens}.jsonl", [tokens] * rows * size.job_steps(rows, tokens), draw)


def _make_base(folder: Path, size: Size, dtype: str) -> None:
    heads = max(size.hidden // 64, 2)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)


def _write_rows(path: Path, lengths: Sequence[int], draw: random.Random) -> None:
    """Rows of so many tokens each, their second halves learned; one byte is one token, the end is another."""
    text = ("".join(draw.choices("abcdefgh ", k=length - 1)) for length in lengths)
    halves = ({"prompt": t[: len(t) // 2], "completion": t[len(t) // 2 :]} for t in text)
    path.write_text("".join(json.dumps(row) + "\n" for row in halves))
