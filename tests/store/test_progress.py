"""Bars: one line where the output is no terminal; a sweep's bar, whose share only grows."""

import io
import sys

import pytest

from diffusers_repr.store.progress import LineBar, progress_bar
from diffusers_repr.sweep.progress import SweepBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_line_in_a_file_and_a_moving_bar_on_a_terminal(monkeypatch):
    for stream, lines in ((io.StringIO(), 1), (Terminal(), None)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(3, "features", " images", start=1) as bar:
            for _ in range(2):
                bar.update()
                bar.set_postfix_str("loss=0.5", refresh=False)
        text = stream.getvalue()
        assert "3/3" in text
        assert "features" in text
        if lines:
            assert text.count("\n") == lines
            assert "\r" not in text
            assert text.startswith("features: 3/3 [00:00, ")
            assert text.endswith(", loss=0.5]\n")
        else:
            assert "\r" in text


def test_nothing_is_shown_where_nothing_is_wanted(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(3, shown=False) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""


def test_a_line_is_told_once(capsys):
    with LineBar(2) as bar:
        bar.update()
        bar.close()
    assert capsys.readouterr().err.count("1/2") == 1


def test_the_share_of_a_sweep_only_grows():
    """Later stages make less than announced, one that was announced makes nothing, one makes more."""
    shares, totals = [], []
    with SweepBar(shares.append, "selection") as bar:
        bar.plan({"all": 10, "finalists": 8, "sets of layers": 6, "sets of levels": 4})
        for stage, count in (("all, one", 5), ("all, two", 5), ("finalists 1", 3), ("sets of levels", 2)):
            bar.begin(stage, count)
            totals.append(bar.total)
            for _ in range(count):
                bar.update()
    assert totals == [28, 28, 28, 17]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[4] == pytest.approx(5 / 28)
    assert bar.total == bar.done == 15


def test_a_sweep_that_fails_is_not_told_to_be_done():
    shares = []

    def fail():
        with SweepBar(shares.append, "selection") as bar:
            bar.begin("all", 4)
            bar.update()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert shares == [0.25]
