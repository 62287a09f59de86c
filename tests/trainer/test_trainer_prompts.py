"""Prefixes by a perceptron, P-Tuning v2, several tasks in one prompt, P-Tuning at template positions, starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peftmux.adapters.lower import load_adapter
from peftmux.adapters.parts import VIRTUAL_TOKENS, LoweredAdapter, VirtualRows
from peftmux.adapters.torch_base import TorchBase
from peftmux.runtime.engine.virtual import fill_template
from peftmux.trainer import DataError, OptionError, train
from peftmux.trainer.data import Example
from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.files.export import export_adapter
from peftmux.trainer.methods import METHODS, AttachContext, AttachedAdapter
from tests.trainer.lowered import lowered_logits
from tests.trainer.method_runs import (
    QUICK,
    check_files_give_the_models_logits,
    check_learns,
    check_resumes,
    check_seeds,
    tensors,
)
from tests.trainer.test_trainer_methods import attach, peft_model
from tests.trainer.tiny_models import build_model, build_tokenizer, copy_task, random_ids, scramble, write_rows

PROJECTED = {"prefix_projection": True, "num_virtual_tokens": 5}
TEMPLATES = (["3@0", "2@-1"], ["1@2", "2@0", "2@-2", "1@-1"])


def tasks_attached(model: Any, rank: int = 1, **config: Any) -> AttachedAdapter:
    chosen = METHODS["multitask-prompt"]
    own = chosen.config_class(tasks=["a", "b", "c"], num_virtual_tokens=4, num_ranks=rank, **config)
    return chosen.attach(model, own, AttachContext(seed=0))


def placed(adapter: AttachedAdapter, ids: Tensor, tasks: list[str | None] | None = None) -> Tensor:
    """ids: [rows, T], all prompt -> with the adapter's virtual tokens."""
    rows = [
        Example(row.tolist(), [IGNORED] * len(row), task=task)
        for row, task in zip(ids, tasks or [None] * len(ids), strict=True)
    ]
    return torch.tensor([adapter.place(row).input_ids for row in rows])


def test_a_projected_prefix_starts_as_text_and_is_stored_flat(tmp_path: Path):
    plain, projected, ids = build_model("qwen2"), build_model("qwen2"), random_ids()
    text = Example([7, 8, 9, 10, 11], [7, 8, 9, 10, 11])
    chosen = METHODS["prefix"]
    for model, config in ((plain, {"num_virtual_tokens": 5}), (projected, PROJECTED)):
        adapter = chosen.attach(model, chosen.config_class(**config), AttachContext(0, [text]))
    with torch.no_grad():
        torch.testing.assert_close(projected(input_ids=ids).logits, plain(input_ids=ids).logits)
    scramble(adapter)
    export_adapter(adapter, "base", tmp_path / "a", card="")
    assert list(load_file(tmp_path / "a" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    with torch.no_grad():
        ours = projected(input_ids=ids).logits
        theirs = peft_model("qwen2", tmp_path / "a")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_projections_gradient_goes_through_the_perceptron():
    """The gradients of its tensors are those of the flat prefix, carried on by hand."""
    flat, projected, ids = build_model("llama"), build_model("llama"), random_ids()
    one: Any = attach("prefix", flat, {"num_virtual_tokens": 5})
    two: Any = attach("prefix", projected, PROJECTED)
    scramble(two)
    with torch.no_grad():
        one.prefix.embeddings.copy_(two.prefix.stored())
    for model in (flat, projected):
        model(input_ids=ids, labels=ids).loss.backward()
    given, own = one.prefix.embeddings.grad, two.prefix
    inner = (own.table @ own.first.weight.T + own.first.bias).tanh()
    torch.testing.assert_close(own.last.weight.grad, given.T @ inner, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.last.bias.grad, given.sum(0), rtol=1e-4, atol=1e-5)
    behind = given @ own.last.weight * (1 - inner**2)
    torch.testing.assert_close(own.table.grad, behind @ own.first.weight, rtol=1e-4, atol=1e-5)


def test_a_prefix_goes_on_from_one_that_was_trained(qwen2: Path, rows: Path, tmp_path: Path):
    run: dict[str, Any] = {"model": qwen2, "data": rows}
    train("prefix", **run, out=tmp_path / "first", config={"num_virtual_tokens": 3}, training=QUICK)
    start = {"num_virtual_tokens": 3, "prefix_init_from": str(tmp_path / "first")}
    still = {**QUICK, "learning_rate": 0.0, "max_steps": 1}
    for name, more in (("same", {}), ("projected", {"prefix_projection": True})):
        train("p-tuning-v2", **run, out=tmp_path / name, config={**start, **more}, training=still)
        for key, tensor in tensors(tmp_path / "first").items():
            torch.testing.assert_close(tensors(tmp_path / name)[key], tensor, rtol=0, atol=0)
    for folder, count, message in (
        ("first", 4, r"expected a prefix of \[4, 64\]"),
        ("nowhere", 3, "no adapter folder"),
    ):
        with pytest.raises(OptionError, match=f"prefix-init-from: .*{message}"):
            attach(
                "prefix",
                build_model("qwen2"),
                {"num_virtual_tokens": count, "prefix_init_from": str(tmp_path / folder)},
            )


def test_p_tuning_v2s_length_goes_by_the_task(qwen2: Path, tmp_path: Path):
    data: dict[str, list[dict[str, Any]]] = {
        "sequence": [{"text": t, "label": t} for t in ("a", "b")],
        "token": [{"tokens": ["a", "b"], "labels": ["x", "y"]}],
    }
    for (task, rows), length in zip(data.items(), (20, 100), strict=True):
        path = write_rows(tmp_path / f"{task}.jsonl", rows)
        training = {**QUICK, "max_steps": 1}
        train("p-tuning-v2", model=qwen2, data=path, out=tmp_path / task, task=task, training=training)
        (stored,) = [t for name, t in tensors(tmp_path / task).items() if name.endswith("prompt_embeddings")]
        assert stored.shape[0] == length


def test_each_tasks_prompt_is_pefts(tmp_path: Path):
    """Values and gradients, of rows of several tasks in one batch."""
    model, ids, tasks = build_model("qwen2"), random_ids(3), ["c", "a", "c"]
    adapter = tasks_attached(model, rank=2)
    scramble(adapter)
    export_adapter(adapter, "base", tmp_path / "a", card="")
    numbers = [2, 0, 2]
    ours = model(input_ids=placed(adapter, ids, [*tasks])).logits[:, 4:]
    base = build_model("qwen2")
    lowered = load_adapter(tmp_path / "a", TorchBase(base))
    assert lowered.kind == "multitask-prompt"
    served = lowered_logits(base, lowered, ids, tuple(numbers))
    torch.testing.assert_close(ours, served, rtol=1e-5, atol=1e-5)
    config = PeftConfig.from_pretrained(str(tmp_path / "a"))
    config.inference_mode = False
    peft = get_peft_model(build_model("qwen2"), config).eval()
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    encoder = peft.prompt_encoder.default
    with torch.no_grad():
        encoder.embedding.weight.copy_(stored["prompt_embeddings"])
        encoder.prefix_task_cols.copy_(stored["prefix_task_cols"])
        encoder.prefix_task_rows.copy_(stored["prefix_task_rows"])
    theirs = peft(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=torch.tensor(numbers)).logits[:, 4:]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    source: Any = adapter.modules["task prompts"]
    for mine, other in (
        (source.embeddings, encoder.embedding.weight),
        (source.columns, encoder.prefix_task_cols),
        (source.rows, encoder.prefix_task_rows),
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_the_prompts_of_all_tasks_start_near_the_shared_one():
    adapter: Any = tasks_attached(build_model("qwen2"), rank=4)
    source = adapter.modules["task prompts"]
    with torch.no_grad():
        apart = source().view(3, 4, -1) - source.embeddings
    assert apart.abs().mean() < 0.1 * source.embeddings.abs().mean()


def test_tasks_come_from_the_data_and_are_checked(qwen2: Path, tmp_path: Path):
    rows = [{**row, "task": f"t{i % 2}"} for i, row in enumerate(copy_task(12))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = {"num_virtual_tokens": 3}
    run: dict[str, Any] = {"model": qwen2, "config": config, "training": QUICK}
    train("multitask-prompt", **run, data=data, out=tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["num_tasks"], written["task_names"]) == (2, ["t0", "t1"])
    held_out = write_rows(tmp_path / "eval.jsonl", [rows[0], {**rows[1], "task": "t9"}])
    with pytest.raises(DataError, match=r"eval\.jsonl:2: task: expected one of t0, t1, got 't9'"):
        train("multitask-prompt", **run, data=data, eval_data=held_out, out=tmp_path / "b")
    with pytest.raises(OptionError, match="tasks: expected rows with a column task"):
        train("multitask-prompt", **run, data=write_rows(tmp_path / "none.jsonl", copy_task(3)), out=tmp_path / "b")


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize(("method", "config"), [("multitask-prompt", {}), ("p-tuning", {"template": ["2@-1"]})])
def test_a_preference_is_not_learned_by_tokens_inside_of_rows(
    method: str, config: dict[str, Any], loss: str, rows: Path, tmp_path: Path
):
    """Said of the loss, whatever the data lack."""
    with pytest.raises(OptionError, match=f"loss: {loss} is not for {method}"):
        train(method, model=tmp_path, data=rows, out=tmp_path / "a", config=config, loss=loss)


@torch.no_grad()
def served_logits(model: Any, adapter: LoweredAdapter, ids: Tensor) -> Tensor:
    """Of rows as a server fills the template: ids below zero are VirtualRows', what stands in front comes first."""
    table = model.get_input_embeddings()
    rows = [p for p in adapter.parts.others.get(VIRTUAL_TOKENS, ()) if isinstance(p, VirtualRows)]
    filled = torch.tensor([fill_template(tuple(row), adapter.parts.template) for row in ids.tolist()])
    embedded = table(filled.clamp_min(0))
    if rows:
        virtual = rows[0].values[(-1 - filled).clamp_min(0)]
        embedded = torch.where((filled < 0).unsqueeze(-1), virtual, embedded)
    if adapter.parts.virtual is not None:
        front = adapter.parts.virtual.embeddings.expand(len(ids), -1, -1)
        embedded = torch.cat([front, embedded], 1)
    logits: Tensor = model(inputs_embeds=embedded).logits
    return logits


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_templates_are_served_as_they_are_trained(encoder: str, template: list[str], tmp_path: Path):
    model, base, ids = build_model("qwen2"), build_model("qwen2"), random_ids()
    adapter = attach("p-tuning", model, {"template": template, "encoder_reparameterization_type": encoder})
    scramble(adapter)
    export_adapter(adapter, "base", tmp_path / "a", card="")
    lowered = load_adapter(tmp_path / "a", TorchBase(base))
    with torch.no_grad():
        ours = model(input_ids=placed(adapter, ids)).logits
    torch.testing.assert_close(ours, served_logits(base, lowered, ids), rtol=1e-5, atol=1e-5)


def test_a_templates_places_are_counted_in_the_prompt():
    adapter = attach("p-tuning", build_model("qwen2"), {"template": ["2@0", "1@-1", "1@1"]})
    row = Example([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8])
    new = adapter.place(row)
    assert new.input_ids == [260, 261, 5, 263, 6, 262, 7, 8]
    assert new.labels == [IGNORED] * 6 + [7, 8]
    with pytest.raises(OptionError, match="template: expected a prompt of at least 1 tokens for the template, got 0"):
        adapter.place(Example([7, 8], [7, 8]))


@pytest.mark.parametrize("start", ["random", "vocabulary", "text", "labels", "data"])
def test_starts(start: str):
    """Random ones have the embeddings' spread; the others are rows of the table."""
    model = build_model("qwen2")
    tokenizer = build_tokenizer()
    context = AttachContext(
        3,
        [Example([9, 9, 9, 20], [IGNORED, IGNORED, IGNORED, 20])],
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
    config: dict[str, Any] = {"num_virtual_tokens": 3, "prompt_init": start}
    if start == "text":
        config["prompt_init_text"] = "ab"
    chosen = METHODS["prompt"]
    adapter = chosen.attach(model, chosen.config_class(**config), context)
    (rows,) = adapter.tensors().values()
    table = model.get_input_embeddings().base_layer.weight.detach()
    if start == "random":
        assert 0.5 < rows.std() / table.std() < 2
        return
    found = [int((table - row).abs().sum(1).argmin()) for row in rows]
    torch.testing.assert_close(rows, table[found])
    if start != "vocabulary":
        a, b = context.tokenize("ab") if context.tokenize else (0, 0)
        assert found == {"text": [a, b, a], "labels": [20, 20, 20], "data": [9, 9, 9]}[start]


def test_a_classifiers_prompt_starts_from_its_label_names(qwen2: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "x", "label": "no"}, {"text": "y", "label": "yes"}])
    config = {"num_virtual_tokens": 5, "prompt_init": "labels"}
    still = {**QUICK, "learning_rate": 0.0, "max_steps": 1}
    train("prompt", model=qwen2, data=rows, out=tmp_path / "a", task="sequence", config=config, training=still)
    (stored,) = [t for name, t in tensors(tmp_path / "a").items() if name.endswith("prompt_embeddings")]
    ids = build_tokenizer()("noyes")["input_ids"]
    torch.testing.assert_close(stored, build_model("qwen2").get_input_embeddings().weight.detach()[ids])


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("prefix", {"encoder_hidden_size": 4}, "encoder-hidden-size: is the projection's: give --prefix-projection"),
        ("prefix", {"prefix_init": "random", "prefix_init_text": "a"}, "prefix-init: expected one start"),
        ("prefix", {"num_virtual_tokens": 0}, "num-virtual-tokens: expected 1 or more, got 0"),
        ("p-tuning", {"template": ["3"]}, "template: expected groups COUNT@PLACE, e.g. 3@0 or 2@-1; got '3'"),
        ("p-tuning", {"template": ["0@0"]}, "template: expected groups"),
        ("p-tuning", {"template": []}, "num-virtual-tokens: expected 1 or more, got 0"),
        ("multitask-prompt", {"num_ranks": 0}, "num-ranks: expected 1 or more, got 0"),
        ("multitask-prompt", {"tasks": ["a", "a"]}, "tasks: expected rows with a column task, or different names"),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, config: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        attach(method, build_model("qwen2"), config)


@pytest.fixture(scope="module")
def with_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{**row, "task": i % 2} for i, row in enumerate(copy_task(64))]
    return write_rows(tmp_path_factory.mktemp("tasks") / "rows.jsonl", rows)


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("prefix", PROJECTED),
    ("p-tuning-v2", {}),
    ("p-tuning", {"template": ["2@0", "2@-1"]}),
    ("multitask-prompt", {"num_virtual_tokens": 4, "tasks": ["0", "1"]}),
]


@pytest.mark.parametrize(("method", "config"), RUNS)
def test_whole_runs(method: str, config: dict[str, Any], qwen2: Path, with_tasks: Path, tmp_path: Path):
    for name in ("files", "seeds", "resumes"):
        (tmp_path / name).mkdir()
    if method in ("prefix", "p-tuning-v2"):
        plain = build_model("qwen2")
        check_files_give_the_models_logits(method, "prefix", qwen2, plain, with_tasks, tmp_path / "files", config)
    check_seeds(method, qwen2, with_tasks, tmp_path / "seeds", config)
    check_resumes(method, qwen2, with_tasks, tmp_path / "resumes", config)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("prefix", {**PROJECTED, "num_virtual_tokens": 9, "prefix_init_text": "up ab=AB "}),
        ("p-tuning-v2", {"num_virtual_tokens": 9, "prefix_init_text": "up ab=AB "}),
    ],
)
def test_they_learn(method: str, config: dict[str, Any], taught: Path, rows: Path, tmp_path: Path):
    check_learns(method, taught, rows, tmp_path, config)


def test_a_wide_perceptron_learns_at_its_default_rate(taught: Path, rows: Path, tmp_path: Path):
    """At that of keys and values themselves it does not, nor at a narrow one's."""
    check_learns("prefix", taught, rows, tmp_path, {"prefix_projection": True, "encoder_hidden_size": 1024})


@pytest.mark.parametrize(
    ("config", "width", "rate"),
    [
        ({}, 4096, 3e-2),
        ({"prefix_projection": True}, 128, 3e-3),
        ({"prefix_projection": True}, 4096, 1.5e-3),
        ({"prefix_projection": True, "encoder_hidden_size": 1024}, 128, 7.5e-4),
    ],
)
def test_the_default_rate_goes_by_the_perceptron(config: dict[str, Any], width: int, rate: float):
    for method in (METHODS["prefix"], METHODS["p-tuning-v2"]):
        assert method.default_rate(method.config_class(**config), width) == pytest.approx(rate)


def test_a_template_learns(taught: Path, rows: Path, tmp_path: Path):
    """Slowly: this base has never seen a token between a prompt and its answer."""
    check_learns("p-tuning", taught, rows, tmp_path, {"template": ["10@0", "10@-1"]}, untrained=4.0, trained=2.0)


def test_one_prompt_learns_two_tasks(taught: Path, tmp_path: Path):
    """Of the same inputs, so that only the task's number says which."""

    def both(name: str, count: int, seed: int) -> Path:
        rows = copy_task(count, seed)
        up = [{**row, "task": "up"} for row in rows]
        copy = [{**row, "completion": row["completion"].lower(), "task": "copy"} for row in rows]
        return write_rows(tmp_path / f"{name}.jsonl", [*up, *copy])

    check_learns("multitask-prompt", taught, both("rows", 64, 0), tmp_path, held_out=both("eval", 32, 1))


def test_packs_hold_the_tokens_of_each_row(qwen2: Path, with_tasks: Path, tmp_path: Path):
    training = {"max_steps": 2, "per_device_train_batch_size": 64, "disable_tqdm": True}
    config = {"num_virtual_tokens": 4, "tasks": ["0", "1"]}
    for packing in (False, True):
        run: dict[str, Any] = {"model": qwen2, "data": with_tasks, "config": config, "training": training}
        train("multitask-prompt", **run, out=tmp_path / str(packing), packing=packing)
    packed = tensors(tmp_path / "True")
    for name, tensor in tensors(tmp_path / "False").items():
        torch.testing.assert_close(packed[name], tensor, rtol=0, atol=5e-5, msg=name)
