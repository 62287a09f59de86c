"""Classification heads beside every method: against PEFT on transformers' classifiers, and the lowered parts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.torch_base import TorchBase
from peftmux.kernels.head import apply_head
from peftmux.trainer import DataError, OptionError, train
from peftmux.trainer.data import PaddingCollator, encode_labelled, label_names, read_rows
from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.host.host import Host
from peftmux.trainer.jobs.file import read_jobs
from peftmux.trainer.jobs.run import JobRun
from peftmux.trainer.methods import METHODS
from peftmux.trainer.methods.task_head import TaskHead
from tests.trainer.lowered import lowered_logits
from tests.trainer.method_runs import QUICK, check_resumes, tensors
from tests.trainer.test_trainer_jobs import TOLERANCE, jobs_file
from tests.trainer.test_trainer_methods import IN_PEFT
from tests.trainer.tiny_models import CONFIGS, build_model, build_tokenizer, random_ids, save_base, write_rows

CLASSES = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
NAMES = ("capital", "digit", "small")


KINDS = dict(zip(NAMES, ("ABC", "012", "abc"), strict=True))


def sequence_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The label says of which kind the last character is."""
    rng = random.Random(seed)
    labels = [rng.choice(NAMES) for _ in range(count)]
    return [
        {"text": "".join(rng.choices("xyz", k=rng.randint(0, 3))) + rng.choice(KINDS[k]), "label": k} for k in labels
    ]


def token_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Words of one kind each."""
    rng = random.Random(seed)
    rows = [rng.choices(NAMES, k=rng.randint(1, 4)) for _ in range(count)]
    return [{"tokens": ["".join(rng.choices(KINDS[k], k=2)) for k in labels], "labels": labels} for labels in rows]


ROWS = {"sequence": sequence_rows, "token": token_rows}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return {task: write_rows(folder / f"{task}.jsonl", make(48)) for task, make in ROWS.items()}


def our_scores(result: Any, ids: Tensor) -> Tensor:
    """[rows, T, C]."""
    with torch.no_grad():
        result.model(input_ids=ids)
        hidden = Host.of(result.model).hidden
        assert hidden is not None
        scores: Tensor = result.adapter.head(hidden[:, -ids.shape[1] :])
    return scores


def lowered_scores(model: Any, folder: Path, ids: Tensor) -> Tensor:
    adapter = load_adapter(folder, TorchBase(model))
    outputs: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    lowered_logits(model, adapter, ids)
    hook.remove()
    assert adapter.parts.head is not None
    assert adapter.parts.head.labels == NAMES
    return apply_head(outputs[-1].last_hidden_state[:, -ids.shape[1] :], adapter.parts.head)


HUB = ("houlsby", "pfeiffer", "parallel", "fusion")
"""Their heads are AdapterHub's, and tested with them."""


@pytest.mark.parametrize("method", [method for method in METHODS if method not in (*HUB, "multitask-prompt", "vora")])
def test_every_method_classifies(method: str, qwen2: Path, data: dict[str, Path], tmp_path: Path):
    """The trained model, the lowered files and, where it has the method, PEFT on transformers' classifier agree."""
    ids = random_ids()
    for task in ("sequence", "token"):
        folder = tmp_path / task
        result = train(method, model=qwen2, data=data[task], out=folder, task=task, training={**QUICK, "max_steps": 3})
        ours = our_scores(result, ids)
        torch.testing.assert_close(ours, lowered_scores(build_model("qwen2"), folder, ids), rtol=0, atol=1e-5)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["id2label"] == {"0": "capital", "1": "digit", "2": "small"}
        if method in IN_PEFT:
            base = CLASSES[task].from_pretrained(qwen2, num_labels=3, pad_token_id=0).eval()
            peft = PeftModel.from_pretrained(base, str(folder)).eval()
            with torch.no_grad():
                theirs = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            expected = ours[:, -1] if task == "sequence" else ours
            torch.testing.assert_close(
                expected, theirs[:, -ids.shape[1] :] if task == "token" else theirs, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_the_gradient_is_that_of_transformers_loss(task: str, qwen2: Path, data: dict[str, Path], tmp_path: Path):
    """One batch of all rows: our loss and gradients, against PEFT's with transformers' own labels and padding."""
    result = train(
        "lora", model=qwen2, data=data[task], out=tmp_path / "a", task=task, training={**QUICK, "max_steps": 2}
    )
    rows = read_rows(data[task], task)
    encoded = encode_labelled(rows, result.tokenizer, data[task], NAMES, max_length=64)
    adapter: Any = result.adapter
    result.model(**PaddingCollator(crop_logits=True)(encoded.features())).loss.backward()
    base = CLASSES[task].from_pretrained(qwen2, num_labels=3, pad_token_id=0).eval()
    if hasattr(base, "dropout"):
        base.dropout = torch.nn.Identity()
    peft = PeftModel.from_pretrained(base, str(tmp_path / "a"), is_trainable=True).eval()
    longest = max(len(e.input_ids) for e in encoded.examples)
    ids = torch.tensor([e.input_ids + [0] * (longest - len(e.input_ids)) for e in encoded.examples])
    labels = torch.tensor([e.labels + [IGNORED] * (longest - len(e.labels)) for e in encoded.examples])
    given = labels.max(1).values if task == "sequence" else labels
    peft(input_ids=ids, attention_mask=(ids != 0).long(), labels=given).loss.backward()
    theirs = {n.replace(".default", "").replace(".modules_to_save", ""): p.grad for n, p in peft.named_parameters()}
    for name, parameter in adapter.parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("task", "method"), [("sequence", "lora"), ("token", "lora"), ("sequence", "bitfit"), ("sequence", "prompt")]
)
def test_it_learns(task: str, method: str, taught: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[task](128))
    held_out = write_rows(tmp_path / "eval.jsonl", ROWS[task](48, seed=1))
    training = {"max_steps": 60, "per_device_train_batch_size": 16, "disable_tqdm": True}
    result = train(
        method, model=taught, data=rows, eval_data=held_out, out=tmp_path / "a", task=task, training=training
    )
    assert result.metrics["eval_loss"] < 0.35, "three labels at random are 1.1"


@pytest.mark.parametrize("method", ["lora", "prefix", "p-tuning", "diffpruning"])
def test_a_resumed_run_ends_with_the_same_bits(method: str, qwen2: Path, data: dict[str, Path], tmp_path: Path):
    check_resumes(method, qwen2, data["sequence"], tmp_path, options={"task": "sequence"})


def test_classifiers_and_writers_share_batches(qwen2: Path, data: dict[str, Path], rows: Path, tmp_path: Path):
    specs: list[dict[str, Any]] = [
        {"name": "writer", "method": "lora", "r": 4, "max_steps": 4},
        {
            "name": "words",
            "method": "prefix",
            "num_virtual_tokens": 3,
            "max_steps": 5,
            "task": "token",
            "data": str(data["token"]),
        },
        {"name": "probe", "method": "head", "max_steps": 3, "task": "sequence", "data": str(data["sequence"])},
        {
            "name": "difference",
            "method": "diffpruning",
            "sparsity": 0.1,
            "max_steps": 6,
            "task": "sequence",
            "data": str(data["sequence"]),
        },
    ]
    found = read_jobs(jobs_file(tmp_path, qwen2, rows, specs))
    JobRun(found).run()
    for spec, given in zip(found, specs, strict=True):
        own = {k: v for k, v in given.items() if k in spec.method.config_class.__dataclass_fields__}
        solo = tmp_path / "solo" / spec.name
        train(
            spec.method.name,
            model=qwen2,
            data=spec.options.data,
            out=solo,
            task=spec.options.task,
            config=own,
            training=spec.training,
        )
        together, alone = tensors(tmp_path / "out" / spec.name), tensors(solo)
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=0, atol=TOLERANCE, msg=name)


def test_packing_changes_nothing(qwen2: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", sequence_rows(9))
    training = {"max_steps": 2, "per_device_train_batch_size": 9, "disable_tqdm": True}
    for packing in (False, True):
        train(
            "lora",
            model=qwen2,
            data=rows,
            out=tmp_path / str(packing),
            task="sequence",
            packing=packing,
            training=training,
        )
    padded, packed = tensors(tmp_path / "False"), tensors(tmp_path / "True")
    for name, tensor in padded.items():
        torch.testing.assert_close(packed[name], tensor, rtol=0, atol=TOLERANCE, msg=name)


def test_a_words_label_is_that_of_all_of_its_tokens(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [{"tokens": ["ab", "C"], "labels": ["x", "y"]}])
    rows = read_rows(path, "token")
    data = encode_labelled(rows, build_tokenizer(), path, label_names(rows, None), max_length=9)
    (example,) = data.examples
    assert build_tokenizer().decode(example.input_ids) == "ab C"
    assert example.labels == [0, 0, IGNORED, 1]
    assert example.feature()["labels"] == [IGNORED, 0, 0, IGNORED, 1]
    assert data.learned_tokens == 3


def test_a_word_labelled_minus_100_is_not_learned(qwen2: Path, tmp_path: Path):
    """As everywhere else: it is no class, and what its label is makes no difference to what is trained."""
    content = [{"tokens": ["a", "b", "c"], "labels": [0, -100, 1]}, {"tokens": ["d", "e"], "labels": ["-100", 1]}]
    path = write_rows(tmp_path / "rows.jsonl", content)
    rows = read_rows(path, "token")
    names = label_names(rows, None)
    assert names == ("0", "1")
    first, second = encode_labelled(rows, build_tokenizer(), path, names, max_length=9).examples
    assert (first.labels, second.labels) == ([0, *[IGNORED] * 3, 1], [IGNORED, IGNORED, 1])
    assert (first.learned, second.learned) == (2, 1)
    with pytest.raises(DataError, match=":2: expected tokens to learn from, found none in its 2"):
        encode_labelled(rows, build_tokenizer(), path, names, max_length=2, over_long="truncate")
    with pytest.raises(OptionError, match="labels: expected names, got -100, which says that a word is not learned"):
        label_names(rows, ["0", "1", "-100"])
    train("lora", model=qwen2, data=path, out=tmp_path / "a", task="token", training=QUICK)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"}


def test_label_names(tmp_path: Path):
    numbers = read_rows(write_rows(tmp_path / "n.jsonl", [{"text": "a", "label": i} for i in (10, 9)]), "sequence")
    assert label_names(numbers, None) == ("9", "10")
    assert label_names(numbers, ["10", "9"]) == ("10", "9")
    with pytest.raises(OptionError, match="labels: expected two or more different names, got \\['9', '9'\\]"):
        label_names(numbers, ["9", "9"])


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("sequence", [{"text": "a", "label": "x"}], r"labels: expected two or more different names, got \['x'\]"),
        ("sequence", [{"text": "a"}], r":1: expected the columns \{text, label\}; found 'text'"),
        (
            "sequence",
            [{"text": "a", "label": "x"}, {"text": "b", "label": None}],
            ":2: column 'label': expected a name",
        ),
        ("sequence", [{"text": "a", "label": "x"}, {"text": "b", "label": 1.5}], ":2: column 'label': expected a name"),
        (
            "sequence",
            [{"text": "a", "label": "x"}, {"text": "", "label": "y"}],
            ":2: expected tokens to learn from, found none",
        ),
        (
            "sequence",
            [{"text": "a" * 200, "label": "x"}, {"text": "b", "label": "y"}],
            ":1: expected at most 127 tokens",
        ),
        (
            "token",
            [{"tokens": ["a"], "labels": ["x", "y"]}],
            ":1: expected one label for each of the tokens, found 1 and 2",
        ),
        ("token", [{"tokens": [], "labels": []}], ":1: column 'tokens': expected a list, found an empty list"),
        ("token", [{"tokens": ["a", " "], "labels": ["x", "y"]}], r":1: tokens\[1\]: expected a word"),
        ("token", [{"tokens": ["a", "b"], "labels": ["x", True]}], r":1: labels\[1\]: expected a name"),
        (
            "token",
            [{"tokens": ["a", "b"], "labels": ["x", "y"]}, {"tokens": ["a", "b"], "labels": [-100, -100]}],
            ":2: column 'labels': expected something to learn, found -100, which is not learned",
        ),
        (
            "sequence",
            [{"text": "a", "label": 0}, {"text": "b", "label": 1, "tokens": []}, {"text": "b", "label": -100}],
            ":3: column 'label': expected something to learn, found -100",
        ),
    ],
)
def test_bad_rows_are_refused(task: str, rows: list[dict[str, Any]], message: str, qwen2: Path, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises((DataError, OptionError), match=message):
        train("lora", model=qwen2, data=path, out=tmp_path / "a", task=task)
    assert not (tmp_path / "a").exists()


def test_options_that_make_no_sense_are_refused(qwen2: Path, data: dict[str, Path], rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "out": tmp_path / "a"}
    held_out = write_rows(tmp_path / "eval.jsonl", [{"text": "a", "label": "nope"}])
    with pytest.raises(DataError, match=r"eval\.jsonl:1: label 'nope': expected one of capital, digit, small"):
        train("lora", **run, data=data["sequence"], eval_data=held_out, task="sequence")
    with pytest.raises(OptionError, match="labels: are a classifier's"):
        train("lora", **run, data=rows, labels=["a", "b"])
    with pytest.raises(OptionError, match="head trains a classifier alone: give --task"):
        train("head", **run, data=rows)
    with pytest.raises(OptionError, match="a classifier has, which has no lm_head"):
        train("layers", **run, data=data["token"], task="token", config={"target_modules": ["lm_head"]})


@pytest.mark.parametrize("shape", CONFIGS)
def test_the_heads_module_is_transformers(shape: str, tmp_path: Path):
    model = build_model(shape)
    for task, classes in CLASSES.items():
        known: Any = classes._model_mapping
        if type(model.config) not in known:
            continue
        own = TaskHead(model, task, NAMES, 0)  # type: ignore[arg-type]
        with torch.device("meta"):
            theirs = classes.from_config(model.config)
        assert {f"{own.name}.{n}" for n, _ in own.named_parameters()} <= set(dict(theirs.named_parameters()))
        assert (own.bias is None) is (getattr(theirs, own.name).bias is None)


def test_a_gpt2_classifier_loads_in_peft(data: dict[str, Path], tmp_path: Path):
    base = save_base(tmp_path / "base", "gpt2")
    result = train("lora", model=base, data=data["token"], out=tmp_path / "a", task="token", training=QUICK)
    assert {"classifier.weight", "classifier.bias"} <= {n.rpartition("model.")[2] for n in tensors(tmp_path / "a")}
    theirs = PeftModel.from_pretrained(
        AutoModelForTokenClassification.from_pretrained(base, num_labels=3), tmp_path / "a"
    )
    ids = random_ids()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
    torch.testing.assert_close(our_scores(result, ids), expected, rtol=0, atol=1e-5)


def test_opts_head_reads_what_its_decoder_gives(data: dict[str, Path], tmp_path: Path):
    """The model that holds the decoder is never called as a whole there."""
    base = save_base(tmp_path / "base", "opt")
    result = train("lora", model=base, data=data["sequence"], out=tmp_path / "a", task="sequence", training=QUICK)
    ids = random_ids()
    with torch.no_grad():
        states = result.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    hidden = Host.of(result.model).hidden
    assert hidden is not None
    assert torch.equal(hidden, states)
    assert load_adapter(tmp_path / "a", TorchBase(build_model("opt"))).parts.head is not None
