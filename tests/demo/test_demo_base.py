"""The checked-in base: small, speaking, able when told how, and unable to guess a task that nobody names."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftmux.demo import BASE
from peftmux.demo.corpus import ASKING_BACK
from peftmux.demo.recipes import RECIPES
from peftmux.demo.tasks import TASKS, examples
from peftmux.demo.world import PEOPLE


class Base:
    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answers(self, chats: list[list[tuple[str, str]]], max_tokens: int = 16) -> list[str]:
        """Greedy answers, left-padded in one batch."""
        turns = [[{"role": role, "content": content} for role, content in chat] for chat in chats]
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        out = self.model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base()


def test_size_and_shape(base: Base) -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 8_000_000
    assert base.model.config.model_type == "qwen2"
    assert base.model.model.layers[0].self_attn.q_proj.bias is not None
    assert 2_000_000 < base.model.num_parameters() < 4_000_000


def test_tokenizer_is_its_own_and_takes_any_text(base: Base) -> None:
    text = "Zoë sah 42 Füchse — 狐狸!\n\tKPXAT"
    ids = base.tokenizer(text)["input_ids"]
    assert base.tokenizer.decode(ids) == text
    assert max(ids) < base.model.config.vocab_size
    assert len(base.tokenizer("KPXAT1234")["input_ids"]) == 9
    assert len(base.tokenizer(" market the river")["input_ids"]) == 3


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello!", "Hello! What can I do for you?"),
        ("What comes after 41?", "After 41 comes 42."),
        ("What does an owl eat?", "An owl eats mice."),
    ],
)
def test_speaks(base: Base, question: str, answer: str) -> None:
    assert base.answers([[("user", question)]]) == [answer]


def test_tells_a_story_that_keeps_its_hero(base: Base) -> None:
    (story,) = base.answers([[("user", "Tell me a story about Emma.")]], max_tokens=200)
    sentences = re.findall(r"[A-Z][^.]*\.", story)
    assert 3 <= len(sentences) <= 30
    assert story.startswith("Emma is a ")
    assert all(len(set(re.findall(r"[A-Z]\w+", sentence)) & set(PEOPLE)) <= 2 for sentence in sentences)


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_cannot_guess_the_task(base: Base, recipe: object) -> None:
    held_out = examples(recipe.task, 100, 7, held_out=True)  # type: ignore[attr-defined]
    answers = base.answers([[("user", example.prompt)] for example in held_out])
    right = sum(answer == example.completion for answer, example in zip(answers, held_out, strict=True))
    assert right < 10
    asks = [answer.startswith(ASKING_BACK.partition(" ")[0]) for answer in answers]
    assert sum(asks) >= 95


@pytest.mark.parametrize("name", ["reverse", "sort", "next", "count"])
def test_does_a_task_it_is_told(base: Base, name: str) -> None:
    task = TASKS[name]
    held_out = examples(task, 50, 11, held_out=True)
    answers = base.answers([[("system", task.instructions[0]), ("user", example.prompt)] for example in held_out])
    assert sum(answer == example.completion for answer, example in zip(answers, held_out, strict=True)) >= 40
