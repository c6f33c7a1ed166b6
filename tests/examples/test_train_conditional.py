"""train_conditional.py at image level: every assignment reaches its network, and a pipeline draws from what it saw."""

import json

import pytest
import torch
import yaml
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from train_conditional import ConditionConfig, main

from diffusers_repr.assign import KMeansAssigner
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.splits import open_split
from diffusers_repr.denoiser.prior import HistogramPrior, StoredPrior
from diffusers_repr.objectives import DiffusionObjective
from tests.examples.scripts import EXAMPLES, run_script

ROWS = 24
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
}  # fmt: skip
CROSS = UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
}  # fmt: skip
SIT = {"sample_size": 8, "in_channels": 1, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
SMALL = {
    "encoder": f"{EXAMPLES / 'models' / 'digits-ddpm'}:mid_block@100", "max_train_steps": 1, "lr_warmup_steps": 0,
    "train_batch_size": 8, "eval_batch_size": 0, "num_inference_steps": 1, "checkpointing_steps": 1,
}  # fmt: skip
TRANSFORMER = {"network": "SiTTransformer2DModel", "model": SIT, "scheduler": None}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "data"
    folder.mkdir()
    digits = open_split("digits", "train")
    every = [digits["label"].index(digit) for digit in range(10)]  # of each class one, and the first that there are
    kept = [*every, *(row for row in range(2 * ROWS) if row not in every)][:ROWS]
    digits.select(kept).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder.parent


def run(photos, folder, recipe, **changes):
    held = yaml.safe_load((EXAMPLES / "configs" / f"{recipe}_digits.yaml").read_text())
    model = CROSS if held["network"] == "UNet2DConditionModel" else UNET
    settings = (
        held | SMALL | {"model": model, "dataset_name": str(photos), "output_dir": str(folder / "out")} | changes
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    run_script(main, "train_conditional", "--config", str(path))
    return folder / "out"


def sample(pipe, **settings):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe(generator=seed, num_inference_steps=1, output_type="pt", **settings).images


def watched(monkeypatch):
    """What the network gets, and of which rows."""
    seen, noised = [], DiffusionObjective.noised

    def look(objective, batch, *given, **named):
        noisy = noised(objective, batch, *given, **named)
        seen.append((batch["index"], noisy.condition))
        return noisy

    monkeypatch.setattr(DiffusionObjective, "noised", look)
    return seen


@pytest.mark.parametrize(
    ("recipe", "changes", "pipeline", "column"),
    [
        ("self_guided", {"k": 5}, GuidedUnconditionalPipeline, "class_labels"),
        ("self_guided", {"k": 5, **TRANSFORMER}, SiTPipeline, "class_labels"),
        (
            "self_guided",
            {"assigner": "classifier", "labels_per_class": 1},
            GuidedUnconditionalPipeline,
            "class_labels",
        ),
        ("rdm", {"k": 6}, RetrievalDiffusionPipeline, "encoder_hidden_states"),
        ("knn", {"k": 6}, RetrievalDiffusionPipeline, "encoder_hidden_states"),
        ("representation", TRANSFORMER, SiTPipeline, "condition"),
    ],
)
def test_what_is_assigned_reaches_the_network(photos, tmp_path, monkeypatch, recipe, changes, pipeline, column):
    seen = watched(monkeypatch)
    output = run(photos, tmp_path, recipe, label_dropout=0.0, **changes)
    config = {"num_neighbours": 4} if recipe in ("rdm", "knn") else {}
    config = DataConfig(str(photos), assignments_dir=f"{output}-assigned", include_query=recipe == "knn", **config)
    data = load_train_data(config, 1, 8)
    name = "class_labels" if column == "class_labels" else "condition"
    for rows, condition in seen:
        assert torch.equal(condition[column], torch.stack([data[int(row)][name] for row in rows]))
    pipe = pipeline.from_pretrained(output)
    prior = pipe.stored_prior
    assert isinstance(prior, HistogramPrior if name == "class_labels" else StoredPrior)
    drawn = sample(pipe, batch_size=3, guidance_scale=2.0)
    given = sample(pipe, batch_size=3, guidance_scale=2.0, prior=prior)
    assert drawn.shape == (3, 1, 8, 8)
    assert torch.equal(drawn, given)
    if recipe in ("rdm", "knn"):
        assert (pipe.config.k, pipe.config.include_query) == (4, recipe == "knn")
        assert pipe.config.index_encoder["layer"] == "mid_block"
        assert prior.values.shape == (ROWS, 4 + (recipe == "knn"), 64)
    if recipe == "self_guided" and "assigner" not in changes:
        ids = KMeansAssigner.from_pretrained(f"{output}-assigned/assigner")
        assert int(ids.null) == len(prior.frequencies) == 5


def test_vectors_of_a_u_net_and_a_null_that_is_learned(photos, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    output = run(photos, tmp_path, "representation", label_dropout=1.0, eval_batch_size=8)
    assert all(len(condition["class_labels"].unique(dim=0)) == 1 for _, condition in seen)  # the null alone
    pipe = RCGPipeline.from_pretrained(output)
    assert pipe.condition_embedding.config.in_channels == 64
    assert sample(pipe, batch_size=2, guidance_scale=2.0).shape == (2, 1, 8, 8)
    assert json.loads((output / "prior.json").read_text())["kind"] == "stored"


def test_without_condition_and_with_labels(photos, tmp_path):
    unet = GuidedUnconditionalPipeline.from_pretrained(run(photos, tmp_path, "self_guided", assigner="none"))
    assert unet.stored_prior is None
    assert unet.unet.config.num_class_embeds is None
    again = tmp_path / "labels"
    again.mkdir()
    output = run(photos, again, "self_guided", assigner="labels")
    labels = open_split(str(photos), "train")["label"]
    prior = GuidedUnconditionalPipeline.from_pretrained(output).stored_prior
    assert prior.frequencies.tolist() == [list(labels).count(digit) for digit in range(10)]
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    base = {"pretrained_model": str(output), "model": None, "scheduler": None, "network": None}
    assert (run(photos, tuned, "self_guided", assigner="labels", **base) / "prior.json").is_file()


def test_wrong_use(photos, tmp_path):
    for changes, told in (
        ({"k": 25}, "25 clusters of 24 images"),
        ({"assigner": None}, "Name what assigns by `assigner`"),
        ({"encoder": None}, "`assigner` kmeans works on an `encoder`"),
        ({"assigner": "neighbours", "k": 3, "num_neighbours": 2}, "cross-attention: `network: UNet2DConditionModel`"),
        ({"assigner": "labels", "assignments_dir": "x"}, "takes nothing that was assigned"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            run(photos, tmp_path, "self_guided", **changes)
    assert not (tmp_path / "out").exists()
    for settings, told in (
        ({"network": "Net"}, "`network` is one of UNet2DModel"),
        ({"model": UNET | {"num_class_embeds": 3}}, "decides on `num_class_embeds`"),
        ({"model": {}}, "needs `sample_size`"),
        ({"model": UNET, "pretrained_model": "x"}, "brings its own"),
        ({"model": UNET, "label_dropout": 2.0}, "probability"),
    ):
        with pytest.raises(ValueError, match=told):
            ConditionConfig(**settings)
