"""The study of segmentation, on few crops and few members."""

import json

import pytest
import segmentation

from tests.examples.scripts import picture

pytest.importorskip("skimage")


def test_rows_are_measured_once_and_drawn(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path), "--sets", "coins", "--members", "2", "--sizes", "5", "--seeds", "0"]
    flags += ["--max_epochs", "1"]
    segmentation.main([*flags, "--sources", "pixels", "places"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == {"pixels", "places"}
    assert all(0.5 < row["mean_iou"] < 1 for row in rows)
    assert all(row["rows"] == segmentation.HELD["coins"] for row in rows)
    capsys.readouterr()
    segmentation.main([*flags, "--sources", "pixels"])
    assert "| a pixel | " in capsys.readouterr().out
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert picture(tmp_path / "coins.png").width > 400


def test_what_is_learned_from_is_never_measured_on():
    images, masks = segmentation.coin_crops()
    assert len(images) == len(masks) == 48
    assert 0.3 < sum(mask.mean() for mask in masks) / 48 < 0.4
    study = segmentation.Study.__new__(segmentation.Study)
    study.sets = {"coins": (list(range(48)), list(range(48)))}
    for seed in range(3):
        (train, _), (held, _) = study.split("coins", 10, seed)
        assert len(train) == 10
        assert len(held) == segmentation.HELD["coins"]
        assert not set(train) & set(held)
