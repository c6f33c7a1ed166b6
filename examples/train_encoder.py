"""Train a small vision transformer without labels (SimCLR), as a teacher for alignment and an encoder for metrics.

    accelerate launch examples/train_encoder.py --config examples/configs/encoder_digits.yaml

The folder loads by `Encoder.from_pretrained(folder)`, and by `ViTModel.from_pretrained(folder)` of transformers.
Two random views of an image shall be more alike than views of different images, both in the class token and in the
mean of the patch tokens (Chen et al. 2020, arXiv 2002.05709). Labels are used at the end only, to measure k-NN and
linear-probe accuracy next to those of the untrained network and of raw pixels, in `metrics.json`.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from encoder_views import ViewConfig, ViewData
from recipe_data import load_recipe_data
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.preprocessing import preprocess
from diffusers_repr.hub import Metric, atomic_write, model_card
from diffusers_repr.hub.files import write_json
from diffusers_repr.metrics import knn_probe, linear_probe
from diffusers_repr.objectives import Objective
from diffusers_repr.training import (
    DataConfig,
    TrainData,
    TrainingConfig,
    make_accelerator,
    parse_recipe,
    recipe_of,
    train,
)
from diffusers_repr.training.recipe import check_keys, mapping, setting, to_yaml
from diffusers_repr.training.run import end_processes
from diffusers_repr.training.transforms import to_unit


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The network and its loss."""

    model: dict | str | None = setting(None, "arguments of ViTConfig, a mapping (JSON in a flag)")
    projection_dim: int = setting(128, "width of the vectors that the loss compares")
    temperature: float = setting(0.2, "of the softmax over similarities")
    eval_split: str | None = setting(None, "split whose labels measure the result; none: no measurement")

    def __post_init__(self) -> None:
        arguments = mapping("model", self.model)
        check_keys("`model`", arguments, ViTConfig().to_dict())
        missing = [key for key in ("image_size", "patch_size", "num_channels") if key not in arguments]
        if missing:
            raise ValueError(f"`model` needs {', '.join(missing)}, as whole numbers.")
        if arguments["image_size"] % arguments["patch_size"]:
            raise ValueError(f"`model` has image_size={arguments['image_size']}, no multiple of its patch_size.")
        if self.temperature <= 0 or self.projection_dim < 1:
            raise ValueError("`temperature` and `projection_dim` must be positive.")
        object.__setattr__(self, "model", arguments)


class GatherRows(torch.autograd.Function):
    """The rows of all processes, in their order; the gradients of all come back to the rows of each."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (eq. 1): of all other views, those of all processes included, which is of the same image?

    `one` and `two` are (B, D), row b of both being views of the same image.
    """
    own = F.normalize(torch.cat([one, two]).float(), dim=-1)
    everyone, first = own, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = GatherRows.apply(own)
        first = dist.get_rank() * len(own)
    rows = torch.arange(len(own), device=own.device)
    with torch.autocast(own.device.type, enabled=False):
        logits = own @ everyone.T / temperature
    logits = logits.index_put((rows, first + rows), logits.new_tensor(-torch.inf))
    return F.cross_entropy(logits, first + (rows + len(one)) % len(own))


class SimCLRObjective(Objective):
    """The loss of class tokens and that of mean patch tokens, halved; the encoder's moving average is saved."""

    def __init__(self, config: EncoderConfig, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.config, self.mean, self.std = config, mean, std
        self.encoder = ViTModel(ViTConfig(**config.model), add_pooling_layer=False)
        width = self.encoder.config.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.projection_dim)
        )

    def forward(self, batch: dict, phase: str = "main") -> dict[str, Tensor]:
        views = batch["views"].flatten(0, 1)
        pixels = preprocess(views, (views.shape[2], views.shape[3]), self.mean, self.std)
        tokens = self.encoder(pixel_values=pixels).last_hidden_state
        pairs = (self.projector(part).chunk(2) for part in (tokens[:, 0], tokens[:, 1:].mean(1)))
        of_class, of_patches = (nt_xent(one, two, self.config.temperature) for one, two in pairs)
        loss = (of_class + of_patches) / 2
        return {"loss": loss, "class_loss": of_class.detach(), "patch_loss": of_patches.detach()}

    def ema_modules(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}

    def save_pretrained(self, folder: str | Path, state: dict, dtype: torch.dtype) -> None:
        config = ViTConfig.from_dict(self.encoder.config.to_dict())
        with torch.random.fork_rng(devices=[]):
            model = ViTModel(config, add_pooling_layer=False)
        model.load_state_dict({key: state[f"encoder.{key}"] for key in model.state_dict()})
        model.to(dtype).save_pretrained(folder)
        side = {"height": config.image_size, "width": config.image_size}
        write_json(Path(folder) / "preprocessor_config.json",
                   {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": side, "resample": 3,
                    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                    "image_mean": self.mean, "image_std": self.std})  # fmt: skip


@torch.no_grad()
def features_of(encoder: Encoder | None, pixels: Tensor, size: int = 512) -> dict[str, Tensor]:
    """Class tokens and mean patch tokens of uint8 images (the pixels themselves without an encoder), on the device."""
    if encoder is None:
        return {"pixels": to_unit(pixels).flatten(1)}
    outs = [encoder.encode_pixels(to_unit(part)) for part in pixels.split(size)]
    return {
        "class_token": torch.cat([out.global_features for out in outs]),
        "patch_mean": torch.cat([out.tokens.mean(1) for out in outs]),
    }


def measure(encoder: Encoder | None, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]) -> dict:
    """Accuracies on the test set of k-NN and linear probes; each set is uint8 images and labels."""
    bank, test = (features_of(encoder, pixels) for pixels, _ in (train_set, test_set))
    return {
        name: {
            "knn": knn_probe(bank[name], train_set[1], test[name], test_set[1]).accuracy,
            "linear": linear_probe(bank[name], train_set[1], test[name], test_set[1]).accuracy,
        }
        for name in bank
    }


def evaluate(folder: str, untrained: str, data: ViewData, test: TrainData, device: torch.device) -> dict:
    """Metrics of the trained encoder, the untrained one and the pixels."""
    labels = torch.tensor([int(data.data.annotations(row)["class_labels"]) for row in range(len(data))])
    test_set = [test[row] for row in range(len(test))]
    images, ids = (torch.stack([row[name] for row in test_set]) for name in ("pixel_values", "class_labels"))
    sets = ((data.pixels.to(device), labels.to(device)), (images.to(device), ids.to(device)))
    encoders = {"trained": folder, "untrained": untrained, "pixels": None}
    return {
        name: measure(place and Encoder.from_pretrained(place, device=device), *sets)
        for name, place in encoders.items()
    }


def card(config: TrainingConfig, recipe: dict, metrics: dict, loss: float | None, parameters: int) -> str:
    rows = [
        f"| {of}: {name} | {scores['knn']:.4f} | {scores['linear']:.4f} |"
        for of, named in metrics.items()
        for name, scores in named.items()
    ]
    data, split = recipe["dataset_name"], recipe["eval_split"]
    table = "\n".join(["| features | k-NN | linear probe |", "|---|---|---|", *rows])
    found = [
        Metric("accuracy", scores["knn"], dataset=str(data), split=split, task="image-feature-extraction", name=name)
        for name, scores in ((f"k-NN accuracy, {key}", value) for key, value in metrics.get("trained", {}).items())
    ]
    text = f"""A `ViTModel` of {parameters:,} parameters, trained without labels (SimCLR, arXiv 2002.05709) by
`examples/train_encoder.py` of diffusers-repr on the split `{recipe["dataset_split"]}` of `{data}` and no other image.

```python
from diffusers_repr.encoders import Encoder
features = Encoder.from_pretrained("{Path(config.output_dir).name}")(images)  # .global_features, .tokens
```

{f"Accuracy on the split `{split}`; labels serve this measurement alone." if rows else "Not measured."}

{table if rows else ""}

- Steps: {config.max_train_steps:,} with seed {config.seed}; final loss {loss if loss is None else round(loss, 4)}.

## Recipe

```yaml
{to_yaml(recipe)}```
"""
    return model_card(title=Path(config.output_dir).name, text=text, tags=["vision", "simclr"], metrics=found[:1],
                      library_name="transformers", pipeline_tag="image-feature-extraction")  # fmt: skip


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ViewConfig, EncoderConfig)
    config, data_config, views, encoder_config = parse_recipe(kinds, argv, __doc__.split("\n")[0])
    config = dataclasses.replace(config, eval_batch_size=0)  # an encoder has no samples
    accelerator = make_accelerator(config)  # first: it decides how many processes share the data
    channels, side = encoder_config.model["num_channels"], encoder_config.model["image_size"]
    test = None
    if encoder_config.eval_split:
        test_config = dataclasses.replace(data_config, dataset_split=encoder_config.eval_split)
        test = load_recipe_data(test_config, channels, side)
    else:
        data_config = dataclasses.replace(data_config, label_column="none")
    data = ViewData(load_recipe_data(data_config, channels, side, config.seed), views)
    if test is not None and not (test.num_classes and data.data.num_classes):
        raise ValueError("`eval_split` measures by labels, and the data have none; name --label_column or drop it.")
    torch.manual_seed(config.seed)
    objective = SimCLRObjective(encoder_config, *data.statistics())
    recipe = recipe_of(config, data_config, views, encoder_config)
    if config.dry_run:
        train(objective, data, config, recipe=recipe, accelerator=accelerator)
        return
    with tempfile.TemporaryDirectory() as untrained:
        if accelerator.is_main_process:
            objective.save_pretrained(
                untrained, {k: v.clone() for k, v in objective.state_dict().items()}, torch.float32
            )
        result = train(objective, data, config, recipe=recipe, accelerator=accelerator)
        if accelerator.is_main_process:
            folder, device = Path(config.output_dir), accelerator.device
            metrics = {} if test is None else evaluate(str(folder), untrained, data, test, device)
            loss = result.log[-1]["loss"] if result.log else None
            write_json(folder / "metrics.json", {"loss": loss, "split": encoder_config.eval_split, **metrics})
            size = objective.encoder.num_parameters()
            atomic_write(folder / "README.md", card(config, recipe, metrics, loss, size))
            for of, named in metrics.items():
                print(of, {name: {k: round(v, 4) for k, v in scores.items()} for name, scores in named.items()})
    end_processes(accelerator)


if __name__ == "__main__":
    main(sys.argv[1:])
