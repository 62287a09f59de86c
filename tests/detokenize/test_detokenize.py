"""Streaming text against `decode` of everything at once, for the kinds of tokenizers that causal models have."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftmux.runtime.engine.detokenize import Detokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "base"
TEXTS = [
    "The quick brown fox jumps over the lazy dog, it's said.  Twice!\n\tTabs too.",
    "Größe, façade, naïve, señor, Ångström; Привет, мир! Καλημέρα κόσμε",
    "你好，世界。こんにちは世界、안녕하세요 세계. नमस्ते दुनिया สวัสดีชาวโลก مرحبا بالعالم",
    "👩‍👩‍👧‍👦 family 🇩🇪 flag 👍🏽 thumbs 🤷‍♀️ e\u0301 combining \U0001f600\U0001f680",
    "def f(x):\n    return x ** 2  # α → β ≤ γ",
]
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("日本", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words begin with a marked space, what is not in the vocabulary is spelt in bytes."""
    words = ["▁", "▁▁", "▁Hello", "▁world", "lo", "▁", "s", "a", "▁a", ".", "日", "\ufffd", ""]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def metaspace() -> Tokenizer:
    pieces = [(piece, -1.0) for piece in ["<unk>", *SPECIAL, "▁", "▁▁", "▁Hello", "▁wor", "ld", "o", "日本", "👍", "!"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", *SPECIAL, "hello", "##lo", "wor", "##ld", ".", ",", "'", "s", "don", "n't"]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def end_of_word() -> Tokenizer:
    pieces = ["<unk>", *SPECIAL, "hel", "lo</w>", "world</w>", "a", "</w>"]
    tokenizer = Tokenizer(models.WordLevel({piece: id for id, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    if (FIXTURES / name).is_dir():
        loaded = AutoTokenizer.from_pretrained(FIXTURES / name)
        assert isinstance(loaded, PreTrainedTokenizerFast)
        return loaded
    return PreTrainedTokenizerFast(tokenizer_object=globals()[name](), bos_token="<s>", eos_token="</s>")


NAMES = ["byte_level", "byte_fallback", "metaspace", "word_piece", "end_of_word", "llama", "qwen2"]


def stream(tokenizer, ids, stop=(), size=1):
    """(deltas, stopped) of ids handed over `size` at a time, the flush as the last delta."""
    detokenizer, deltas = Detokenizer(tokenizer, stop), []
    for at in range(0, len(ids), size):
        text, stopped = detokenizer.push(ids[at : at + size])
        deltas.append(text)
        if stopped:
            return deltas, True
    return [*deltas, detokenizer.finish()], False


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def first_match(text, stop):
    """Where the text ends: before the string that is complete first (the longest of those that end there)."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(ends)[1] if ends else None


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_decode(name, data):
    tokenizer = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=40))
    size = data.draw(st.integers(1, 5))
    deltas, _ = stream(tokenizer, ids, size=size)
    assert "".join(deltas) == decode(tokenizer, ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20) | st.sampled_from(TEXTS))
def test_no_delta_holds_half_a_character(name, text):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    deltas, _ = stream(tokenizer, ids)
    assert "".join(deltas) == decode(tokenizer, ids)
    assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_text_ends_before_the_first_stop_string(name, data):
    """Stop strings are cut from the text itself, so that they match, span tokens and overlap."""
    tokenizer = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=25))
    text = decode(tokenizer, ids)
    spans = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 6)).map(lambda s: text[s[0] : s[0] + s[1]])
    stop = data.draw(st.lists(spans | st.text(min_size=1, max_size=3), min_size=1, max_size=3))
    stop = [s for s in stop if s]
    size = data.draw(st.integers(1, 5))
    deltas, stopped = stream(tokenizer, ids, stop, size)
    cut = first_match(text, stop)
    assert "".join(deltas) == text[:cut]
    if cut is None:
        assert not stopped


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_overlapping_stop_strings(text, stop):
    tokenizer = tokenizer_of("byte_level")
    detokenizer, out = Detokenizer(tokenizer, stop), ""
    cut = first_match(text, stop)
    for i, id in enumerate(tokenizer.convert_tokens_to_ids(list(text))):
        delta, stopped = detokenizer.push([id])
        out += delta
        held = text[: i + 1].removeprefix(out)
        if stopped:
            assert any(text[: i + 1].endswith(s) for s in stop)
            break
        assert any(s.startswith(held) for s in stop)
    else:
        out += detokenizer.finish()
    assert out == text[:cut]


def test_only_a_possible_match_is_held_back():
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer, ("stop",))
    pushed = [detokenizer.push([id]) for id in tokenizer.convert_tokens_to_ids([*"astostxstop"])]
    assert [text for text, _ in pushed] == ["a", "", "", "", "sto", "", "stx", "", "", "", ""]
    assert [stopped for _, stopped in pushed] == [False] * 10 + [True]
    assert detokenizer.push([4]) == ("", True)
    assert detokenizer.finish() == ""


def test_a_held_beginning_is_flushed_at_the_end():
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer, ("stop",))
    assert detokenizer.push(tokenizer.convert_tokens_to_ids([*"ast"])) == ("a", False)
    assert detokenizer.finish() == "st"


def test_half_a_character_waits_and_an_unfinished_one_shows_at_the_end():
    tokenizer = tokenizer_of("byte_level")
    rocket = tokenizer.convert_tokens_to_ids([*"ðŁļĢ"])  # the four bytes of U+1F680 in GPT-2's alphabet
    deltas, _ = stream(tokenizer, rocket)
    assert deltas == ["", "", "", "🚀", ""]
    deltas, _ = stream(tokenizer, rocket[:3])
    assert deltas == ["", "", "", "\ufffd"]


def test_leading_spaces_are_the_tokenizers():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world", "▁", "▁a"])
    assert stream(tokenizer, ids)[0] == ["Hello", " world", " ", " a", ""]


def test_a_piece_without_text_does_not_disturb_spaces():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["▁Hello", "", "▁world"])
    assert stream(tokenizer, ids)[0] == ["Hello", "", " world", ""]


def test_special_tokens_have_no_text_and_do_not_disturb_spaces():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["<s>", "▁Hello", "</s>", "▁world", "</s>"])
    assert stream(tokenizer, ids)[0] == ["", "Hello", "", " world", "", ""]


def test_the_prompt_is_no_part_of_the_text():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["▁world"])
    assert Detokenizer(tokenizer, ("Hello",)).push(ids) == ("world", False)


def test_a_stop_string_may_appear_in_the_flush():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0x62>", "<0x63>"])
    assert stream(tokenizer, ids, ["bc"]) == (["a", "", "", ""], False)


def test_the_cost_of_a_token_does_not_grow(monkeypatch):
    tokenizer = tokenizer_of("byte_fallback")
    from peftmux.runtime.engine import detokenize

    decoded = []
    real = detokenize._Vocabulary.decode
    monkeypatch.setattr(detokenize._Vocabulary, "decode", lambda self, ids: decoded.append(len(ids)) or real(self, ids))
    words, byte = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"]), tokenizer.convert_tokens_to_ids("<0x41>")
    ids = words * 500 + [byte] * 1000 + words * 500
    stream(tokenizer, ids)
    assert sum(decoded) < 5 * len(ids)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="at least one character"):
        Detokenizer(tokenizer_of("byte_level"), ("a", ""))


def test_the_first_tokens_cannot_stop():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("ab ab ab ab", add_special_tokens=False)
    free = Detokenizer(tokenizer, ("b",), min_tokens=len(ids) - 1)
    pieces = [free.push([token]) for token in ids]
    assert [stopped for _, stopped in pieces] == [False] * (len(ids) - 1) + [True]
    assert "".join(text for text, _ in pieces) == "ab ab ab a"
    assert Detokenizer(tokenizer, ("b",)).push(ids) == ("a", True)
