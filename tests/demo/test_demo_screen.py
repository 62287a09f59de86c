"""What the demo prints stays inside its width and aligned, with and without a terminal."""

from __future__ import annotations

import io

from peftmux.demo.show import WIDTH, Screen, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_words_stay_inside_the_width_and_lose_nothing() -> None:
    out = io.StringIO()
    screen = Screen(out)
    text = "Anna goes to the market and meets Ben. " * 20
    for start in range(0, len(text), 3):
        screen.words(text[start : start + 3])
    screen.line("done")
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert " ".join(" ".join(lines).split()) == f"{text.strip()} done"
    assert lines[-1] == "done"


def test_table_columns_are_aligned() -> None:
    out = io.StringIO()
    Screen(out).table(("input", "answer"), [("A", "BB"), ("CCCCCC", "D")])
    header, first, second = out.getvalue().splitlines()
    assert header.index("answer") == first.index("BB") == second.index("D")


def test_progress_is_one_line_without_a_terminal_and_redraws_on_one() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for file in (plain, terminal):
        screen = Screen(file)
        screen.progress("1/2")
        screen.progress("2/2", done=True)
    assert plain.getvalue() == "2/2\n"
    assert terminal.getvalue().count("\r") == 2
    assert terminal.getvalue().endswith("2/2\n")


def test_colours_are_for_terminals_only(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Screen(io.StringIO()).paint("x", "green") == "x"
    assert Screen(Terminal()).paint("x", "green") != "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(Terminal()).paint("x", "green") == "x"


def test_bar_is_clamped() -> None:
    assert bar(0.5, 4) == "━━──"
    assert bar(2.0, 4) == "━━━━"
    assert bar(-1.0, 4) == "────"


def test_note_waits_for_the_end_of_a_word() -> None:
    out = io.StringIO()
    screen = Screen(out)
    screen.words("Anna fin")
    screen.note("  + loaded")
    screen.words("ds a key")
    screen.line()
    screen.note("  + idle")
    assert out.getvalue() == "    Anna finds\n  + loaded\n    a key\n\n  + idle\n"
