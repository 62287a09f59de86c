"""X-LoRA (arXiv 2402.07148): PEFT's own logits, and its options against plain torch, in any batch and any steps."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftmux.adapters.convert import convert_adapter
from peftmux.adapters.errors import AdapterInvalid
from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels import native
from tests.engine.harness import FIXTURES, adapters, ask, ask_all, base, check_quiet, load, request, running
from tests.model.families import VOCABULARY, build
from tests.model.mixtures import hooked, logprobs, random, sizes, table, write
from tests.model.test_family_adapters import engine_for

XLORA = FIXTURES / "peft" / "llama" / "xlora"
SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {"block_size": 4},
    "uncached": {"prefix_caching": False},
    "chunked": {"block_size": 4, "max_batch_tokens": 4},
    "torch": {"block_size": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter root with the fixture, converted, and a LoRA."""
    folder = tmp_path_factory.mktemp("xlora")
    convert_adapter(XLORA, folder / "xlora")
    shutil.copytree(Path(adapters()) / "lora", folder / "lora")
    return folder


class PaperModel:
    """X-LoRA in plain torch: every token's shares from the base over the whole text, then all of it once more."""

    def __init__(self, module: Any, tensors: dict[str, Tensor], **options: Any) -> None:
        self.module = module
        self.experts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                path, _, expert = (
                    name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").partition(".experts.")
                )
                self.experts.setdefault(path, {})[int(expert)] = (a, tensors[name.replace("lora_A", "lora_B")])
        self.sites = [n for n, _ in module.named_modules() if n in self.experts]
        layers = sorted({int(n.split(".")[-2]) for n in tensors if "classifier" in n})
        stem = "base_model.internal_xlora_classifier.layers"
        self.classifier = [(tensors[f"{stem}.{n}.weight"], tensors[f"{stem}.{n}.bias"]) for n in layers]
        self.count = 1 + max(max(own) for own in self.experts.values())
        self.options = options

    def shares(self, ids: Tensor) -> Tensor:
        h: Tensor = self.module(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        for w, b in self.classifier[:-1]:
            h = torch.relu(h @ w.T + b)
        w, b = self.classifier[-1]
        answer = h @ w.T + b
        if not self.options.get("layerwise_scalings"):
            answer = answer.repeat(1, 1, len(self.sites))
        g = answer.reshape(*ids.shape, len(self.sites), self.count)
        if self.options.get("enable_softmax", True):
            g = torch.softmax(g / self.options.get("softmax_temperature", 1.0), -1)
        if k := self.options.get("top_k_lora"):
            threshold = g.sort(-1, descending=True).values[..., k - 1 : k]
            g = torch.where(g >= threshold, g, torch.zeros_like(g))
        if self.options.get("enable_softmax_topk"):
            e = torch.where(g == 0, torch.zeros_like(g), g.exp())
            g = e / e.sum(-1, keepdim=True)
        weight: float = self.options.get("global_scaling_weight", 1.0)
        return g * weight

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        g = self.shares(ids)

        def hook_for(site: str) -> Any:
            layer = self.sites.index(site)

            def hook(_layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
                for e, (a, b) in self.experts[site].items():
                    y = y + (inputs[0] * g[:, :, layer, e : e + 1]) @ a.T @ b.T
                return y

            return hook

        with hooked(self.module, {site: hook_for(site) for site in self.sites}):
            out: Tensor = self.module(input_ids=ids).logits
        return out

    def greedy(self, ids: list[int], count: int) -> list[int]:
        text = list(ids)
        for _ in range(count):
            text.append(int(self.logits(torch.tensor([text]))[0, -1].argmax()))
        return text[len(ids) :]


def fixture_model(root: Path) -> PaperModel:
    module = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.float32, attn_implementation="eager").eval()
    return PaperModel(module, load_file(root / "xlora" / "adapter_model.safetensors"), layerwise_scalings=True)


@pytest.mark.parametrize("settings", SETTINGS)
async def test_pefts_logits_alone_and_mixed(settings: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if settings == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    expected = load_file(XLORA / "expected.safetensors")
    model = fixture_model(root)
    torch.testing.assert_close(model.logits(expected["input_ids"]), expected["logits"], atol=1e-4, rtol=0)
    wanted = expected["logits"].log_softmax(-1)
    prompts = expected["input_ids"].tolist()
    async with running(adapters_root=str(root), **SETTINGS[settings]) as engine:
        info = await load(engine, "xlora")
        assert (info.kind, info.max_rank) == ("xlora", 4)
        await load(engine, "lora")
        rows = [request(p, n, 6, prompt_logprobs=96) for p in prompts for n in ("xlora", "lora", "")]
        plain = await ask_all(engine, [request(p, n, 6, prompt_logprobs=96) for p in prompts for n in ("lora", "")])
        mixed = await ask_all(engine, rows)
        alone = [await ask(engine, request(p, "xlora", 6, prompt_logprobs=96)) for p in prompts]
        again = await ask(engine, request([*prompts[0], 7, 8, 9], "xlora", 6))
        await engine.unload_adapter("xlora")
        await engine.unload_adapter("lora")
        await check_quiet(engine)
    for i, prompt in enumerate(prompts):
        for answer in (mixed[3 * i], alone[i]):
            torch.testing.assert_close(small_table(answer), wanted[i, :-1], atol=3e-4, rtol=0)
            assert answer.ids == model.greedy(prompt, 6)
        for j in (1, 2):
            torch.testing.assert_close(
                small_table(mixed[3 * i + j]), small_table(plain[2 * i + j - 1]), atol=1e-5, rtol=0
            )
    assert again.ids == model.greedy([*prompts[0], 7, 8, 9], 6)
    assert (again.cached > 0) is (settings != "uncached"), "both passes find their own keys and values"


def small_table(answer: Any) -> Tensor:
    rows = torch.full((len(answer.prompt_logprobs) - 1, 96), torch.nan)
    for row, entry in zip(rows, answer.prompt_logprobs[1:], strict=True):
        ids, values = zip(*entry.top, strict=True)
        row[list(ids)] = torch.tensor(values)
    return rows


def fields(**options: Any) -> dict[str, Any]:
    return {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "hidden_size": 48,
        "adapters": {"0": "a", "1": "b", "2": "c"},
        "xlora_depth": 3,
        "xlora_size": 8,
        **options,
    }


def tensors_for(module: nn.Module, layers: list[str], options: dict[str, Any]) -> dict[str, Tensor]:
    """Expert e has rank e + 1, and expert 1 nothing at the first of these layers."""
    torch.manual_seed(9)
    found = [(name, layer) for name, layer in module.named_modules() if name.rpartition(".")[2] in layers]
    answers = 3 * len(found) if options.get("layerwise_scalings") else 3
    depth, step = options.get("xlora_depth", 3), 2 if options.get("xlora_dropout_p") == 0.0 else 3
    widths = [48, *[8] * (depth - 1), answers]
    tensors = {}
    for i, (inside, out) in enumerate(pairwise(widths)):
        stem = f"base_model.internal_xlora_classifier.layers.{i * step}"
        tensors[f"{stem}.weight"], tensors[f"{stem}.bias"] = 2 * random(out, inside), random(out)
    for i, (name, layer) in enumerate(found):
        inside, out = sizes(layer)
        for e in (0, 1, 2):
            if (i, e) != (0, 1):
                stem = f"base_model.model.{name}.experts.{e}"
                tensors[f"{stem}.lora_A.weight"] = random(e + 1, inside)
                tensors[f"{stem}.lora_B.weight"] = 2 * random(out, e + 1)
    return tensors


OPTIONS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "layerwise": ("llama", ["q_proj", "up_proj", "down_proj"], {"layerwise_scalings": True}),
    "one for all layers": ("llama", ["k_proj", "o_proj"], {"xlora_dropout_p": 0.0}),
    "one layer deep": ("qwen2", ["v_proj"], {"xlora_depth": 1, "layerwise_scalings": True}),
    "top-k": ("llama", ["q_proj"], {"top_k_lora": 2, "global_scaling_weight": 1.5, "layerwise_scalings": True}),
    "softmax of the top-k": (
        "llama",
        ["q_proj", "gate_proj"],
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    ),
    "no softmax": ("phi3", ["qkv_proj"], {"enable_softmax": False}),
    "temperature": ("gpt2", ["c_attn", "c_fc"], {"softmax_temperature": 0.3, "layerwise_scalings": True}),
}


@pytest.mark.parametrize("case", OPTIONS)
async def test_options_and_families(case: str, tmp_path: Path) -> None:
    family, layers, options = OPTIONS[case]
    module = build(family)
    tensors = tensors_for(module, layers, options)
    write(tmp_path / "x", fields(**options), tensors)
    model = PaperModel(module, tensors, **options)
    prompts = [[5, 9, 17, 33, 3, 7, 8, 60, 61, 62, 63, 64], [101, 44, 3]]
    async with engine_for(family, tmp_path) as engine:
        await load(engine, "x")
        wanted = [request(p, n, 5, prompt_logprobs=VOCABULARY) for p in prompts for n in ("x", "")]
        answers = await ask_all(engine, wanted)
    for i, prompt in enumerate(prompts):
        plain = logprobs(module, prompt)
        want = model.logits(torch.tensor([prompt]))[0].log_softmax(-1)
        torch.testing.assert_close(table(answers[2 * i]), want[:-1], atol=3e-4, rtol=0)
        torch.testing.assert_close(table(answers[2 * i + 1]), plain[:-1], atol=3e-4, rtol=0)
        assert answers[2 * i].ids == model.greedy(prompt, 5)
        assert float((want - plain).abs().max()) > 0.05


BROKEN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a torn classifier": ("MISSING_TENSOR", "layers.0.weight", {}, "classifier.layers.0."),
    "no experts": ("MISSING_TENSOR", "peftmux adapters convert", {}, ".lora_"),
    "an expert without tensors": ("MISSING_TENSOR", "none of expert 1", {}, ".experts.1."),
    "half an expert": ("MISSING_TENSOR", "lora_B", {}, "q_proj.experts.1.lora_B"),
    "a first pass with the experts": ("UNSUPPORTED_FIELD", "scaling_pass_value", {"scaling_pass_value": 0.5}, "-"),
    "another width": ("SHAPE_MISMATCH", "hidden_size", {"hidden_size": 64}, "-"),
    "more than all experts": ("INVALID_FIELD", "top_k_lora", {"top_k_lora": 4}, "-"),
    "fewer experts": ("SHAPE_MISMATCH", "classifier", {"adapters": {"0": "a", "1": "b"}}, "-"),
    "no adapters": ("INVALID_FIELD", "adapters", {"adapters": {}}, "-"),
    "shares for each layer": ("SHAPE_MISMATCH", "classifier", {"layerwise_scalings": True}, "-"),
    "an unknown field": ("UNSUPPORTED_FIELD", "magic", {"magic": 1}, "-"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ones_are_refused(case: str, tmp_path: Path) -> None:
    reason, words, changes, missing = BROKEN[case]
    module = build("llama")
    tensors = {k: v for k, v in tensors_for(module, ["q_proj", "o_proj"], {}).items() if missing not in k}
    write(tmp_path / "a", fields(**changes), tensors)
    with pytest.raises(AdapterInvalid, match=words) as error:
        load_adapter(tmp_path / "a", TorchBase(module))
    assert error.value.reason == reason


def test_what_cannot_be_gathered(tmp_path: Path) -> None:
    """PEFT's folder as it is, one without its experts, and experts that are more than LoRA."""
    source = tmp_path / "xlora"
    shutil.copytree(XLORA, source)
    with pytest.raises(AdapterInvalid, match="xlora_expert0"):
        convert_adapter(source, tmp_path / "out")
    for i in (0, 1):
        shutil.copytree(XLORA.parent / f"xlora_expert{i}", tmp_path / f"xlora_expert{i}")
    convert_adapter(source, tmp_path / "out")
    config = tmp_path / "xlora_expert1" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(AdapterInvalid, match="use_dora"):
        convert_adapter(source, tmp_path / "other")
    (source / "classifier_full.safetensors").unlink()
    with pytest.raises(AdapterInvalid, match=r"layers\.0\.weight"):
        convert_adapter(source, tmp_path / "third")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "third").exists()
