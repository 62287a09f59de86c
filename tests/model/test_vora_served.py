"""VoRA (arXiv 2503.20680) served == plain torch: patch embedding, unscaled LoRA, attention both ways in an image."""

from __future__ import annotations

import hashlib
import io
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels import native
from peftmux.runtime.engine import images as engine_images
from peftmux.runtime.engine.api import GenerationRequest
from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.local import LocalEngine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.errors import InvalidRequest
from peftmux.runtime.model.images import patches
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.params import Image, ImagePatches, OutputOptions, SamplingParams, StoppingParams
from tests.engine.harness import ask, ask_all, check_quiet, load, request
from tests.model.families import build
from tests.model.mixtures import hooked, random, sizes, write
from tests.model.test_family_adapters import lora, save_adapter

PATCH, WIDTH, SIDE, RANK, LAYERS = 2, 10, 3, 5, 2
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
LINEARS = {
    "llama": ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen2": ["k_proj", "o_proj", "gate_proj"],
    "gpt2": ["attn.c_attn", "mlp.c_fc"],
    "gemma": ["q_proj", "down_proj"],
}
PLAIN: dict[str, dict[str, Any]] = {"qwen2": {"use_sliding_window": False, "sliding_window": None}}


def base_of(family: str) -> Any:
    return build(family, **PLAIN.get(family, {}))


def fields(family: str, **more: Any) -> dict[str, Any]:
    return {
        "peft_type": "VORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "layers": LAYERS,
        "target_modules": LINEARS[family],
        "patch_size": PATCH,
        "image_size": PATCH * SIDE,
        "vision_embedding": "AIMv2Embedding",
        "vision_embedding_intermediate_size": WIDTH,
        "vision_attention_mask": "bidirectional",
        "image_mean": MEAN,
        "image_std": STD,
        **more,
    }


def adapted_layers(family: str, module: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name, layer in module.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if any(name.endswith("." + ending) for ending in LINEARS[family]) and numbers[0] < LAYERS:
            found[name] = layer
    return found


def tensors_for(family: str, module: Any) -> dict[str, Tensor]:
    torch.manual_seed(8)
    tensors = {
        "vision_embedding.patchifier.proj.weight": torch.randn(WIDTH, 3, PATCH, PATCH),
        "vision_embedding.patchifier.proj.bias": torch.randn(WIDTH),
        "vision_embedding.patchifier.norm.weight": 1 + 0.3 * torch.randn(WIDTH),
        "vision_embedding.pos_embed": torch.randn(1, SIDE * SIDE, WIDTH),
        "vision_embedding.out_proj.weight": 2 * random(48, WIDTH),
    }
    for name, layer in adapted_layers(family, module).items():
        inside, out = sizes(layer)
        tensors[f"llm.{name}.lora_A.weight"] = random(RANK, inside)
        tensors[f"llm.{name}.lora_B.weight"] = random(out, RANK)
    return tensors


def image_tokens(pixels: Tensor, t: dict[str, Tensor]) -> Tensor:
    """pixels: [3, H, W] -> [N, D]."""
    v = "vision_embedding."
    z = nn.functional.conv2d(pixels[None], t[v + "patchifier.proj.weight"], t[v + "patchifier.proj.bias"], stride=PATCH)
    rows, columns = z.shape[2:]
    z = z.flatten(2).transpose(1, 2)
    z = z / torch.sqrt((z**2).mean(-1, keepdim=True) + 1e-5) * t[v + "patchifier.norm.weight"]
    pos = t[v + "pos_embed"]
    if rows * columns <= SIDE * SIDE:
        pos = pos[:, : rows * columns]
    else:
        pos = pos.view(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
        pos = nn.functional.interpolate(pos, size=(rows, columns), mode="bilinear", align_corners=False)
        pos = pos.permute(0, 2, 3, 1).reshape(1, rows * columns, WIDTH)
    return ((z + pos) @ t[v + "out_proj.weight"].T)[0]


class PaperModel:
    def __init__(self, family: str, module: Any, tensors: dict[str, Tensor], both_ways: bool = True) -> None:
        self.module, self.tensors, self.both_ways = module, tensors, both_ways
        self.layers = adapted_layers(family, module)

    @torch.inference_mode()
    def logits(self, prompt: list[int], images: list[tuple[int, Tensor]], more: list[int]) -> Tensor:
        table = self.module.get_input_embeddings()
        parts, seen, at = [], [], 0
        for position, pixels in images:
            vectors = image_tokens(pixels, self.tensors)
            parts += [table(torch.tensor(prompt[at:position], dtype=torch.long)), vectors]
            seen += [0] * (position - at) + [1] * len(vectors)
            at = position
        parts.append(table(torch.tensor([*prompt[at:], *more], dtype=torch.long)))
        x = torch.cat(parts)
        seen += [0] * (len(x) - len(seen))
        mask = torch.full((len(x), len(x)), torch.finfo(torch.float32).min).triu(1)
        start = None
        for i, flag in enumerate([*seen, 0]):
            if flag and start is None:
                start = i
            if not flag and start is not None:
                if self.both_ways:
                    mask[start:i, start:i] = 0
                start = None

        def hook_for(name: str) -> Any:
            a, b = (self.tensors[f"llm.{name}.lora_{m}.weight"] for m in "AB")
            return lambda _layer, inputs, y: y + inputs[0] @ a.T @ b.T

        with hooked(self.module, {name: hook_for(name) for name in self.layers}):
            out: Tensor = self.module(inputs_embeds=x[None], attention_mask=mask[None, None], use_cache=False).logits[0]
        return out

    def greedy(self, prompt: list[int], images: list[tuple[int, Tensor]], count: int) -> tuple[list[int], list[float]]:
        more: list[int] = []
        values = []
        for _ in range(count):
            row = self.logits(prompt, images, more)[-1].log_softmax(-1)
            more.append(int(row.argmax()))
            values.append(float(row.max()))
        return more, values


def patches_of(pixels: Tensor) -> ImagePatches:
    _, height, width = pixels.shape
    values = [
        pixels[:, i : i + PATCH, j : j + PATCH].flatten()
        for i in range(0, height, PATCH)
        for j in range(0, width, PATCH)
    ]
    return ImagePatches(height // PATCH, width // PATCH, torch.stack(values).numpy().astype("<f4").tobytes())


def with_images(prompt: list[int], images: list[tuple[int, Tensor]], **more: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt=tuple(prompt),
        adapter="vora",
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=5, ignore_eos=True),
        output=OutputOptions(logprobs=0),
        images=tuple(Image(position, patches_of(pixels)) for position, pixels in images),
        **more,
    )


def engine_over(family: str, root: Path, **settings: Any) -> LocalEngine:
    config = EngineConfig(model=family, adapters_root=str(root), block_size=4, num_threads=1, **settings)
    return build_engine(fit_model(base_of(family), None, family), config, NullObserver())


PROMPTS: list[tuple[list[int], list[tuple[int, tuple[int, int]]]]] = [
    ([5, 9, 17, 33, 3, 7, 8], [(3, (SIDE, SIDE))]),
    ([5, 9, 17, 33], [(0, (2, 3))]),
    ([101, 44, 3, 60], [(4, (1, 2)), (4, (2, 2))]),
    ([101, 44, 3, 60, 7], [(1, (2, 1)), (4, (4, 5))]),
    ([11, 12, 13], []),
]
"""Prompt, then (position, patches high and wide) of its images: amid it, in front, touching, larger than pos_embed."""


def cases() -> list[tuple[list[int], list[tuple[int, Tensor]]]]:
    torch.manual_seed(12)
    return [(p, [(at, torch.randn(3, PATCH * h, PATCH * w)) for at, (h, w) in images]) for p, images in PROMPTS]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"prefix_caching": False, "max_batch_tokens": 8}),
        ("llama", {"form": "torch", "max_batch_tokens": 8}),
        ("llama", {"mask": "default"}),
        ("qwen2", {"max_batch_tokens": 64}),
        ("gpt2", {}),
        ("gemma", {}),
    ],
    ids=str,
)
async def test_alone_and_mixed(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(settings)
    if settings.pop("form", "") == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    mask = settings.pop("mask", "bidirectional")
    module = base_of(family)
    tensors = tensors_for(family, module)
    write(tmp_path / "vora", fields(family, vision_attention_mask=mask), tensors)
    save_adapter(family, lora(target_modules=[LINEARS[family][0].rpartition(".")[2]]), tmp_path / "lora")
    model = PaperModel(family, module, tensors, mask == "bidirectional")
    engine = engine_over(family, tmp_path, **settings)
    try:
        info = await load(engine, "vora")
        assert (info.kind, info.max_rank, info.tensors) == ("vora", RANK, len(tensors))
        await load(engine, "lora")
        others = [request([5, 9, 17, 33], name, 5) for name in ("", "lora")]
        before = await ask_all(engine, others)
        answers = await ask_all(engine, [*(with_images(p, i) for p, i in cases()), *others])
        again = [await ask(engine, with_images(p, i)) for p, i in cases()]
        await engine.unload_adapter("vora")
        await engine.unload_adapter("lora")
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)
    for (prompt, images), mixed, alone in zip(cases(), answers, again, strict=False):
        ids, values = model.greedy(prompt, images, 5)
        for answer in (mixed, alone):
            assert answer.ids == ids
            assert answer.values == pytest.approx(values, abs=3e-4)
    for one, other in zip(before, answers[-2:], strict=True):
        assert one.ids == other.ids
        assert one.values == pytest.approx(other.values, abs=1e-5)
    if "prefix_caching" not in settings:
        assert again[0].cached > 0


async def test_the_cache_is_the_images(tmp_path: Path) -> None:
    """The same tokens beside another image, and the same image elsewhere, share nothing."""
    module = base_of("llama")
    tensors = tensors_for("llama", module)
    write(tmp_path / "vora", fields("llama"), tensors)
    model = PaperModel("llama", module, tensors)
    torch.manual_seed(1)
    prompt, one, other = list(range(20, 32)), torch.randn(3, 6, 6), torch.randn(3, 6, 6)
    engine = engine_over("llama", tmp_path)
    try:
        await load(engine, "vora")
        asked = [[(2, one)], [(2, other)], [(9, one)], [], [(2, one)]]
        answers = [await ask(engine, with_images(prompt, images)) for images in asked]
    finally:
        await engine.drain(0.0)
    assert [a.cached > 0 for a in answers] == [False, False, False, False, True]
    for images, answer in zip(asked, answers, strict=True):
        assert answer.ids == model.greedy(prompt, images, 5)[0]
    assert answers[0].values != pytest.approx(answers[1].values, abs=1e-3)
    assert answers[0].usage is not None
    assert answers[0].usage.prompt_tokens == len(prompt) + SIDE * SIDE


async def test_images_are_checked_and_named_in_threads_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the loop nor the steps wait for it; the adapter that it was done for is leased meanwhile."""
    write(tmp_path / "vora", fields("llama"), tensors_for("llama", base_of("llama")))
    threads, users = [], []

    def noting(call: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            threads.append(threading.current_thread())
            users.append(engine.get_adapter("vora").requests_in_flight)
            return call(*arguments)

        return noted

    engine = engine_over("llama", tmp_path)
    try:
        await load(engine, "vora")
        monkeypatch.setattr(engine_images, "hashlib", SimpleNamespace(sha256=noting(hashlib.sha256)))
        monkeypatch.setattr(engine_images, "patches", noting(patches))
        await ask(engine, with_images(list(range(20, 32)), [(2, torch.randn(3, 6, 6))]))
        assert len(threads) == 2
        assert not {threading.main_thread(), engine._thread._thread} & set(threads)
        assert users == [1, 1]
        monkeypatch.undo()
        bad = with_images([5, 6], [(1, torch.full((3, 6, 6), torch.nan))])
        with pytest.raises(InvalidRequest, match="finite"):
            await ask(engine, bad)
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)


async def test_an_encoded_image_is_its_pixels(tmp_path: Path) -> None:
    """A square one of the right size, so that no resampling is involved; one that is not is put on black."""
    module = base_of("llama")
    write(tmp_path / "vora", fields("llama"), tensors_for("llama", module))
    size = PATCH * SIDE
    raw = np.random.default_rng(3).integers(0, 256, (size, size, 3), dtype=np.uint8)
    flat = raw[:4]
    on_black = np.zeros_like(raw)
    on_black[1:5] = flat
    engine = engine_over("llama", tmp_path)
    try:
        await load(engine, "vora")
        answers = {}
        for name, shown, meant in (("square", raw, raw), ("wide", flat, on_black)):
            buffer = io.BytesIO()
            PIL.Image.fromarray(shown).save(buffer, "PNG")
            pixels = (torch.from_numpy(meant).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
            plain = with_images([5, 6, 7], [(1, pixels.permute(2, 0, 1))])
            encoded = GenerationRequest(
                plain.prompt,
                "vora",
                plain.sampling,
                plain.stopping,
                plain.output,
                images=(Image(1, buffer.getvalue()),),
            )
            answers[name] = [await ask(engine, one) for one in (plain, encoded)]
        for name, (want, got) in answers.items():
            assert got.ids == want.ids, name
            assert got.values == pytest.approx(want.values, abs=1e-5), name
    finally:
        await engine.drain(0.0)


def png(mode: str, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(file: bytes) -> dict[str, Any]:
    return {"images": (Image(0, file),)}


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "no adapter": ("images", {"adapter": ""}),
    "one without eyes": ("images", {"adapter": "lora"}),
    "past the prompt": (r"images\[0\].position", {"images": (Image(4, ImagePatches(1, 1, b"\0" * 48)),)}),
    "backwards": (
        r"images\[1\].position",
        {"images": (Image(2, ImagePatches(1, 1, b"\0" * 48)), Image(1, ImagePatches(1, 1, b"\0" * 48)))},
    ),
    "too few bytes": (r"images\[0\].patches", {"images": (Image(0, ImagePatches(1, 2, b"\0" * 48)),)}),
    "nothing": (r"images\[0\].patches", {"images": (Image(0, ImagePatches(0, 2, b"")),)}),
    "not finite": (
        r"images\[0\].patches",
        {"images": (Image(0, ImagePatches(1, 1, np.full(12, np.nan, "<f4").tobytes())),)},
    ),
    "not an image": (r"images\[0\].encoded.*: expected an image file .* got something else$", encoded(b"GIF89a no")),
    "a square too large": (r"images\[0\].encoded.* 8192 pixels a side, got 9000 x 1", encoded(png("L", 9000, 1))),
    "16 bits": (r"images\[0\].encoded.*: expected 8 bits a channel", encoded(png("I;16", 6, 6))),
    "with prompt log-probabilities": (r"output.prompt_logprobs", {"output": OutputOptions(prompt_logprobs=1)}),
    "past the context": ("input|max_tokens", {"images": (Image(0, ImagePatches(20, 20, b"\0" * 400 * 48)),)}),
}


async def test_bad_images_are_refused(tmp_path: Path) -> None:
    module = base_of("llama")
    write(tmp_path / "vora", fields("llama"), tensors_for("llama", module))
    save_adapter("llama", lora(target_modules=["q_proj"]), tmp_path / "lora")
    engine = engine_over("llama", tmp_path)
    try:
        await load(engine, "vora")
        await load(engine, "lora")
        good = with_images([5, 6, 7], [(1, torch.randn(3, 2, 2))])
        want = (await ask(engine, good)).ids
        for name, (field, changes) in BAD.items():
            with pytest.raises(InvalidRequest) as error:
                await ask(engine, replace(good, **changes))
            assert re.search(field, said := f"{error.value.field}: {error.value}"), (name, said)
        assert (await ask(engine, good)).ids == want
        await check_quiet(engine)
    finally:
        await engine.drain(0.0)


BROKEN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no patch embedding": ("MISSING_TENSOR", "patchifier.proj.weight", {}, "patchifier.proj.weight"),
    "no positions": ("MISSING_TENSOR", "pos_embed", {}, "pos_embed"),
    "half a pair": ("MISSING_TENSOR", "lora_B", {}, "layers.1.mlp.up_proj.lora_B.weight"),
    "another rank": ("RANK_MISMATCH", "rank 6", {"r": 6}, "-"),
    "more layers": ("MISSING_TENSOR", "layers.2", {"layers": 3}, "-"),
    "fewer layers": ("UNUSED_TENSOR", "layers.1", {"layers": 1}, "-"),
    "another patch": ("SHAPE_MISMATCH", "patchifier", {"patch_size": 3}, "-"),
    "another mask": ("INVALID_FIELD", "vision_attention_mask", {"vision_attention_mask": "causal"}, "-"),
    "a scale": ("UNSUPPORTED_FIELD", "lora_alpha", {"lora_alpha": 16}, "-"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ones_are_refused(case: str, tmp_path: Path) -> None:
    reason, words, changes, missing = BROKEN[case]
    module = base_of("llama")
    tensors = {k: v for k, v in tensors_for("llama", module).items() if missing not in k}
    write(tmp_path / "a", fields("llama", **changes), tensors)
    with pytest.raises(AdapterInvalid, match=words) as error:
        load_adapter(tmp_path / "a", TorchBase(module))
    assert error.value.reason == reason


class OddTable(nn.Embedding):
    """Nobody knows what it does with the rows it looks up."""


@pytest.mark.parametrize(("family", "words"), [("llama", "plain table"), ("mistral", "sliding window")])
def test_bases_that_cannot_see_are_refused(family: str, words: str, tmp_path: Path) -> None:
    module = build(family)
    if family == "llama":
        module.set_input_embeddings(OddTable(128, 48))
    write(tmp_path / "a", fields("llama"), {"x": torch.zeros(1)})
    with pytest.raises(AdapterInvalid, match=words):
        load_adapter(tmp_path / "a", TorchBase(module))
