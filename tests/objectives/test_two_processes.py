"""Objectives that make representations: two processes with half of the batch each learn as one with all of it."""

import pytest
import torch
from safetensors.torch import load_file

from tests.objectives.representation_cases import CASES, COUNT, LOOP, Rows, gradients, mdm
from tests.training.loop_cases import forget_accelerate, read_lines, run_here


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_batch(together, name):
    folder, told = together
    here, both = gradients(name), load_file(folder / "representations" / f"{name}.safetensors")
    assert [each[name] for each in told["representations"]] == [sorted(here)] * 2
    largest = max(float(value.abs().max()) for value in here.values())
    for key, value in here.items():
        torch.testing.assert_close(both[key], value, rtol=1e-4, atol=1e-5 * largest)


def test_the_loop(together, tmp_path):
    run_here(tmp_path, mdm(), Rows(), **LOOP, train_batch_size=COUNT)
    forget_accelerate()
    one, two = (read_lines(folder) for folder in (tmp_path, together[0] / "representations" / "loop"))
    assert len(one) == 2
    for mine, theirs in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4)
