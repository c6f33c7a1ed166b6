"""What a run leaves beside its checkpoints: pipeline, heads, samples, recipe, card, tracker's files, a repository."""

import json

import pytest
import torch
import yaml
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.config import parse_recipe
from diffusers_repr.hub import HubError
from diffusers_repr.hub.places import without_places
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.objectives import DiffusionObjective, FixedArtifact
from diffusers_repr.training import TrainingConfig, evaluation, train
from diffusers_repr.training.result import record_artifacts
from tests.testers.hub_server import hub_env, hub_server, run_python
from tests.training.loop_cases import Numbers, read_lines, run_here, settings, tiny_objective

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "seed": 7,
        "learning_rate": 0.01,
        "output_dir": str(folder),
        "dataset_name": str(folder / "my-images"),
        "encoder": ["org/name", str(folder / "teacher")],
        "model": {"vae": "/a/b/vae", "sizes": [8]},
    }
    run_here(folder, save_dtype="float16", eval_batch_size=16, validation_steps=2, recipe=recipe,
             report_to="tensorboard", evaluate=lambda pipe, step: {"score": step / 2})  # fmt: skip
    return folder


def test_the_folder_is_a_pipeline_of_the_averaged_weights(finished):
    pipe = DDPMPipeline.from_pretrained(finished)
    assert len(pipe(batch_size=2, num_inference_steps=2).images) == 2
    averaged = load_file(finished / "checkpoint-00000006" / "ema.safetensors")
    weights = load_file(finished / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(weights) == len(averaged)
    for name, tensor in weights.items():
        assert torch.equal(tensor, averaged[f"network.{name}"].half()), name


def test_grids_of_samples(finished):
    with Image.open(finished / "samples.png") as image:
        assert image.width == 2 * 6 + 8 * 64 + 7 * 4
        assert image.height > 2 * 6 + 2 * 64 + 4  # with a title
    assert sorted(p.name for p in (finished / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert len({p.read_bytes() for p in [*(finished / "samples").iterdir(), finished / "samples.png"]}) == 3


def test_what_a_method_saves_in_folders_of_its_own_is_uploaded(tmp_path):
    class WithAssigner(DiffusionObjective):
        def artifacts(self):
            return [*super().artifacts(), FixedArtifact(IdentityAssigner(4), folder="assigner")]

    run_here(tmp_path, tiny_objective(kind=WithAssigner), max_train_steps=2)
    (tmp_path / "assigner" / "notes.txt").write_text("of the user, later")
    upload = plan_upload(tmp_path)
    sent = [file.path for file in upload.files]
    assert {"assigner/config.json", "artifacts.json", "unet/config.json"} <= set(sent)
    assert upload.left_out == ("assigner/notes.txt",)
    assert IdentityAssigner.from_pretrained(tmp_path / "assigner").config.in_features == 4
    for name, told in (
        ("../other/config.json", "never uploaded"),
        ("checkpoint-00000002/ema.safetensors", "stays here"),
    ):
        (tmp_path / "artifacts.json").write_text(json.dumps([name]))
        with pytest.raises(ValueError, match=rf"artifacts.json' is damaged .*{told}"):
            plan_upload(tmp_path)
    record_artifacts(tiny_objective(), tmp_path)  # of a method without such folders
    assert not (tmp_path / "artifacts.json").exists()


def test_rows_of_classes_have_their_names(monkeypatch, tmp_path):
    drawn = []

    def draw(images, **words):
        drawn.append(words)
        return Image.new("L", (8, 8))

    monkeypatch.setattr(evaluation, "image_grid", draw)
    data = Numbers(classes=3)
    monkeypatch.setattr(Numbers, "class_names", ["cat", "dog", "owl"])
    train(tiny_objective(classes=3), data, settings(tmp_path / "owls", eval_batch_size=24, max_train_steps=1))
    assert drawn == [{"title": "owls, step 1", "row_titles": ["cat", "dog", "owl"]}]
    card = (tmp_path / "owls" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "class-conditional-image-generation" in front["tags"]
    assert "A class-conditional diffusion model of" in card
    assert "- Data: 13 images of `numbers`, split `train`" in card


def test_looking_changes_nothing(finished, tmp_path):
    run_here(tmp_path)
    first, second = (load_file(run / "checkpoint-00000006" / "model.safetensors") for run in (finished, tmp_path))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert read_lines(finished) == read_lines(tmp_path)


def test_numbers_that_were_measured(finished):
    lines = [json.loads(line) for line in (finished / "evaluation.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "score": 1.0}, {"step": 4, "score": 2.0}, {"step": 6, "score": 3.0}]


def test_the_card(finished):
    card = (finished / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "diffusers"
    assert "datasets" not in front  # a folder is no data set of the Hub
    lines = read_lines(finished)
    for expected in ("`DiffusionObjective`", "saved in float16", "13 images of `my-images`", "Steps: 6 with seed 7",
                     "0 skipped", f"| loss | {lines[-1]['loss']:.4f} |", "| score | 3 |", "vae: vae", "- teacher",
                     "learning_rate: 0.01"):  # fmt: skip
        assert expected in card, expected
    assert str(finished.parent) not in card
    assert "/a/b" not in card


def test_the_recipe_is_kept_whole(finished):
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["dataset_name"] == str(finished / "my-images")
    assert "output_dir" not in recipe
    kept = {"seed": recipe["seed"], "learning_rate": recipe["learning_rate"]}
    (finished / "part.yaml").write_text(yaml.safe_dump(kept))
    assert parse_recipe([TrainingConfig], ["--config", str(finished / "part.yaml")])[0].seed == 7


def test_tensorboard(finished):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = list((finished / "logs").rglob("events.*"))
    scalars = {}
    for file in events:
        told = reader.EventAccumulator(str(file)).Reload()
        scalars |= {tag: [(e.step, e.value) for e in told.Scalars(tag)] for tag in told.Tags()["scalars"]}
    assert [step for step, _ in scalars["loss"]] == [3, 6]
    assert scalars["loss"][0][1] == pytest.approx(read_lines(finished)[0]["loss"])
    assert scalars["score"] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert "images_per_second" in scalars


def test_places_on_this_machine():
    given = {"a": "/x/y/data", "b": ["/x/z.pt", "org/name", 3], "c": {"d": "./here", "e": None, "f": "/x/"}}
    assert without_places(given) == {
        "a": "data",
        "b": ["z.pt", "org/name", 3],
        "c": {"d": "./here", "e": None, "f": "x"},
    }


def test_what_is_no_objective_and_what_is_no_training_data(tmp_path):
    with pytest.raises(TypeError, match=r"takes an Objective, such as DiffusionObjective\(denoiser\); got a Denoiser"):
        train(tiny_objective().denoiser, Numbers(), settings(tmp_path / "out"))
    with pytest.raises(TypeError, match=r"takes data of load_train_data\(.*; got a list"):
        train(tiny_objective(), [1, 2], settings(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    config = settings(tmp_path / "out", dry_run=True)
    result = train(tiny_objective(), Numbers(), config, recipe={"seed": 7, "dataset_name": "numbers"})
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"seed": 7, "dataset_name": "numbers"}
    count = sum(p.numel() for p in tiny_objective().parameters())
    assert f"# network: {count:,} parameters (UNet2DModel)" in printed
    assert f"# trained: {count:,} parameters; frozen: 0" in printed
    assert f"optimizer and average: {20 * count / 1024:.1f} KiB" in printed
    assert "# activations of a micro-batch of 4: about" in printed
    assert result.step == 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_knows_adapters(tmp_path, capsys):
    train(tiny_objective(), Numbers(), settings(tmp_path, dry_run=True, lora_rank=1))
    printed = capsys.readouterr().out
    assert f"frozen: {sum(p.numel() for p in tiny_objective().parameters()):,}" in printed
    assert yaml.safe_load(printed)["lora_rank"] == 1


def test_pushing_needs_a_token_before_it_needs_a_gpu_for_a_week(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_repr.training.checks.get_token", lambda: None)
    with pytest.raises(HubError, match="needs a token: log in"):
        run_here(tmp_path / "out", push_to_hub=True, hub_model_id="me/model")
    assert not (tmp_path / "out").exists()


PUSH = """
from pathlib import Path
from tests.training.loop_cases import run_here
folder = Path({folder!r})
run_here(folder, push_to_hub=True, hub_model_id="user/tiny", max_train_steps=2, eval_batch_size=8,
         recipe={{"dataset_name": str(folder / "images"), "seed": 7}}, validation_steps=1, report_to="tensorboard")
from diffusers_repr.cli.publish import find_publications
from diffusers_repr.hub.publish import publish
outcome, = publish([one for one in find_publications(["models"], [str(folder)]) if one.source == folder], "user")
assert outcome.state == "pushed", outcome
"""


def test_what_is_handed_to_the_hub(finished, tmp_path):
    """The fast half of the next test: names and contents, without a server."""
    folder = plan_upload(finished).stage(tmp_path / "stage")
    sent = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {"README.md", "loss.jsonl", "model_index.json", "recipe.yaml", "samples.png"} <= set(sent)
    assert not [name for name in sent if name.startswith(("checkpoint", "logs/", "samples/"))]
    assert not [name for name, data in sent.items() if str(finished).encode() in data]


@pytest.mark.slow
def test_the_result_is_pushed_without_checkpoints(tmp_path):
    with hub_server() as server:
        done = run_python(PUSH.format(folder=str(tmp_path / "run")), hub_env(server, tmp_path))
        assert done.returncode == 0, done.stderr
        repo = server.store.repos["model", "user/tiny"]
        files = repo.commits[repo.resolve("main")]
        repo = server.store.repos["model", "user/run"]
        published = repo.commits[repo.resolve("main")]
    assert {name: file.data for name, file in files.items()} == {name: file.data for name, file in published.items()}
    assert {"README.md", "loss.jsonl", "model_index.json", "recipe.yaml", "samples.png"} <= set(files)
    assert not [name for name in files if name.startswith(("checkpoint", "logs/", "samples/"))]
    for name, content in files.items():
        if name.endswith((".json", ".yaml", ".md")):
            assert str(tmp_path).encode() not in content.data, name
