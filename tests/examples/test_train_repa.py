import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDIMPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from train_repa import ModelConfig, main
from transformers import ViTConfig, ViTModel

from diffusers_repr import Denoiser, Encoder, Projector, SiTTransformer2DModel
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.sweep import measure_alignment
from tests.examples.scripts import EXAMPLES, picture
from tests.testers.models import build
from tests.training.loop_cases import read_lines

TINY = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
SMALL = ["--train_batch_size", "4", "--max_train_steps", "2", "--logging_steps", "1", "--eval_batch_size", "8",
         "--num_inference_steps", "2", "--dataset_name", "digits", "--cache_images", "true"]  # fmt: skip
NEW = ["--resolution", "8", "--image_channels", "1", "--model", json.dumps(TINY), "--projector_dim", "8"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=2,
                       num_attention_heads=2, intermediate_size=32)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    grey = {"image_processor_type": "ViTImageProcessor", "size": 8, "image_mean": [0.5], "image_std": [0.5]}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(grey))
    return str(folder / "vit")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(folder, *flags):
    main([*SMALL, "--output_dir", str(folder), *flags])


def test_a_new_sit(tmp_path, teacher):
    run(tmp_path, *NEW, "--encoder", teacher)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[3], num_inference_steps=2).images[0].size == (8, 8)
    assert Projector.from_pretrained(tmp_path / "heads" / "projector-vit").config["out_dim"] == 16
    assert {"denoising", "alignment"} <= read_lines(tmp_path)[-1].keys()
    assert picture(tmp_path / "samples.png").width > 2 * 6 + 8 * 64 + 7 * 4  # names of classes in front
    more = ["--pretrained_model", str(tmp_path), "--encoder", teacher, "--dry_run", "true", "--projector_dim"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path / "more", *more, "8")
        run(tmp_path / "more", *more, "16", "--projectors", "new")
    with pytest.warns(UserWarning, match=r"start anew \(projector-vit: the saved one has hidden_dim=8, this run 16"):
        run(tmp_path / "more", *more, "16")


def test_the_baseline(tmp_path):
    run(tmp_path, *NEW, "--encoder", "none")
    assert not (tmp_path / "heads").exists()
    assert "alignment" not in read_lines(tmp_path)[-1]


def test_tuning_a_unet_with_classes_by_adapters(tmp_path, teacher):
    model = ["--pretrained_model", "examples/models/digits-class-ddim", "--lora_rank", "2", "--encoder", teacher]
    run(tmp_path, *model, "--repa_layer", "mid_block")
    assert (tmp_path / "samples.png").is_file()
    assert isinstance(DDIMPipeline.from_pretrained(tmp_path), DDIMPipeline)


def test_another_resolution_than_the_models_own(tmp_path):
    flags = ["--pretrained_model", "examples/models/digits-class-ddim", "--encoder", "none", "--dry_run", "true"]
    with pytest.warns(UserWarning, match="16 px train a model of 8 x 8 px"):
        run(tmp_path, *flags, "--resolution", "16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, *flags, "--resolution", "8")


def test_a_dry_run_counts_what_would_be_trained(tmp_path, teacher, capsys):
    model = [
        "--pretrained_model",
        "examples/models/digits-class-ddim",
        "--repa_layer",
        "mid_block",
        "--projector_dim",
        "8",
    ]
    counts = {}
    for rank in ("0", "2"):
        run(tmp_path, *model, "--encoder", teacher, "--lora_rank", rank, "--dry_run", "true")
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("# trained: "))
        counts[rank] = int(line.split()[2].replace(",", ""))
    assert counts["2"] < counts["0"] / 2
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_text_model_asks_for_its_data(tmp_path):
    build("sd").save_pretrained(tmp_path / "sd")
    flags = ["--pretrained_model", str(tmp_path / "sd"), "--encoder", "none", "--dry_run", "true"]
    with pytest.raises(ValueError, match="is trained with captions: give it data and encoders that are on this disk"):
        run(tmp_path / "out", *flags, "--dataset_name", "nobody/captions")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_size", "S/4", "--encoder", "TEACHER"], "Choose match_grid"),
        (["--encoder", "none", "--lora_rank", "2"], "`lora_rank` adapts a trained network"),
        (["--encoder", "none", "--reg_weight", "0.03"], "need a teacher"),
        (["--model", '{"num_layer": 2}'], "Closest allowed: .'num_layers'"),
        (["--model", '{"num_classes": 5, "num_layers": 1}'], "The data have 10 classes"),
        (["--encoder", "TEACHER", "--repa_layer", "blocks.9"], "No layer 'blocks.9'"),
    ],
)
def test_what_does_not_fit(tmp_path, teacher, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *NEW, *[teacher if flag == "TEACHER" else flag for flag in flags])


def test_settings_that_a_pretrained_model_leaves_unused():
    assert ModelConfig(pretrained_model="folder", model={}, path="linear").pretrained_model == "folder"
    with pytest.raises(ValueError, match="`model_size`, `model` would not act: `pretrained_model`"):
        ModelConfig(pretrained_model="folder", model_size="B/2", model=TINY)


def test_a_grey_encoder_without_its_statistics(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="takes 1 channels, and its image statistics have 3 means"):
        run(tmp_path / "out", *NEW, "--encoder", str(tmp_path / "bare"))


@pytest.mark.slow
def test_training_on_the_digits_lowers_the_losses_and_beats_the_untrained_probe(tmp_path, teacher):
    """From random weights, aligned with a random teacher; the probe is of the aligned layer, at a low noise level."""
    model = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4}
    run(tmp_path, *NEW, "--model", json.dumps(model), "--encoder", teacher, "--repa_layer", "blocks.1",
        "--train_batch_size", "64", "--max_train_steps", "80", "--logging_steps", "20", "--learning_rate", "0.002",
        "--lr_warmup_steps", "10", "--ema_max_decay", "0.9", "--eval_batch_size", "0")  # fmt: skip
    lines = read_lines(tmp_path)
    first, last = lines[0], lines[-1]
    assert last["denoising"] < 0.7 * first["denoising"]
    assert last["alignment"] < first["alignment"] - 0.3
    denoiser = Denoiser.from_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = Denoiser(SiTTransformer2DModel.from_config(denoiser.config).eval(), denoiser.scheduler)
    digits, encoder = load_digits_splits(), Encoder.from_pretrained(teacher)
    trained, untrained = (
        measure_alignment(
            one, encoder, digits["train"], [100], ["blocks.1"], metrics=("linear",), test=digits["test"]
        ).score("blocks.1", 100, "linear")
        for one in (denoiser, fresh)
    )
    assert trained > 0.6
    assert trained > untrained + 0.3


# The flags of REPA's own commands (README and defaults of its train.py), by our names.
PUBLISHED = {
    "max_train_steps": 400_000, "learning_rate": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "adam_weight_decay": 0.0, "max_grad_norm": 1.0,
    "ema_max_decay": 0.9999, "ema_warmup": False, "mixed_precision": "fp16", "allow_tf32": True, "seed": 0,
    "train_batch_size": 256, "gradient_accumulation_steps": 1, "resolution": 256, "random_flip": False,
    "path": "linear", "vae": "stabilityai/sd-vae-ft-mse", "encoder": ["facebook/dinov2-base"],
    "encoder_positions": ["repa"], "repa_coefficient": 0.5,
    "label_dropout": 0.1, "time_sampling": "uniform", "projector_dim": 2048, "projector_kind": "mlp",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer", "millions"),
    [("b2", "blocks.3", 130), pytest.param("xl2", "blocks.7", 675, marks=pytest.mark.slow)],
)
def test_the_recipes_of_the_paper_need_neither_data_nor_network(monkeypatch, capsys, name, layer, millions):
    def no_network(*given, **named):
        raise AssertionError("a dry run opens no connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    main(["--config", str(EXAMPLES / "configs" / f"repa_imagenet_sit_{name}.yaml"), "--dry_run"])
    out = capsys.readouterr().out
    told = yaml.safe_load(out)
    assert {key: told[key] for key in PUBLISHED} == PUBLISHED
    assert told["repa_layer"] == layer
    lines = dict(line.removeprefix("# ").split(": ", 1) for line in out.splitlines() if line.startswith("# "))
    assert round(int(lines["network"].split()[0].replace(",", "")) / 1e6) == millions
    width, (hidden, dim) = {"b2": 768, "xl2": 1152}[name], (2048, 768)
    projector = width * hidden + hidden + hidden * hidden + hidden + hidden * dim + dim
    assert lines["terms"].startswith(f"{projector:,} parameters")
    assumed = [line for line in out.splitlines() if line.startswith("# assumed: ")]
    assert len(assumed) == 3
    assert "'facebook/dinov2-base' was not read" in assumed[-1]
    assert "activations of a micro-batch of 256" in out


def test_an_assumed_run_counts_the_memory_that_a_real_one_does(capsys, tmp_path):
    """Of one network in pixels without a teacher, whose data are there or not."""
    flags = [*NEW, "--encoder", "none", "--dry_run"]
    found = {}
    for data in ("digits", "user/not-here"):
        main([*SMALL, *flags, "--dataset_name", data, "--model", json.dumps({**TINY, "num_classes": 10})])
        lines = capsys.readouterr().out.splitlines()
        found[data] = [line for line in lines if line.startswith(("# network", "# trained", "# weights", "# activ"))]
    assert found["digits"] == found["user/not-here"]
    assert len(found["digits"]) == 4
    assert not Path("outputs/run").exists()


def test_what_another_script_makes_is_told_with_its_command(tmp_path):
    recipe = str(EXAMPLES / "configs" / "repa_digits.yaml")
    command = "accelerate launch examples/train_encoder.py --config examples/configs/encoder_digits.yaml"
    with pytest.raises(
        FileNotFoundError, match=f"there is no 'outputs/digits-encoder' here. This makes it: {command}$"
    ):
        main(["--config", recipe, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
