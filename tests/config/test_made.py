"""What a recipe needs and does not find is told with the command that makes it."""

import pytest

from diffusers_repr.config.made import check_made

RECIPES = {
    "encoder.yaml": "# A teacher.\n# accelerate launch train_encoder.py --config examples/encoder.yaml   # first\n"
    "output_dir: outputs/teacher/\ndataset_name: data/cars\n",
    "model.yaml": "# Cars, by: to_parquet('data/cars/train.parquet')\noutput_dir: outputs/model\n",
}


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name, text in RECIPES.items():
        (tmp_path / "configs" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return "configs"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("outputs/teacher", "This makes it: accelerate launch train_encoder.py --config examples/encoder.yaml"),
        ("outputs/model", "This makes it: a run of the recipe configs/model.yaml"),
        ("data/cars", "The first lines of configs/model.yaml tell how it is made."),
        ("./nowhere", "Check the path."),
        ("a/b/c", "Check the path."),
    ],
)
def test_what_is_missing(recipes, name, hint):
    with pytest.raises(FileNotFoundError) as told:
        check_made(recipes, encoder=["user/on-the-hub", name], other=None)
    assert str(told.value) == f"--encoder: there is no {name!r} here. {hint}"


def test_what_is_there_or_may_be_on_the_hub(recipes, tmp_path):
    (tmp_path / "outputs" / "teacher").mkdir(parents=True)
    check_made(recipes, encoder=["outputs/teacher", "none", "facebook/dinov2-base"], dataset_name="digits", vae=None)
