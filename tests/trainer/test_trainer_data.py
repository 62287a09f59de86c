"""From files to batches: what is learned, what is refused and how the refusal reads."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from peftmux.trainer.data import EncodedData, Example, PaddingCollator, encode_rows, file_digest, read_rows
from peftmux.trainer.data.encode import IGNORED
from peftmux.trainer.errors import DataError
from tests.trainer.tiny_models import TEMPLATE, build_model, build_tokenizer, write_rows

END = 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def encoded(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> EncodedData:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return encode_rows(read_rows(path), tokenizer, path, **{"max_length": 64, **options})


def learned_text(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([i for i in example.labels if i != IGNORED]))


def test_only_the_completion_and_its_end_are_learned(tmp_path: Path, tokenizer: Any):
    (example,) = encoded(tmp_path, [{"prompt": "2+2=", "completion": "4", "id": 7}], tokenizer).examples
    assert tokenizer.decode(example.input_ids) == "2+2=4<|im_end|>"
    assert learned_text(example, tokenizer) == "4<|im_end|>"
    assert example.input_ids[:4] == tokenizer("2+2=")["input_ids"]


def test_a_text_is_learned_whole(tmp_path: Path, tokenizer: Any):
    data = encoded(tmp_path, [{"text": "abc"}, {"text": "d<|im_end|>"}], tokenizer)
    assert [tokenizer.decode(e.input_ids) for e in data.examples] == ["abc<|im_end|>", "d<|im_end|>"]
    assert data.examples[0].labels == data.examples[0].input_ids
    assert (data.tokens, data.learned_tokens) == (6, 4)


def test_the_end_can_be_left_out(tmp_path: Path, tokenizer: Any):
    (example,) = encoded(tmp_path, [{"text": "abc"}], tokenizer, append_eos=False).examples
    assert tokenizer.decode(example.input_ids) == "abc"


def test_every_assistant_turn_is_learned_up_to_its_end(tmp_path: Path, tokenizer: Any):
    turns = [("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = encoded(tmp_path, [{"messages": messages}], tokenizer, max_length=200).examples
    assert learned_text(example, tokenizer) == "one<|im_end|>two<|im_end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert tokenizer.decode(example.input_ids) == whole
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(prompt)] == prompt, "a server asked this prompt must see these tokens"


TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", ["", None])
def test_a_turn_that_only_calls_tools_ends_once(content: str | None, tmp_path: Path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TOOLS
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": content, "tool_calls": ["f()"]}]
    (example,) = encoded(tmp_path, [{"messages": messages}], tokenizer, max_length=200).examples
    assert learned_text(example, tokenizer) == "<call>f()<|im_end|>"


WITH_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}" + TEMPLATE
CALLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("opening", [[], [{"role": "assistant", "content": "hello"}]])
def test_tools_stand_in_the_prompt_of_every_turn(opening: list[dict[str, str]], tmp_path: Path):
    """As the template writes the whole conversation with them; the turns after them are learned, and nothing else."""
    tokenizer, messages = build_tokenizer(), [*opening, *ASKED, *ASKED]
    tokenizer.chat_template = WITH_TOOLS
    (example,) = encoded(tmp_path, [{"messages": messages, "tools": CALLS}], tokenizer, max_length=400).examples
    whole = tokenizer.apply_chat_template(messages, tools=CALLS, tokenize=False)
    assert whole.startswith("<tools>[{")
    assert tokenizer.decode(example.input_ids) == whole.rstrip("\n")
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learned_text(example, tokenizer) == "".join(f"{turn}<|im_end|>" for turn in turns)


def test_tools_may_be_objects_or_json_of_them_in_both_kinds_of_files(tmp_path: Path):
    """What another row's tool or message has is not in this one's, though a Parquet struct has a field for it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = WITH_TOOLS.replace(
        "{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or []) | tojson }}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {"x": 1}}]}
    other = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"y": 2}}]}
    given = [{"name": "f", "parameters": {"x": {"type": "int"}}}], [{"name": "g", "parameters": {"y": {"enum": ["a"]}}}]
    rows = [{"messages": [ASKED[0], m], "tools": t} for m, t in zip((call, other), given, strict=True)]
    texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    found = []
    for name, content in {"objects": rows, "texts": texts}.items():
        parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / f"{name}.parquet")
        for path in (write_rows(tmp_path / f"{name}.jsonl", content), tmp_path / f"{name}.parquet"):
            data = encode_rows(read_rows(path), tokenizer, path, max_length=400)
            found.append([tokenizer.decode(example.input_ids) for example in data.examples])
    whole = [tokenizer.apply_chat_template(r["messages"], tools=r["tools"], tokenize=False).rstrip() for r in rows]
    assert found == [whole] * 4
    none: list[Any] = [[], "[]", None, "null", ""]
    nothing = [{"messages": ASKED, "tools": tools} for tools in none]
    for example in encoded(tmp_path, nothing, tokenizer, max_length=400).examples:
        assert "tools" not in tokenizer.decode(example.input_ids)


def test_a_template_of_its_own_for_tools_says_how_its_turns_end(tmp_path: Path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {
        "default": TEMPLATE,
        "tool_use": "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    rows: list[dict[str, Any]] = [{"messages": ASKED}, {"messages": ASKED, "tools": CALLS}, {"messages": ASKED}]
    examples = encoded(tmp_path, rows, tokenizer, max_length=400).examples
    assert [learned_text(example, tokenizer) for example in examples] == ["a<|im_end|>"] * 3
    assert tokenizer.decode(examples[1].input_ids) == f"{CALLS}ua<|im_end|>"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (CALLS[0], "column 'tools': expected a list of objects, found an object"),
        (["f"], r"tools\[0\]: expected an object, found a string"),
        ([CALLS[0], None], r"tools\[1\]: expected an object, found null or nothing"),
        ("f(x)", "column 'tools': broken JSON: Expecting value at column 1"),
        ("3", "column 'tools': expected a list of objects, found a number"),
        ('[{"a": 1, "a": 2}]', "column 'tools': key 'a' is there twice"),
        (r'[{"a": "\ud800"}]', r"column 'tools'\[0\].a: expected whole characters"),
        (CALLS, "column 'tools': the tokenizer's chat template shows no tools"),
    ],
)
def test_tools_that_cannot_be_shown_are_refused(tools: object, message: str, tmp_path: Path, tokenizer: Any):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        encoded(tmp_path, [{"messages": ASKED}, {"messages": ASKED, "tools": tools}], tokenizer, max_length=400)


def test_a_template_that_needs_tools_gets_them(tmp_path: Path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no tools') if not tools else '' }}" + TEMPLATE
    (example,) = encoded(tmp_path, [{"messages": ASKED, "tools": CALLS}], tokenizer, max_length=400).examples
    assert learned_text(example, tokenizer) == "a<|im_end|>"


def test_an_opening_of_the_assistants_is_learned_without_its_header(tmp_path: Path, tokenizer: Any):
    turns = [("assistant", "hello"), ("user", "u"), ("assistant", "")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = encoded(tmp_path, [{"messages": messages}], tokenizer, max_length=200).examples
    assert learned_text(example, tokenizer) == "hello<|im_end|><|im_end|>"


def test_a_template_that_trims_and_marks_no_end_gets_the_end_token(tmp_path: Path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": " sp "}]
    (example,) = encoded(tmp_path, [{"messages": messages}], tokenizer, max_length=200).examples
    assert learned_text(example, tokenizer) == "sp\n<|im_end|>"


def test_a_template_without_end_marks_gets_the_end_token(tmp_path: Path):
    bare = build_tokenizer()
    bare.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    (example,) = encoded(tmp_path, [{"messages": messages}], bare).examples
    assert example.input_ids == [*bare("ua")["input_ids"], END]


def test_what_a_tokenizer_puts_around_a_text_goes_in_front_only(tmp_path: Path):
    around, special = build_tokenizer(), [("</s>", 3), ("<|im_end|>", 2)]
    around._tokenizer.post_processor = TemplateProcessing(single="</s> $A <|im_end|>", special_tokens=special)
    (example,) = encoded(tmp_path, [{"prompt": "p", "completion": "c"}], around).examples
    assert example.input_ids == [3, *around("pc", add_special_tokens=False)["input_ids"], END]


def test_a_merge_across_the_border_does_not_change_the_prompt(tmp_path: Path):
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "<end>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    data = encoded(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "a bc"}], merging)
    assert data.examples[0].input_ids == [0, 1, 5], "joined it would be [ab], which no prompt 'a' leads to"
    assert data.examples[1].input_ids == [0, 0, 4, 5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r":2: broken JSON: .* at column"),
        ("[1]", r":2: expected a JSON object, found a list"),
        ('{"prompt": "a", "completion": "b", "prompt": "c"}', r":2: key 'prompt' is there twice"),
        ('{"prompt": "a", "completion": "b", "more": {"x": 1, "x": 2}}', r":2: key 'x' is there twice"),
        (
            '{"prompt": "a"}',
            r":2: missing column 'completion' \(.* are prompt-completion\); found 'prompt'",
        ),
        ('{"prompt": "a", "completion": 3}', r":2: column 'completion': expected a string, found a number"),
        ('{"prompt": null, "completion": "c"}', r":2: column 'prompt': expected a string, found null or nothing"),
        (
            '{"prompt": "a", "completion": ""}',
            r":2: column 'completion': expected text .* an empty string",
        ),
        ('{"prompt": "a", "completion": "c", "label": 1}', r":2: column 'label' is for classification"),
        ('{"prompt": "a", "completion": "\udcff"}', r":2: expected UTF-8 text, found invalid start byte at byte"),
        (
            r'{"prompt": "a", "completion": "b\ud800"}',
            r":2: column 'completion': expected whole characters, found half",
        ),
        (r'{"prompt": "a", "completion": "b", "n": {"k": ["", "\uDFFF"]}}', r":2: column 'n'\.k\[1\]: expected whole"),
        (r'{"prompt": "a", "completion": "b", "\udfff": 1}', r":2: key '\\udfff': expected whole characters"),
        ('{"prompt": "a", "completion": "b", "n": %s}' % ("9" * 5000), r":2: a number has too many digits"),
        ('{"prompt": ' + "[" * 100_000, r":2: its values are nested too deeply to be read"),
        ('{"prompt": "a", "n": ' + "[" * 900 + r'"\ud800"' + "]" * 900 + "}", r":2: its values are nested too deeply"),
        ('{"prompt": "a\0", "completion": "b"}', r":2: broken JSON: Invalid control character"),
        ("\0\0", r":2: broken JSON: Expecting value at column 1"),
        ('\ufeff{"prompt": "a", "completion": "b"}', r":2: broken JSON: Unexpected UTF-8 BOM"),
        ('{"prompt": NaN, "completion": "b"}', r":2: column 'prompt': expected a string, found a number"),
        ('{"prompt": "a", "completion": ["b"]}', r":2: column 'completion': expected a string, found a list"),
        ("null", r":2: expected a JSON object, found null"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str, message: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl" + message) as caught:
        read_rows(path)
    assert (caught.value.path, caught.value.line) == (path, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a"},
            r"the columns \{prompt, completion\} or \{messages\} or \{text\}; found 'question'",
        ),
        ({"text": "a", "messages": []}, r"expected the columns of one format.*found several"),
        ({"messages": []}, "column 'messages': expected a list of messages, found an empty list"),
        ({"messages": "hi"}, "column 'messages': expected a list of messages, found a string"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: expected a string, found null"),
        ({"messages": [{"role": "user", "content": "u"}]}, "at least one message of role 'assistant'"),
    ],
)
def test_the_first_row_decides_and_is_checked(row: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(DataError, match=":1: .*" + message):
        read_rows(write_rows(tmp_path / "rows.jsonl", [row]))


def test_files_without_rows_are_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="expected at least one row, found an empty file"):
        read_rows(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="found nothing"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="found a folder"):
        read_rows(tmp_path)
    (tmp_path / "blank.jsonl").write_text("\ufeff\u00a0\n \t\n\u3000")
    with pytest.raises(DataError, match="expected at least one row, found an empty file"):
        read_rows(tmp_path / "blank.jsonl")


def test_what_is_no_text_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(DataError, match="expected a file of rows, found a pipe or a device"):
            read_rows(path)
    for path in (Path("/proc/self/mem"), tmp_path / ("x" * 300)):  # a file that cannot be read, a name that cannot be
        with pytest.raises(DataError, match=r"cannot be read: (Input/output error|File name too long)"):
            read_rows(path)
    path, rows = tmp_path / "rows.jsonl", b'{"text": "a"}\n'
    found = {
        gzip.compress(rows): "expected JSON lines, found a gzip file",
        b"PAR1": "expected JSON lines, found Parquet",
        rows.decode().encode("utf-16"): "expected UTF-8 text, found UTF-16",
        b"text\na\n": "broken JSON: Expecting value at column 1; expected one JSON object a line",
        b'[\n{"text": "a"}\n]\n': "expected one JSON object a line",
    }
    for content, message in found.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
            read_rows(path)
    path.rename(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: expected a Parquet file: "):
        read_rows(tmp_path / "rows.parquet")


def test_characters_written_in_two_halves_are_whole(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rb'{"text": "\ud83d\ude00"}' + b"\r\n" + rb'{"text": "\u0000"}')
    assert [row.fields["text"] for row in read_rows(path)] == ["\U0001f600", "\0"]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n')
    assert [(row.line, row.fields["text"]) for row in read_rows(path)] == [(1, "a"), (3, "b")]


def test_messages_need_a_chat_template(tmp_path: Path):
    bare = build_tokenizer()
    bare.chat_template = None
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r":1: rows of \{messages\} need a tokenizer with a chat template"):
        encoded(tmp_path, [{"messages": messages}], bare)


def test_a_template_that_refuses_or_rewrites_is_reported(tmp_path: Path):
    strict = build_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=":1: the chat template refuses these messages: roles must alternate"):
        encoded(tmp_path, [{"messages": messages}], strict)
    strict.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r":1: messages\[1\]: the chat template rewrites earlier turns"):
        encoded(tmp_path, [{"messages": messages}], strict)


def test_over_long_rows(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "ab", "completion": "cdefgh"}]
    with pytest.raises(DataError, match=r":2: expected at most 6 tokens, found 9"):
        encoded(tmp_path, rows, tokenizer, max_length=6)
    cut = encoded(tmp_path, rows, tokenizer, max_length=6, over_long="truncate")
    assert (cut.truncated, cut.dropped, len(cut.examples)) == (1, 0, 2)
    assert learned_text(cut.examples[1], tokenizer) == "cdef"
    dropped = encoded(tmp_path, rows, tokenizer, max_length=6, over_long="drop")
    assert (dropped.truncated, dropped.dropped, len(dropped.examples)) == (0, 1, 1)
    with pytest.raises(DataError, match="found all 2 longer"):
        encoded(tmp_path, rows, tokenizer, max_length=2, over_long="drop")
    with pytest.raises(DataError, match=":1: nothing to learn is left in its 2 tokens"):
        encoded(tmp_path, rows, tokenizer, max_length=2, over_long="truncate")


def test_a_batch_keeps_just_the_logits_that_labels_need():
    short = Example([7, 8, 9], [IGNORED, 8, 9]).feature()
    long = Example([4, 5, 6, 7, 8], [IGNORED] * 3 + [7, 8]).feature()
    whole = PaddingCollator(crop_logits=False)([short, long])
    assert whole["input_ids"].tolist() == [[7, 8, 9, 0, 0], [4, 5, 6, 7, 8]]
    assert whole["labels"].tolist() == [[-100, 8, 9, -100, -100], [-100, -100, -100, 7, 8]]
    cropped = PaddingCollator(crop_logits=True)([long])
    assert (cropped["logits_to_keep"], cropped["labels"].tolist()) == (3, [[-100, 7, 8]])
    assert PaddingCollator(crop_logits=True)([short, long])["logits_to_keep"] == 5


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2"])
def test_cropping_changes_no_loss(shape: str):
    model = build_model(shape)
    examples = [Example([7, 8, 9], [IGNORED, IGNORED, 9]), Example([4, 5, 6, 7, 8], [IGNORED] * 3 + [7, 8])]
    rows = [example.feature() for example in examples]
    losses = [model(**PaddingCollator(crop_logits=crop)(rows)).loss for crop in (False, True)]
    torch.testing.assert_close(losses[0], losses[1])


def test_the_digest_is_of_the_bytes(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_parquet_rows(tmp_path: Path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": None}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: column 'completion': expected a string, found null"):
        read_rows(path)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "ROWS.PARQUET")
    assert len(read_rows(tmp_path / "ROWS.PARQUET")) == 1
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), path)
    assert [row.fields for row in read_rows(path)] == rows[:1]
    path.write_text("not parquet")
    with pytest.raises(DataError, match="expected a Parquet file"):
        read_rows(path)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rows.parquet").write_text(json.dumps({}))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="Parquet needs pyarrow"):
        read_rows(tmp_path / "rows.parquet")
