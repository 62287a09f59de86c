"""VoRA: image rows, values and gradients of the paper's formula in plain torch, whole runs, the engine's numbers."""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftmux.adapters.images import MARKER, ImageRule, cut_patches, decode_image
from peftmux.runtime.engine.factory import EngineConfig, build_engine
from peftmux.runtime.engine.observer import NullObserver
from peftmux.runtime.engine.text import Text
from peftmux.runtime.model.load import fit_model
from peftmux.runtime.params import Image
from peftmux.runtime.server.images import marked_positions
from peftmux.trainer import DataError, OptionError, train
from peftmux.trainer.cli import main
from peftmux.trainer.data import Example, encode_rows, read_rows
from peftmux.trainer.data.images import PlacedImage, RowImage
from peftmux.trainer.host.host import Host
from peftmux.trainer.methods import METHODS, AttachContext
from tests.engine.harness import ask, load
from tests.model.test_vora_served import LINEARS, MEAN, PATCH, RANK, SIDE, STD, WIDTH, PaperModel, base_of, with_images
from tests.trainer.method_runs import QUICK, assert_equal, check_learns, check_resumes, check_seeds, tensors
from tests.trainer.tiny_models import build_model, build_tokenizer, random_ids, scramble, write_rows

CONFIG: dict[str, Any] = {
    "r": RANK,
    "patch_size": PATCH,
    "image_size": PATCH * SIDE,
    "vision_embedding_intermediate_size": WIDTH,
    "image_mean": MEAN,
    "image_std": STD,
}
RULE = ImageRule(PATCH, PATCH * SIDE, tuple(MEAN), tuple(STD), True)
EACH = SIDE * SIDE
COLOURS = {"AB": (255, 0, 0), "CD": (0, 255, 0), "EF": (0, 0, 255), "FA": (255, 255, 255)}


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """pixels: [height, width, 3]."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (PATCH * SIDE, PATCH * SIDE, 3)))


def pixels_of(file: bytes) -> Tensor:
    return decode_image(file, RULE)


def attach(model: Any, config: dict[str, Any] | None = None) -> Any:
    chosen = METHODS["vora"]
    return chosen.attach(model, chosen.config_class(**{**CONFIG, **(config or {})}), AttachContext(seed=0))


def placed(adapter: Any, ids: list[int], images: list[tuple[int, bytes]]) -> list[int]:
    own = tuple(PlacedImage(at, RowImage(file, Path("rows.jsonl"), 1, 0)) for at, file in images)
    return list(adapter.place(Example(ids, ids, images=own)).input_ids)


def colour_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Which of four colours a noisy image has, once in front and once where the text says."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    rows = []
    for i in range(count):
        name = draw.choice(list(COLOURS))
        raw = np.clip(np.array(COLOURS[name]) + rng.normal(0, 40, (PATCH * SIDE, PATCH * SIDE, 3)), 0, 255)
        text = "?=" if i % 2 else f"a{MARKER}="
        rows.append({"prompt": text, "completion": name, "images": [base64.b64encode(png(raw)).decode()]})
    return rows


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("seen") / "rows.jsonl", colour_rows(64))


PROMPTS: list[tuple[list[int], list[int]]] = [
    ([5, 9, 17, 33, 3, 7, 8], [3]),
    ([101, 44, 3, 60, 7, 9, 11], [0, 4]),
    ([101, 44, 3, 60, 8, 1, 2], [4, 4]),
    ([11, 12, 13, 14, 15, 16, 17], []),
]
"""Ids, and where images stand among them; two that touch see each other."""


@pytest.mark.parametrize("mask", ["bidirectional", "default"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma"])
def test_values_and_gradients_are_the_formulas(family: str, mask: str):
    model, base = base_of(family), base_of(family)
    adapter = attach(model, {"target_modules": LINEARS[family], "layers": 2, "vision_attention_mask": mask})
    scramble(adapter)
    own = {name: t.clone().requires_grad_() for name, t in adapter.tensors().items()}
    assert own.keys() == adapter.parameters.keys()
    paper = PaperModel(family, base.requires_grad_(False), own, mask == "bidirectional")
    ours, theirs = [], []
    for number, (prompt, places) in enumerate(PROMPTS):
        images = [(at, noise(10 * number + i)) for i, at in enumerate(places)]
        ids = torch.tensor([placed(adapter, prompt, images)])
        assert ids.shape[1] == len(prompt) + EACH * len(images)
        ours.append(model(input_ids=ids).logits[0])
        shown = [(at, pixels_of(file)) for at, file in images]
        theirs.append(PaperModel.logits.__wrapped__(paper, prompt, shown, []))  # type: ignore[attr-defined]
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-4, atol=1e-4)
    for logits in (ours, theirs):
        sum(row.square().mean() for row in logits).backward()  # type: ignore[union-attr]
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_rows_of_a_batch_are_each_as_if_alone(how: str):
    """Padding, rows without images, and the rows of other adapters, one with a prefix."""
    model = build_model("llama")
    model.set_attn_implementation(how)
    vora = attach(model)
    with Host.of(model).aside():
        prefix = METHODS["prefix"].attach(model, METHODS["prefix"].config_class(num_virtual_tokens=3), AttachContext(1))
        prompt = METHODS["prompt"].attach(model, METHODS["prompt"].config_class(num_virtual_tokens=2), AttachContext(1))
    for adapter in (vora, prefix, prompt):
        scramble(adapter)
    rows = [placed(vora, [5, 9, 17, 33], [(2, noise(1))]), [7, 8, 9, 10, 11], placed(vora, [4, 5], [(0, noise(2))])]
    width = max(map(len, rows))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    others = random_ids(2, width)
    host = Host.of(model)
    with torch.no_grad():
        with host.only(vora.key):
            alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
            together = model(input_ids=batch).logits
        own = []
        for adapter in (prefix, prompt):
            with host.only(adapter.key):
                own.append(model(input_ids=others).logits[:, -width:])
        with host.rows({prefix.key: 2, vora.key: 3, prompt.key: 2}):
            mixed = model(input_ids=torch.cat([others, batch, others])).logits
    for row, logits in enumerate(alone):
        torch.testing.assert_close(together[row, : len(logits)], logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(mixed[2 + row, : len(logits)], logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[:2, :width], own[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(mixed[5:, -width:], own[1], rtol=0, atol=1e-4)


def test_an_untouched_image_is_only_patches():
    """A fresh adapter changes no row without images: its pairs start at zero."""
    model, ids = build_model("qwen2"), random_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapter = attach(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-6)
        adapter.detach()
        assert torch.equal(model(input_ids=ids).logits, before)


def test_tokens_stand_where_a_server_puts_them(tmp_path: Path):
    """Text and chat, with and without markers, as `peftmux.v1` reads them."""
    tokenizer, text = build_tokenizer(), Text(build_tokenizer())
    image = base64.b64encode(noise(1)).decode()
    prompts = [("ab", 1), (f"a{MARKER}b", 1), (f"{MARKER}{MARKER}b", 2), (f"a{MARKER}", 1)]
    rows: list[dict[str, Any]] = [{"prompt": p, "completion": "xy", "images": [image] * n} for p, n in prompts]
    write_rows(tmp_path / "a.jsonl", rows)
    examples = encode_rows(read_rows(tmp_path / "a.jsonl"), tokenizer, "a", max_length=99).examples
    for (prompt, count), example in zip(prompts, examples, strict=True):
        pieces = text.encode_around(prompt, MARKER)
        ids, positions = marked_positions(pieces, count)
        assert tuple(example.input_ids[: len(ids)]) == ids
        assert [p.at for p in example.images] == positions
        assert example.labels[: len(ids)] == [-100] * len(ids)
    turns = [("user", f"{MARKER}what?{MARKER}")]
    chat = [{"role": "user", "content": turns[0][1]}, {"role": "assistant", "content": "ok"}]
    write_rows(tmp_path / "b.jsonl", [{"messages": chat, "images": [image, image]}])
    (example,) = encode_rows(read_rows(tmp_path / "b.jsonl"), tokenizer, "b", max_length=99).examples
    ids, positions = marked_positions(text.encode_around(turns, MARKER), 2)
    assert tuple(example.input_ids[: len(ids)]) == ids
    assert [p.at for p in example.images] == positions


def test_every_way_to_give_an_image_is_the_same_image(tmp_path: Path):
    file = noise(4)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(file)
    code = base64.b64encode(file).decode()
    given = ["pictures/a.png", str(tmp_path / "pictures" / "a.png"), code, f"data:image/png;base64,{code}"]
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "images": given}])
    (row,) = read_rows(tmp_path / "rows.jsonl")
    wanted = cut_patches(pixels_of(file), PATCH)[2]
    assert row.images is not None
    assert all(torch.equal(image.patches(RULE), wanted) for image in row.images)


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        (["no/such.png"], "a", r"images\[0\]: expected a file that exists, or base64; found 'no/such.png'"),
        ([base64.b64encode(b"GIF89a no").decode()], "a", r"images\[0\]: expected an image file such as PNG or JPEG"),
        ("a.png", "a", "column 'images': expected a list of at most 64 images, found str"),
        ([3], "a", r"images\[0\]: expected a file's path or base64, found int"),
        ([], f"a{MARKER}", r"expected as many images as the row has '<image>' \(1\), found 0"),
        ([base64.b64encode(noise(1)).decode()] * 2, f"a{MARKER}", r"\(1\), found 2"),
    ],
)
def test_bad_images_are_refused_with_their_line(
    images: Any, prompt: str, message: str, qwen2: Path, seen: Path, tmp_path: Path
):
    good = json.loads(seen.read_text().splitlines()[0])
    data = write_rows(tmp_path / "rows.jsonl", [good, {"prompt": prompt, "completion": "b", "images": images}])
    with pytest.raises(DataError, match=message) as error:
        train("vora", model=qwen2, data=data, out=tmp_path / "a", config=CONFIG, training=QUICK)
    assert "rows.jsonl:2" in str(error.value)
    assert not (tmp_path / "a").exists()


def test_an_image_that_breaks_off_is_refused_with_its_line(qwen2: Path, tmp_path: Path):
    """Its beginning is right, so this shows only when it is decoded."""
    cut = base64.b64encode(png(np.random.default_rng(1).integers(0, 256, (64, 64, 3)))[:-4000]).decode()
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "images": [cut]}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*expected an image file") as _:
        train("vora", model=qwen2, data=data, out=tmp_path / "a", config=CONFIG, training=QUICK)
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_trained_is_refused(qwen2: Path, seen: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "out": tmp_path / "a", "training": QUICK}
    with pytest.raises(OptionError, match="from which lora cannot learn: train vora"):
        train("lora", data=seen, **run)
    with pytest.raises(OptionError, match="expected rows with images"):
        train("vora", data=rows, config=CONFIG, **run)
    with pytest.raises(OptionError, match="sliding window"):
        attach(build_model("mistral"))
    with pytest.raises(OptionError, match="OPTForCausalLM takes no mask"):
        attach(build_model("opt"))
    with pytest.raises(OptionError, match="image-size: expected a patch's 2 or more, got 1"):
        METHODS["vora"].config_class(**{**CONFIG, "image_size": 1})
    with pytest.raises(OptionError, match="expected three numbers each"):
        METHODS["vora"].config_class(**{**CONFIG, "image_std": [1.0, 0.0, 1.0]})
    labelled = write_rows(tmp_path / "l.jsonl", [{"text": "a", "label": "x", "images": []}])
    with pytest.raises(DataError, match="only text is learned from images"):
        train("vora", data=labelled, task="sequence", config=CONFIG, **run)


def test_packing_checkpointing_and_the_command(qwen2: Path, seen: Path, tmp_path: Path, capsys: Any):
    words = ["vora", "--model", str(qwen2), "--data", str(seen), "--max-steps", "3", "--disable-tqdm", "true"]
    words += ["--r", str(RANK), "--patch-size", str(PATCH), "--image-size", str(PATCH * SIDE), "--seed", "2"]
    words += ["--vision-embedding-intermediate-size", str(WIDTH), "--per-device-train-batch-size", "64"]
    words += ["--image-mean", *map(str, MEAN), "--image-std", *map(str, STD)]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert main([*words, "--out", str(tmp_path / "saved"), "--gradient-checkpointing", "true"]) == 0
    assert main([*words, "--out", str(tmp_path / "packed"), "--packing", "--pack-length", "4096"]) == 0
    assert main([*words, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    plain = tensors(tmp_path / "plain")
    for other in ("saved", "packed"):
        for name, tensor in tensors(tmp_path / other).items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=2e-5, msg=f"{other} {name}")


def test_beside_other_jobs_it_is_its_solo_run(qwen2: Path, seen: Path, rows: Path, tmp_path: Path):
    common = f"model: {qwen2}, max_steps: 4, per_device_train_batch_size: 4, disable_tqdm: true"
    own = ", ".join(f"{name}: {value}" for name, value in CONFIG.items())
    (tmp_path / "jobs.yaml").write_text(
        f"defaults: {{{common}}}\n"
        "jobs:\n"
        f"  - {{name: vora, method: vora, data: {seen}, out: {tmp_path / 'v'}, {own}}}\n"
        f"  - {{name: prefix, method: prefix, data: {rows}, out: {tmp_path / 'p'}, num_virtual_tokens: 3}}\n"
    )
    assert main(["--jobs", str(tmp_path / "jobs.yaml")]) == 0
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "disable_tqdm": True}
    train("vora", model=qwen2, data=seen, out=tmp_path / "solo", config=CONFIG, training=training)
    solo = tensors(tmp_path / "solo")
    for name, tensor in tensors(tmp_path / "v").items():
        torch.testing.assert_close(tensor, solo[name], rtol=0, atol=5e-5, msg=name)


async def test_the_engine_serves_what_was_trained(qwen2: Path, seen: Path, tmp_path: Path):
    """Encoded images and text in, the trained model's own log-probabilities out."""
    training = {**QUICK, "max_steps": 20}
    result = train("vora", model=qwen2, data=seen, out=tmp_path / "served" / "vora", config=CONFIG, training=training)
    tokenizer, file = build_tokenizer(), noise(9)
    prompt, positions = marked_positions(Text(tokenizer).encode_around(f"a{MARKER}=", MARKER), 1)
    ids = placed(result.adapter, list(prompt), [(positions[0], file)])
    expected: list[int] = []
    values: list[float] = []
    with torch.no_grad():
        for _ in range(5):
            logits = result.model(input_ids=torch.tensor([ids + expected])).logits[0, -1].log_softmax(-1)
            expected.append(int(logits.argmax()))
            values.append(float(logits.max()))
        blind = result.model(input_ids=torch.tensor([list(prompt)])).logits[0, -1].log_softmax(-1)
    config = EngineConfig(model="qwen2", adapters_root=str(tmp_path / "served"), block_size=4, num_threads=1)
    engine = build_engine(
        fit_model(AutoModelForCausalLM.from_pretrained(qwen2).eval(), None, "qwen2"), config, NullObserver()
    )
    try:
        info = await load(engine, "vora")
        assert (info.kind, info.revision) == ("vora", result.digest)
        asked = replace(with_images(list(prompt), []), images=(Image(positions[0], file),))
        answer = await ask(engine, asked)
    finally:
        await engine.drain(0.0)
    assert answer.ids == expected
    assert answer.values == pytest.approx(values, abs=1e-4)
    assert abs(float(blind.max()) - values[0]) > 1e-2, "it must look for the comparison to mean anything"


def test_whole_runs(taught: Path, qwen2: Path, seen: Path, tmp_path: Path):
    for name in ("learns", "seeds", "resumes"):
        (tmp_path / name).mkdir()
    held_out = write_rows(tmp_path / "eval.jsonl", colour_rows(32, seed=1))
    check_learns("vora", taught, seen, tmp_path / "learns", CONFIG, held_out=held_out)
    check_seeds("vora", qwen2, seen, tmp_path / "seeds", CONFIG)
    check_resumes("vora", qwen2, seen, tmp_path / "resumes", CONFIG)


def test_a_seed_decides_the_patch_embedding():
    first, second, other = (
        METHODS["vora"].attach(build_model("llama"), METHODS["vora"].config_class(**CONFIG), AttachContext(seed))
        for seed in (1, 1, 2)
    )
    assert_equal(first.tensors(), second.tensors())
    name = "vision_embedding.out_proj.weight"
    assert not torch.equal(first.tensors()[name], other.tensors()[name])
