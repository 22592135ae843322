import io
import sys
import time

import pytest

from ldm.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_how_many_are_done_how_fast_and_how_long_it_will_take(clock, capsys):
    with progress("looking", 100, "pictures", every=10) as advance:
        for _ in range(3):
            clock[0] += 5
            advance(10)
    assert capsys.readouterr().err == "  looking 20/100  2 pictures/s  40 s left\n"


def test_one_is_done_where_no_number_is_given(clock, capsys):
    with progress("drawing", 4, "steps", every=1) as advance:
        clock[0] += 2
        advance()
    assert capsys.readouterr().err == "  drawing 1/4  0.5 steps/s  6 s left\n"


def test_none_done_after_a_while_says_nothing(clock, capsys):
    with progress("looking", 4, "pictures", every=1) as advance:
        clock[0] += 2
        advance(0)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_whatever_the_label_holds(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("looking at [/sets]", 8, "pictures") as advance:
        advance(3)
        advance(5)
    assert "looking at [/sets]" in terminal.getvalue()
    assert "8/8" in terminal.getvalue()
