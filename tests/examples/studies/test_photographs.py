"""The picture of photographs, on small ones."""

import photographs
import pytest
from PIL import Image

pytest.importorskip("matplotlib")


def test_the_photographs_of_scikit_learn_and_ones_own(tmp_path):
    Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 20).save(tmp_path / "own.png")
    small = ["--image_size", "32", "48", "--timesteps", "100"]
    photographs.main([*small, "--output_dir", str(tmp_path / "theirs")])
    photographs.main([*small, "--output_dir", str(tmp_path / "own"), "--images", str(tmp_path / "own.png")])
    with Image.open(tmp_path / "theirs" / "pca.jpg") as two, Image.open(tmp_path / "own" / "pca.jpg") as one:
        assert two.width == one.width
        assert 1.5 * one.height < two.height < 2 * one.height
