"""Alignment by steps and size on the digits, two steps of training: what is kept, measured and drawn."""

import argparse
import json

import alignment_digits
import pytest
from PIL import Image

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.sweep import measure_alignment
from tests.examples.test_relatives import save_teacher
from tests.training.loop_cases import read_lines

FLAGS = ["--widths", "8", "--steps", "1", "2", "--timesteps", "300"]
TRAINING = ["--train_batch_size", "4", "--projector_dim", "8", "--logging_steps", "1", "--cache_images", "false"]


def test_rows_are_of_the_kept_models_and_nothing_is_trained_twice(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # a fifth of the time, for process groups that there are none of
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    places = ["--out", str(out), "--work", str(tmp_path / "work"), "--encoders", str(teacher)]
    alignment_digits.main([*places, *FLAGS, *TRAINING])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    encoders = ["teacher", "digits-ddpm, mid_block at 100", alignment_digits.UNTRAINED]
    sits = [row for row in rows if "width" in row]
    assert [(row["encoder"], row["method"], row["step"]) for row in sits] == [
        (encoder, method, step) for encoder in encoders for method in ("without", "REPA") for step in (1, 2)
    ]
    assert {(row["encoder"], row["other"]) for row in rows if "other" in row} == {
        (one, other) for one in encoders for other in encoders if one != other
    }
    row = next(row for row in sits if (row["encoder"], row["method"], row["step"]) == ("teacher", "REPA", 2))
    kept = Denoiser.from_pretrained(tmp_path / "work" / "REPA-8" / "kept" / "step-2")
    assert row["parameters"] == sum(parameter.numel() for parameter in kept.model.parameters())
    encoder, test = Encoder.from_pretrained(teacher), load_digits_splits()["test"]
    alone = measure_alignment(kept, encoder, test, [300], [f"blocks.{place}" for place in range(8)], k=10)
    assert row["cknna"] == pytest.approx(alone.best.scores["cknna"], abs=6e-5)  # four digits are written
    assert "alignment" in read_lines(tmp_path / "work" / "REPA-8")[-1]
    assert "alignment" not in read_lines(tmp_path / "work" / "without-8")[-1]
    for name in ("steps.png", "size.png"):
        with Image.open(out / name) as picture:
            assert (picture.format, picture.mode) == ("PNG", "P")  # 256 colours, a third of the size
    assert f"| 8 wide, REPA, step 2 | 0.01 M | {row['cknna']:.3f} |" in (out / "table.md").read_text()

    def again(*args, **options):
        raise AssertionError(f"trained twice: {args}")

    monkeypatch.setattr(alignment_digits, "train_repa", again)
    args = argparse.Namespace(work=tmp_path / "work", steps=[1, 2], encoders=[str(teacher)], flags=TRAINING)
    assert list(alignment_digits.train(args, "REPA", 8)) == [1, 2]
