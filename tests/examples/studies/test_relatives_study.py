"""The table of REPA's relatives, two steps of one of them."""

import json

import pytest
import relatives
from judge import Judge

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.sweep import measure_alignment
from tests.examples.test_relatives import TINY, save_teacher
from tests.training.loop_cases import read_lines


def test_a_row_is_of_the_saved_run_and_it_is_not_trained_twice(tmp_path, monkeypatch):
    save_teacher(tmp_path / "teacher")
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # a fifth of the time, for process groups that there are none of
    monkeypatch.setattr(relatives, "the_judge", lambda *_, **__: Judge(1, 10, 4).eval())
    out, work = tmp_path / "out", tmp_path / "work"
    command = ["--out", str(out), "--work", str(work), "--runs", "SRA", "--samples", "20", "--probe_images", "200"]
    command += ["--probe_test", "100", "--middle_layer", "blocks.1", "--max_train_steps", "2", "--train_batch_size"]
    command += ["4", "--logging_steps", "1", "--eval_batch_size", "0", "--model", json.dumps(TINY)]
    config = tmp_path / "configs"
    config.mkdir()
    for name in ("repa", "sra"):
        text = (relatives.CONFIGS / f"{name}_digits.yaml").read_text()
        (config / f"{name}_digits.yaml").write_text(text.replace("outputs/digits-encoder", str(tmp_path / "teacher")))
    monkeypatch.setattr(relatives, "CONFIGS", config)
    relatives.main(command)
    (row,) = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    last = read_lines(work / "SRA")[-1]
    assert {"denoising", "self_alignment"} <= last.keys()
    assert row["denoising"] == round(last["denoising"], 4)
    digits, settings = load_digits_splits(), {"metrics": ("linear",), "samples": 200, "batch_size": 500}
    kept, teacher = Denoiser.from_pretrained(work / "SRA"), Encoder.from_pretrained(tmp_path / "teacher")
    test = digits["test"].select(range(100))
    alone = measure_alignment(kept, teacher, digits["train"], [200], ["blocks.1"], test=test, **settings)
    assert row["probe_middle"] == pytest.approx(alone.best.scores["linear"], abs=6e-5)  # four digits are written
    assert "| SRA | " in (out / "table.md").read_text()
    monkeypatch.setattr(relatives, "train_repa", lambda *_: pytest.fail("trained twice"))
    relatives.main(command)
    assert (out / "samples.png").read_bytes()[:4] == b"\x89PNG"
