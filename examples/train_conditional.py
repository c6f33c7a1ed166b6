"""Train a diffusion model on conditions that need no labels: clusters, neighbours, representations; or on labels.

    accelerate launch examples/train_conditional.py --config examples/configs/self_guided_digits.yaml
    accelerate launch examples/train_conditional.py --config my_recipe.yaml --assigner none --output_dir outputs/none

What images are conditioned on is written once to `assignments_dir` (default: beside `output_dir`), as
`diffusers-repr assign` does it, and read from there. Ids enter by a class embedding, vectors by the time embedding,
adaptive norms or a token, sets of neighbours by cross-attention. A share of the conditions (`label_dropout`) becomes
the null one, from which guidance leads away. The folder holds the conditions to draw from as `prior.json`, so
`pipe(batch_size=8)` needs nothing else.

| network | ids (labels, kmeans, classifier) | vectors (identity) | sets (neighbours) |
|---|---|---|---|
| UNet2DModel | GuidedUnconditionalPipeline | RCGPipeline | |
| SiTTransformer2DModel, UViTTransformer2DModel | SiTPipeline | SiTPipeline | |
| UNet2DConditionModel | | RCGPipeline | RetrievalDiffusionPipeline |

With `--level mask` or `box` a UNet2DModel is told what is where: the classes of the pixels of `mask_column`, or
clusters of the encoder's patches (`--assigner kmeans`), which are written once as a data set with masks.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr import Denoiser
from diffusers_repr.assign import KMeansAssigner
from diffusers_repr.assign.segment_data import BOX, SEGMENTS, write_segments
from diffusers_repr.assign.segments import PatchFeatures
from diffusers_repr.cli.assign import write_from_recipe
from diffusers_repr.cli.encoders import open_encoder
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.image_data import load_images
from diffusers_repr.denoiser.loading import load_autoencoder
from diffusers_repr.denoiser.prior import HistogramPrior, StoredPrior
from diffusers_repr.denoiser.vae import vae_stride
from diffusers_repr.models import NullTokens, SiTTransformer2DModel, UViTTransformer2DModel, VectorEmbedding
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"
TRANSFORMERS = (SiTTransformer2DModel, UViTTransformer2DModel)
NETWORKS = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, *TRANSFORMERS)}
OWN = ("num_classes", "num_class_embeds", "class_embed_type", "condition_dim")
LEVELS = ("image", "mask", "box")
STORED = 1000  # conditions that are saved to draw from, of vectors and sets


@dataclasses.dataclass(frozen=True)
class ConditionConfig:
    """What images are conditioned on, the network, and its noise process."""

    assigner: Literal["none", "labels", "kmeans", "classifier", "identity", "neighbours"] | None = setting(
        None, "what assigns; default: what assignments_dir holds"
    )
    encoder: str | None = setting(None, "of the images: a vision transformer, or MODEL:layer@timestep")
    text_space: bool = setting(False, "the encoder is a CLIP: vectors that texts have too")
    k: int | None = setting(None, "clusters (default 100; of pixels 8), or neighbours that are stored (default 20)")
    level: Literal["image", "mask", "box"] = setting("image", "what is told: of the image, its pixels, or a box in it")
    box_classes: int = setting(20, "clusters of boxes, at level box; of boxes of yours their classes")
    labels_per_class: int | None = setting(None, "that a classifier sees; default: all")
    network: str = setting("UNet2DModel", f"class of the network: {', '.join(NETWORKS)}")
    model: dict | str | None = setting(None, "arguments of the network, a mapping, but for its condition")
    scheduler: dict | str | None = setting(None, "arguments of a DDIMScheduler; of transformers flow matching if none")
    vae: str | None = setting(None, "folder or Hub id of an AutoencoderKL: train on its latents")
    pretrained_model: str | None = setting(None, "pipeline to tune on these conditions; default: a new network")
    label_dropout: float = setting(0.1, "share of conditions that become the null one")

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"`network` is one of {', '.join(NETWORKS)}, got {self.network!r}.")
        take_arguments(self, model=NETWORKS[self.network], scheduler=DDIMScheduler)
        own = [name for name in OWN if name in self.model]
        if own:
            raise ValueError(f"What is assigned decides on `{'`, `'.join(own)}`; drop it from `model`.")
        if self.pretrained_model and (self.model or self.scheduler or self.vae):
            raise ValueError("`pretrained_model` brings its own model, scheduler and vae; drop them.")
        if not self.pretrained_model and self.model.get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images or latents.")
        if self.level not in LEVELS:
            raise ValueError(f"`level` is one of {', '.join(LEVELS)}, got {self.level!r}.")
        if self.level != "image" and (self.network != "UNet2DModel" or self.vae or self.pretrained_model):
            raise ValueError(f"`level` {self.level} is told to a new UNet2DModel of pixels; set `level` to image.")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")


def assigned(config: TrainingConfig, data_config: DataConfig, condition: ConditionConfig) -> DataConfig:
    """The settings of the data with its conditions, which are made where they are not there yet."""
    if condition.level != "image":
        return segmented(config, data_config, condition)
    if condition.assigner in ("none", "labels"):
        if data_config.assignments_dir:
            raise ValueError(f"`assigner` {condition.assigner} takes nothing that was assigned; drop assignments_dir.")
        data_config = dataclasses.replace(data_config, num_neighbours=None, include_query=False)
        label_column = "none" if condition.assigner == "none" else data_config.label_column
        return dataclasses.replace(data_config, label_column=label_column)
    folder = data_config.assignments_dir or f"{config.output_dir.rstrip('/')}-assigned"
    if condition.assigner is None:
        if data_config.assignments_dir is None:
            raise ValueError("Name what assigns by `assigner`, or what was assigned by `assignments_dir`.")
        return data_config
    if condition.encoder is None:
        raise ValueError(f"`assigner` {condition.assigner} works on an `encoder`; name one.")
    write_from_recipe(data_config, condition, folder, config.seed)
    return dataclasses.replace(data_config, assignments_dir=folder)


def segmented(config: TrainingConfig, data_config: DataConfig, condition: ConditionConfig) -> DataConfig:
    """The settings of the data with masks: those of a column of theirs, or clusters, which are written once."""
    if data_config.mask_column is not None:
        if condition.assigner or condition.encoder or (condition.k is None and condition.level == "mask"):
            raise ValueError("Masks of `mask_column` need no assigner and no encoder, and `k`: how many classes.")
        return dataclasses.replace(data_config, label_column="none")
    if condition.assigner != "kmeans" or condition.encoder is None or condition.text_space:
        raise ValueError(
            f"`level` {condition.level} takes clusters of patches (`assigner: kmeans` and an `encoder`), or masks of "
            "yours by `mask_column`."
        )
    encoder = open_encoder(
        condition.encoder, revision=None, dtype="float32", positions="transformers", text_space=False, seed=config.seed
    )
    data = load_images(
        data_config.dataset_name, data_config.dataset_split, data_config.image_column,
        revision=data_config.dataset_revision,
    )  # fmt: skip
    folder, size = f"{config.output_dir.rstrip('/')}-segments", condition.model["sample_size"]
    write_segments(
        folder,
        {data_config.dataset_split: data},
        PatchFeatures(encoder, (size, size)),
        KMeansAssigner(encoder.dim, condition.k or 8),
        KMeansAssigner(encoder.dim, condition.box_classes) if condition.level == "box" else None,
        seed=config.seed,
    )
    column = {"mask": SEGMENTS, "box": BOX}[condition.level]
    own = {"dataset_name": folder, "dataset_revision": None, "image_column": data.image_column}
    return dataclasses.replace(data_config, **own, mask_column=column, label_column="none")


def build(condition: ConditionConfig, data, vae=None):
    """A pipeline of a new network for the conditions of some data."""
    kind, model = NETWORKS[condition.network], dict(condition.model)
    flows = kind in TRANSFORMERS and not condition.scheduler
    scheduler = FlowMatchODEScheduler() if flows else DDIMScheduler(**{"clip_sample": False, **condition.scheduler})
    if condition.level != "image":
        return _of_layouts(condition, model, scheduler)
    values = None if condition.assigner in ("none", "labels") else data[0].get("condition")
    if condition.assigner == "labels" and not data.num_classes:
        raise ValueError("`assigner` labels: the data have no column of class ids; name one by `label_column`.")
    if values is None:
        return _of_ids(kind, model, data.num_classes, scheduler, vae)
    if values.ndim == 2:
        return _of_sets(kind, model, values, data, scheduler, vae)
    if kind in TRANSFORMERS:
        own = {"condition_dim": len(values), **({"num_classes": 0} if kind is SiTTransformer2DModel else {})}
        return SiTPipeline(kind(**model, **own), scheduler, **_with(vae))
    if kind is UNet2DModel:
        unet = kind(**model, class_embed_type="identity")
        embedding = VectorEmbedding(len(values), 4 * unet.config.block_out_channels[0], zero_init=True)
    else:
        unet = kind(**model)
        embedding = VectorEmbedding(len(values), unet.config.cross_attention_dim)
    return RCGPipeline(unet=unet, scheduler=scheduler, condition_embedding=embedding, **_with(vae))


def _of_ids(kind, model: dict, classes: int, scheduler, vae):
    if kind is UNet2DConditionModel:
        raise ValueError(f"A UNet2DConditionModel takes no ids; train one of {', '.join(set(NETWORKS) - {kind})}.")
    if kind in TRANSFORMERS:
        return SiTPipeline(kind(**model, num_classes=classes), scheduler, **_with(vae))
    if vae is not None:
        raise ValueError("A UNet2DModel of classes works on pixels; train a transformer on latents.")
    own = {"num_class_embeds": classes + 1} if classes else {}
    return GuidedUnconditionalPipeline(kind(**model, **own), scheduler)


def _of_layouts(condition: ConditionConfig, model: dict, scheduler):
    """Behind the channels of the image a channel a class, or one of the box."""
    channels = model.get("in_channels", 3)
    classes = condition.k or 8
    masks = {"in_channels": channels + classes, "class_embed_type": "identity"}
    boxes = {"in_channels": channels + 1, "num_class_embeds": condition.box_classes + 1}
    own = masks if condition.level == "mask" else boxes
    return GuidedUnconditionalPipeline(UNet2DModel(**{**model, "out_channels": channels, **own}), scheduler)


def _of_sets(kind, model: dict, values: torch.Tensor, data, scheduler, vae):
    if kind is not UNet2DConditionModel:
        raise ValueError("Sets of neighbours enter by cross-attention: `network: UNet2DConditionModel`.")
    width = values.shape[1]
    query = images_of(data).config.include_query
    return RetrievalDiffusionPipeline(
        kind(**model, cross_attention_dim=width),
        scheduler,
        null_tokens=NullTokens(width),
        k=len(values) - query,
        include_query=query,
        index_encoder=images_of(data).assigned.store.assigner.get("encoder"),
        **_with(vae),
    )


def _with(vae) -> dict:
    return {} if vae is None else {"vae": vae}


def images_of(data):
    """The images of the data, under a cache too."""
    return getattr(data, "images", data) if hasattr(data, "latents") else data


def stored_prior(data, seed: int):
    """What the conditions of samples are drawn from: ids by their frequency, or conditions of training images."""
    images = images_of(data)
    if images.config.mask_column is not None:
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:STORED].tolist()
        return StoredPrior(torch.stack([images[row]["masks"] for row in sorted(rows)]).to(torch.uint8))
    assigned = getattr(images, "assigned", None)  # a stream has neither that nor its labels beforehand
    if assigned is not None and assigned.has_values:
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:STORED]
        return StoredPrior(assigned.values(rows.sort().values))
    labels = getattr(images, "labels", None)
    return None if labels is None else HistogramPrior.of_labels(labels, images.num_classes)


def prepare(config: TrainingConfig, data_config: DataConfig, condition: ConditionConfig):
    """The objective, a new network or a pretrained one, and its data."""
    torch.manual_seed(config.seed)
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    if condition.pretrained_model:
        denoiser = Denoiser.from_pretrained(condition.pretrained_model)
        if isinstance(denoiser.model, UNet2DModel) and not hasattr(denoiser.pipe, "stored_prior"):  # DDPM, DDIM
            pipe = GuidedUnconditionalPipeline(denoiser.model, denoiser.scheduler)
            denoiser = Denoiser.from_pipe(pipe, name=denoiser.name)
        data = load_train_data(data_config, denoiser.image_channels, denoiser.image_size, vae=denoiser.vae, **loading)
    else:
        vae = None if condition.vae is None else load_autoencoder(condition.vae)
        channels = condition.model.get("in_channels", 3) if vae is None else vae.config.in_channels
        size = condition.model["sample_size"] * (1 if vae is None else vae_stride(vae))
        data = load_train_data(data_config, channels, size, vae=vae, **loading)
        denoiser = Denoiser.from_pipe(build(condition, data, vae))
    if hasattr(denoiser.pipe, "stored_prior"):  # pipelines of diffusers have no place for one
        denoiser.pipe.stored_prior = stored_prior(data, config.seed)
    denoiser.pipe.set_progress_bar_config(disable=True)
    return DiffusionObjective(denoiser, label_dropout=condition.label_dropout), data


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ConditionConfig)
    config, data_config, condition = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    encoder = (condition.encoder or "").partition(":")[0] or None
    check_made(RECIPES, dataset_name=data_config.dataset_name, encoder=encoder, vae=condition.vae)
    data_config = assigned(config, data_config, condition)
    objective, data = prepare(config, data_config, condition)
    train(objective, data, config, recipe=recipe_of(config, data_config, condition))


if __name__ == "__main__":
    run_script(main)
