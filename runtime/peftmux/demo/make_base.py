"""Make the embedded base models: `python -m peftmux.demo.make_base [--size small] [--out DIR]`.

Everything comes from the seed: text, tokenizer, initial weights, order. On one kind of machine with the same torch and
the same number of threads the files are bit-equal. Elsewhere the tokenizer still is, but sums are rounded in another
order and the weights differ as those of two equally good runs do.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from peftmux.demo import BASE, SMALL
from peftmux.demo.corpus import Document, documents
from peftmux.demo.tokenizer import START, build_tokenizer

STEPS, DOCUMENTS_PER_STEP, LEARNING_RATE = 2400, 48, 3e-3
TOKENIZER_DOCUMENTS = 20_000
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: list[int]
    learnt: list[bool]
    """Which tokens count in the loss."""


@dataclass(frozen=True, slots=True)
class Size:
    width: int
    heads: int
    out: Path
    """Where it is embedded."""


SIZES = {"base": Size(256, 8, BASE), "small": Size(128, 4, SMALL)}


def config(vocabulary: int, eos: int, pad: int, size: Size) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=4,
        num_attention_heads=size.heads,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def text_of(document: Document) -> str:
    return document if isinstance(document, str) else "\n".join(f"{role}\n{content}" for role, content in document)


def encode(tokenizer: PreTrainedTokenizerBase, document: Document) -> Encoded:
    """The chat template's ids; what the assistant says is learnt, with its end of turn, and all of a plain text."""
    if isinstance(document, str):
        ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        return Encoded(ids, [True] * len(ids))
    ids, learnt = [], []
    for role, content in document:
        opening = tokenizer(f"{START}{role}\n")["input_ids"]
        said = [*tokenizer(content)["input_ids"], tokenizer.eos_token_id]
        ids += [*opening, *said, *tokenizer("\n")["input_ids"]]
        learnt += [False] * len(opening) + [role == "assistant"] * len(said) + [False]
    return Encoded(ids, learnt)


def micro_batches(batch: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    """Rows of like length together, so that little is padded."""
    rows: list[Encoded] = []
    for row in sorted(batch, key=lambda row: len(row.ids)):
        if rows and len(row.ids) > 1.3 * len(rows[0].ids):
            yield rows
            rows = []
        rows.append(row)
    yield rows


def padded(rows: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, T], targets [N, T] (IGNORED where not learnt), weights [N, 1].

    A row weighs the square root of its learnt length: between counting tokens (stories would hide the tasks) and rows.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), IGNORED)
    weights = torch.empty(len(rows), 1)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        targets[index, : len(row.ids)] = ids[index, : len(row.ids)].where(torch.tensor(row.learnt), IGNORED)
        weights[index] = sum(row.learnt) ** -0.5
    return ids, targets, weights


def backward(model: Qwen2ForCausalLM, batch: Sequence[Encoded], pad: int) -> float:
    """Add the gradient of the batch's weighted mean loss; returns that loss in nats per token."""
    pieces = [padded(rows, pad) for rows in micro_batches(batch)]
    total = sum(float(((targets != IGNORED) * weights).sum()) for _, targets, weights in pieces)
    loss = 0.0
    for ids, targets, weights in pieces:
        logits = model(input_ids=ids[:, :-1]).logits  # right-padded and causal: padding is never seen by a real token
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        part = (losses * weights).sum() / total
        part.backward()
        loss += part.item()
    return loss


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warm = max(1, min(100, steps // 10))
    if step < warm:
        return LEARNING_RATE * (step + 1) / warm
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def make_tokenizer(seed: int) -> PreTrainedTokenizerBase:
    return build_tokenizer(text_of(document) for document in itertools.islice(documents(seed), TOKENIZER_DOCUMENTS))


def train(steps: int, seed: int, size: Size) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer. Prints the loss now and then."""
    tokenizer = make_tokenizer(seed)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, size))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    stream = (encode(tokenizer, document) for document in documents(seed + 1))
    started, loss = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        loss += backward(model, list(itertools.islice(stream, DOCUMENTS_PER_STEP)), tokenizer.pad_token_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {loss / (step % 50 + 1):.3f}  {seconds:.0f} s", flush=True)
            loss = 0.0
    return model, tokenizer


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Weights in bfloat16, as safetensors, beside the tokenizer and the chat template."""
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m peftmux.demo.make_base", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--out", type=Path, help="default: where it is embedded")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    size: Size = SIZES[args.size]
    out: Path = args.out or size.out
    save(*train(args.steps, args.seed, size), out)
    print(f"wrote {out}: {sum(file.stat().st_size for file in out.iterdir()):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
