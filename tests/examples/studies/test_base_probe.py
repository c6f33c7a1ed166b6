"""The comparison of a base with pixels and its untrained self runs, on few digits."""

import json

from base_probe import main

from tests.examples.scripts import EXAMPLES


def test_a_report_of_digits(tmp_path, capsys):
    flags = {"dataset_name": "digits", "model": EXAMPLES / "models" / "digits-ddpm", "output_dir": tmp_path,
             "inits": 1, "timesteps": 100, "layers": "mid_block", "train": 200, "validation": 100,
             "test": 100}  # fmt: skip
    main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["trained"]["layer"] == "mid_block"
    assert report["trained"]["accuracy"] > 0.8
    assert 0.5 < report["pixels"] < 1
    assert len(report["untrained"]) == 1
