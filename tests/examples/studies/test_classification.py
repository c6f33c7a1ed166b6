"""The study of heads, on few images and two heads."""

import json
import sys
from unittest import mock

import classification
import pytest

from tests.examples.scripts import picture


@pytest.mark.slow
def test_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classification, "CURVE", [50])
    flags = ["--heads", "knn", "--shares", "1", "--seeds", "0", "--epochs", "1", "--limit", "40", "--test_limit", "20"]
    argv = ["classification.py", *flags, "--timesteps", "30", "--output_dir", str(tmp_path)]
    with mock.patch.object(sys, "argv", argv):
        classification.main()
    assert "| knn | **" in capsys.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["recipe"]["train"]["rows"] == 40
    assert found["recipe"]["test"]["rows"] == 20
    assert json.loads((tmp_path / "noise_curve.json").read_text())["timesteps"] == [50]
    assert picture(tmp_path / "comparison.png").width > 400
    assert picture(tmp_path / "heatmap.png").width > 400
