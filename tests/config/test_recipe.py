import dataclasses
import json
import math
from typing import ClassVar

import pytest
import torch
import yaml

from diffusers_repr.config import parse_recipe
from diffusers_repr.config.recipe import REQUIRED, check_keys, json_mapping, read_recipe, setting, to_yaml
from diffusers_repr.data import DataConfig
from diffusers_repr.training import TrainingConfig, recipe_of
from diffusers_repr.training.logs import read_log
from diffusers_repr.training.seeds import learning_rate, reseed


@dataclasses.dataclass(frozen=True)
class Other:
    """Settings of a method."""

    layers: list[str] = dataclasses.field(default_factory=lambda: ["mid"])
    levels: str | None = setting(None, "a list as JSON")
    model: dict | str | None = setting(None, "a mapping")
    weight: float = setting(0.5, "a number")


def write(folder, **recipe):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["--config", str(path)]


def test_flags_win_over_the_recipe(tmp_path):
    argv = write(tmp_path, seed=3, learning_rate="1e-3", allow_tf32=True, weight=2, lr_scheduler=None)
    config, other = parse_recipe([TrainingConfig, Other], [*argv, "--seed", "5"])
    assert config.seed == 5
    assert config.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert config.allow_tf32 is True
    assert config.lr_scheduler == "constant"  # null leaves the default
    assert other == Other(weight=2.0)
    assert parse_recipe([Other], []) == (Other(),)


def test_lists_and_mappings(tmp_path):
    argv = write(tmp_path, layers=["a.0", "b"], levels=[0, 0.5], model={"sizes": [1, 2], "name": None})
    (other,) = parse_recipe([Other], argv)
    assert other.layers == ["a.0", "b"]
    assert json.loads(other.levels) == [0, 0.5]
    assert json_mapping("model", other.model) == {"sizes": [1, 2], "name": None}
    (other,) = parse_recipe([Other], [*argv, "--layers", "c", "--model", '{"x": 1}'])
    assert other.layers == ["c"]
    assert json_mapping("model", other.model) == {"x": 1}
    assert parse_recipe([Other], write(tmp_path, layers=[]))[0].layers == []


def test_a_recipe_of_settings_gives_them_again(tmp_path):
    given = (TrainingConfig(output_dir="here", seed=2, mixed_precision="no", push_to_hub=True, hub_model_id="me/it"),
             DataConfig(dataset_name="digits", random_shift=0.1), Other(["x", "y"], "[1]", {"a": [1]}))  # fmt: skip
    recipe = recipe_of(*given)
    assert not {"output_dir", "resume_from_checkpoint", "dry_run", "push_to_hub", "hub_model_id"} & recipe.keys()
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    argv = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "here"]
    config, data, other = parse_recipe([TrainingConfig, DataConfig, Other], argv)
    assert config == dataclasses.replace(given[0], push_to_hub=False, hub_model_id=None)
    assert data == given[1]
    assert (other.layers, json.loads(other.levels), json_mapping("model", other.model)) == (
        ["x", "y"],
        [1],
        {"a": [1]},
    )
    assert list(read_recipe(tmp_path / "recipe.yaml")) == list(recipe)  # in their order


def test_a_list_that_stands_twice_is_written_twice(tmp_path):
    twice = [1, 2]
    (tmp_path / "recipe.yaml").write_text(to_yaml({"a": twice, "b": twice}))
    assert read_recipe(tmp_path / "recipe.yaml") == {"a": twice, "b": twice}


def test_unknown_keys_and_flags(tmp_path):
    with pytest.raises(
        ValueError, match=r"Unknown key 'learning_rat' in .*recipe.yaml. Closest allowed: .'learning_r"
    ):
        parse_recipe([TrainingConfig], write(tmp_path, learning_rat=1))
    with pytest.raises(ValueError, match="Unknown flag --learning_rat. Closest: --learning_rate"):  # no abbreviation
        parse_recipe([TrainingConfig], ["--learning_rat", "1"])
    with pytest.raises(ValueError, match=r"Unknown key 'zzz' in `model`. Closest allowed: \['a', 'b'\]"):
        check_keys("`model`", {"zzz": 1}, ["self", "b", "a"])
    with pytest.raises(ValueError, match="`model` must be a mapping"):
        json_mapping("model", "[1]")
    with pytest.raises(ValueError, match=r"`model` is no JSON .*--model '\{"):
        json_mapping("model", "{a: 1}")
    with pytest.raises(ValueError, match="Unknown flag --zzz. --help lists all"):
        parse_recipe([TrainingConfig], ["--zzz=1"])


def test_files_that_are_no_recipe(tmp_path):
    write(tmp_path, seed=1)
    with pytest.raises(FileNotFoundError, match=r"No recipe .*none.yaml.*In .*: \['recipe.yaml'\]"):
        parse_recipe([TrainingConfig], ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(FileNotFoundError, match=r"nowhere.*: \[\]"):
        read_recipe(tmp_path / "nowhere" / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds a list; a recipe is a mapping"):
        read_recipe(tmp_path / "list.yaml")


def test_values_of_another_kind_name_their_place(tmp_path, capsys):
    for changes, message in (
        ({"seed": "many"}, "recipe.yaml: seed is 'many'; allowed is a whole number"),
        ({"lr_scheduler": "step"}, "lr_scheduler is 'step'; allowed is one of 'constant', 'linear', 'cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_recipe([TrainingConfig], write(tmp_path, **changes))
    with pytest.raises(SystemExit):
        parse_recipe([TrainingConfig], ["--seed", "many"])
    assert "--seed: invalid int" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 0}, "`train_batch_size` must be positive, got 0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be positive, got -1.0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be positive"),
        ({"lora_rank": -1}, "`lora_rank` must be 0 or more, got -1"),
        ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must be 0 or more"),
        ({"seed": -1}, "`seed` must be 0 or more"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` is no, fp16 or bf16, got 'fp8'"),
        ({"eval_batch_size": 5}, "multiple of 8, or 0, got 5"),
        ({"ema_max_decay": 1.5}, r"`ema_max_decay` lies in \[0, 1\], got 1.5"),
        ({"push_to_hub": True}, "`push_to_hub` needs `hub_model_id`, user/name; got None"),
        ({"push_to_hub": True, "hub_model_id": "name"}, "user/name; got 'name'"),
        ({"push_to_hub": True, "hub_model_id": "a b/c"}, "user/name; got 'a b/c'"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_what_decides_the_weights():
    plain = TrainingConfig()
    for free in ({"output_dir": "x"}, {"checkpointing_steps": 1}, {"logging_steps": 1}, {"save_dtype": "float16"},
                 {"dataloader_num_workers": 3}, {"eval_batch_size": 8}, {"report_to": "tensorboard"},
                 {"validation_steps": 3}, {"max_train_steps": 7}, {"dry_run": True}):  # fmt: skip
        assert TrainingConfig(**free).identity() == plain.identity()
    for kept in ({"seed": 1}, {"learning_rate": 1.0}, {"lora_rank": 2}, {"ema_warmup": False}, {"max_grad_norm": 2.0},
                 {"train_batch_size": 1}, {"gradient_accumulation_steps": 2}, {"adam_beta2": 0.9}):  # fmt: skip
        assert TrainingConfig(**kept).identity() != plain.identity()
    cosine = TrainingConfig(lr_scheduler="cosine")
    assert cosine.identity() != dataclasses.replace(cosine, max_train_steps=7).identity()


@pytest.mark.parametrize("lr_scheduler", ["constant", "linear", "cosine"])
def test_learning_rate(lr_scheduler):
    config = TrainingConfig(lr_scheduler=lr_scheduler, learning_rate=2.0, lr_warmup_steps=4, max_train_steps=12)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    if lr_scheduler == "constant":
        assert rates[4:] == [2.0] * 8
    else:
        assert rates[8] == pytest.approx(1.0)
        assert rates[11] == pytest.approx(0.25 if lr_scheduler == "linear" else 1 + math.cos(math.pi * 7 / 8))


def test_seeds_of_steps_and_processes_differ():
    draws = []
    for seed, step, rank in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)):
        reseed(seed, step, rank)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[4])
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_the_log_of_a_killed_run(tmp_path):
    assert read_log(tmp_path / "none.jsonl", 5) == []
    (tmp_path / "loss.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    assert read_log(tmp_path / "loss.jsonl", 4) == [{"step": 2}, {"step": 4}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Settings of a command."""

    POSITIONAL: ClassVar = ("model", "images")

    model: str = setting(REQUIRED, "a folder")
    images: list[str] = setting(REQUIRED, "files")
    quiet: bool = setting(False, "no progress bar")
    layers: list[str] = setting(["mid"], "paths")


def test_what_stands_without_a_flag(tmp_path, capsys):
    recipe = write(tmp_path, model="r", images=["x", "y"], quiet=True)
    for argv, wanted in (
        (["m", "a", "b"], Command(model="m", images=["a", "b"])),
        (["--quiet", "m", "a"], Command(model="m", images=["a"], quiet=True)),  # "m" is no value of the switch
        (["m", "a", "--quiet", "false", "--layers", "u", "v"], Command(model="m", images=["a"], layers=["u", "v"])),
        (recipe, Command(model="r", images=["x", "y"], quiet=True)),
        ([*recipe, "m"], Command(model="m", images=["x", "y"], quiet=True)),
        ([*recipe, "m", "a", "--quiet=false"], Command(model="m", images=["a"])),
        (["--quiet", "t", "1"], Command(model="t", images=["1"], quiet=True)),  # nor are folders of one letter
        (["--layers", "u", "--", "m", "--a"], Command(model="m", images=["--a"], layers=["u"])),
    ):
        assert parse_recipe([Command], argv) == (wanted,), argv
    for argv in ([], ["m"], write(tmp_path, images=["x"])):
        with pytest.raises(SystemExit, match="2"):
            parse_recipe([Command], argv)
        assert "required: model" in capsys.readouterr().err or argv == ["m"]


def test_a_list_of_a_recipe_ends_before_what_stands_without_a_flag(tmp_path):
    recipe = write(tmp_path, layers=["u", "v"])
    assert parse_recipe([Command], [*recipe, "m", "a"])[0] == Command(model="m", images=["a"], layers=["u", "v"])
    recipe = write(tmp_path, model="-m", images=["x"])  # no flag either
    assert parse_recipe([Command], recipe)[0] == Command(model="-m", images=["x"])


def test_words_that_nothing_takes():
    for kind, argv, message in (
        (Command, ["m", "a", "--quiet", "b"], "Nothing takes 'b'; MODEL IMAGES stand without a flag, together"),
        (Other, ["b"], "Nothing takes 'b'; all settings are flags"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_recipe([kind], argv)
