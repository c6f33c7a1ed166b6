"""The page's tables from REPA's flags to ours: every setting exists, with the default that is told."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import sample_for_fid
import train_repa

from diffusers_repr.data import DataConfig
from diffusers_repr.denoiser.default_layers import repa_block
from diffusers_repr.objectives import REPAConfig
from diffusers_repr.training import TrainingConfig

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
SECTION = PAGE.partition("### From REPA's code")[2].partition("\n### ")[0]
ROWS = re.findall(r"^\| (.+?) \| ?(.*?) \| `(\w+)` \| `(\S+)` \| ?(.*?) ?\|$", SECTION, re.M)
SPLIT = [row[0] for row in ROWS].index("`--num-fid-samples`")


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        (ROWS[:SPLIT], (TrainingConfig, DataConfig, train_repa.ModelConfig, REPAConfig)),
        (ROWS[SPLIT:], (sample_for_fid.Settings,)),
    ],
)
def test_defaults(rows, kinds):
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    assert len(rows) > 10
    for flag, _, name, told, _ in rows:
        field = fields[name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        plain = "none" if default in (None, []) else default if isinstance(default, str) else json.dumps(default)
        assert told == plain, flag


def test_layers_that_are_not_set_are_those_of_the_table():
    assert "Not set: 4 of 12 blocks, 8 of 24 and 28" in PAGE
    for depth, block in ((12, 4), (24, 8), (28, 8)):
        assert repa_block([f"blocks.{at}" for at in range(depth)]).layers == (f"blocks.{block - 1}",)
