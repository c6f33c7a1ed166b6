"""The guidance table of the digits, on a few samples."""

import json
import sys

import guidance_digits
import numpy as np
import pytest
import torch
from digits_metrics import DigitsJudge


@pytest.fixture(scope="module")
def judge():
    return DigitsJudge.train(seed=0, epochs=1)


def test_rows_are_of_the_saved_samples_and_are_not_done_twice(tmp_path, monkeypatch, judge):
    monkeypatch.setattr(guidance_digits.DigitsJudge, "train", lambda seed: judge)
    rows = ["none", "CFG(1.5)", "no class: PAG(0.5)"]
    command = ["guidance_digits.py", "--output_dir", str(tmp_path), "--seeds", "0", "--num_samples", "70"]
    monkeypatch.setattr(sys, "argv", [*command, "--num_inference_steps", "2", "--rows", *rows])
    guidance_digits.main()
    lines = (tmp_path / "rows.jsonl").read_text()
    found = {row["row"]: row for row in map(json.loads, lines.splitlines())}
    assert list(found) == rows
    for name, row in found.items():
        images = torch.from_numpy(np.load(guidance_digits.samples_file(tmp_path, name, 0, 70, 2))).float() / 255
        if name == "no class: PAG(0.5)":
            assert row["accuracy"] is None
        else:
            right = (judge.predict(images) == torch.arange(70) % 10).sum().item()
            assert row["accuracy"] == pytest.approx(right / 70, abs=0.03)  # saved in 256 grey levels
        assert row["frechet_distance"] == pytest.approx(judge.frechet_distance(images, "augmented"), rel=0.05)
    assert found["none"]["frechet_distance"] != found["CFG(1.5)"]["frechet_distance"]
    report = (tmp_path / "report.md").read_text()
    assert [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("| ")][1:4] == rows
    assert (tmp_path / "scales.png").is_file()
    assert (tmp_path / "digits.png").is_file()

    def again(*args):
        raise AssertionError(f"done twice: {args}")

    monkeypatch.setattr(guidance_digits, "run_row", again)
    monkeypatch.setattr(guidance_digits, "pictures", lambda *args: None)
    guidance_digits.main()
    assert (tmp_path / "rows.jsonl").read_text() == lines
