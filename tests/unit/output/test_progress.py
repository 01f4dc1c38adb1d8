"""Progress: a bar on a terminal, a line a minute in a file, nothing where nobody asked."""

import io
import sys

import pytest

from lvlm_prune.clock import command
from lvlm_prune.output import progress
from lvlm_prune.output.progress import SECONDS_BETWEEN_LINES, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Progress, "_last_line", float("-inf"))
    return now


def test_a_file_gets_a_line_a_minute(clock, capsys):
    with Progress("Scoring", 100, "questions") as shown:
        for second in range(1, 301):
            clock[0] = float(second)
            shown.update(0.25)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "Scoring: 15 of 100 questions (15%) after 1 min, about 6 min left"
    assert len(err.splitlines()) == 300 / SECONDS_BETWEEN_LINES


def test_a_minute_is_one_of_the_command_and_not_of_each_thing_that_it_does(clock, capsys):
    """Two models are scored in 50 seconds each, after libraries were imported for 10."""
    with command():
        for begin, title in ((10, "Scoring baseline"), (60, "Scoring model"), (110, "Answers")):
            clock[0] = float(begin)
            with Progress(title, 50, "questions") as shown:
                for second in range(begin + 1, begin + 51):
                    clock[0] = float(second)
                    shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "Scoring baseline: 50 of 50 questions (100%) after 50 s, about 0 s left",
        "Answers: 10 of 50 questions (20%) after 10 s, about 40 s left",
    ]


def test_what_an_earlier_run_did_counts_as_done_but_not_for_the_time_left(clock, capsys):
    shown = Progress("Pruning", 10, initial=8)
    shown.describe("block 9/10")
    clock[0] = 60.0
    shown.advance_to(9)
    assert capsys.readouterr().err == "Pruning: 90% · block 9/10 after 1 min, about 1 min left\n"


def test_short_work_prints_nothing(clock, capsys):
    with Progress("Packing", 2, "shards") as shown:
        shown.update()
        clock[0] = 59.0
        shown.update()
    assert capsys.readouterr() == ("", "")


def test_hidden_progress_prints_nothing(clock, capsys):
    with Progress("Packing", 2, "shards", shown=False) as shown:
        clock[0] = 1e6
        shown.update()
    assert capsys.readouterr() == ("", "")


def test_nothing_is_printed_once_it_is_closed(clock, capsys):
    shown = Progress("Packing", 2, "shards")
    shown.close()
    clock[0] = 1e6
    shown.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("Scoring model", 10, "questions") as shown:
        shown.update(4)
        shown._bar.refresh()
        text = sys.stderr.getvalue()
    assert "Scoring model" in text
    assert "4/10 questions" in text


def test_nothing_is_said_of_what_is_left_before_there_is_something_to_judge_by():
    with Progress("Scoring", 1000, "questions", shown=False) as progress:
        progress.update(1)
        assert "left" not in progress.line(seconds=1.0)
        assert progress.line(seconds=10.0).endswith("about 2.8 h left")
