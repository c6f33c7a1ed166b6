"""`FinetuneObjective`: the whole network learns to classify, from its own features under noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import json_mapping, setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.features.pooling import check_pooling, pool, pooled_size
from diffusers_repr.features.presets import find_preset
from diffusers_repr.heads import PooledHead, head_class
from diffusers_repr.hub.places import public_name
from diffusers_repr.noise import LevelLike, NoiseLevel, add_noise
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, RecordArtifact, State
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.labels import check_class_labels
from diffusers_repr.objectives.reached import reached_parameters

RECORD = "finetune.json"  # beside the pipeline that was tuned
HEAD = "heads/classifier"


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The base, where it is read, and the head; the fields are keys of a recipe.

    Raises:
        ValueError: If a value is out of range or two settings exclude one another.
    """

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id of the base that is tuned")
    revision: str | None = setting(None, "branch, tag or commit of the base on the Hub")
    layers: list[str] | None = setting(None, "full module paths, pooled side by side; default: DDAE's, if known")
    timestep: float | None = setting(None, "level at which they are read; default: DDAE's, if known")
    clean: bool = setting(False, "read images without noise, at that timestep")
    pooling: str = setting("mean", "mean, max or adaptive:P")
    head: str = setting("linear", "linear, mlp, or a head of your own on vectors")
    head_options: dict | str | None = setting(None, "arguments of the head's class, a mapping (JSON in a flag)")
    network_lr_scale: float = setting(0.1, "learning rate of the network, times that of the head")
    label_smoothing: float = setting(0.0, "share of the target that is spread over all classes")
    prompt: str | None = setting(None, "prompt of every image, for text models; default: the empty one")
    class_label: int | None = setting(None, "condition of every image, for class-conditional models; default: null")
    eval_split: str | None = setting(None, "split whose accuracy is measured; default, or none: no measurement")

    def __post_init__(self) -> None:
        if (self.layers is None) != (self.timestep is None):
            raise ValueError("Give both `layers` and `timestep`, or neither for DDAE's published choice.")
        pooled_size(check_pooling(self.pooling))
        if not self.network_lr_scale > 0:
            raise ValueError(f"`network_lr_scale` must be positive, got {self.network_lr_scale}; `Probe.fit` fits a "
                             "head on a frozen network.")  # fmt: skip
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` is a share below 1, got {self.label_smoothing}.")
        object.__setattr__(self, "head_options", json_mapping("head_options", self.head_options))
        take_back(self, "eval_split")

    def place(self, denoiser: Denoiser) -> tuple[list[str], LevelLike]:
        """Layers and level; DDAE's choice for this architecture if none was given.

        Raises:
            ValueError: If there is none for it.
        """
        if self.layers is not None and self.timestep is not None:
            return list(self.layers), self.timestep
        preset = find_preset("ddae", denoiser)
        assert not isinstance(preset.timestep, tuple)
        return list(preset.layers), preset.timestep


class FinetuneObjective(DiffusionObjective):
    """Cross-entropy of a head on pooled features of the noised image, with gradients through the network.

    The network is run to the last layer that is read; what lies behind keeps the base's weights. Its condition is the
    null one, never the label that is to be told. Fresh noise for every image of every step.

    Logs `accuracy`.

    Args:
        denoiser: From `Denoiser.from_pipe(pipe)`: the tuned network is saved as this pipeline.
        config: Layers, level, head.
        class_names: Of the data; two at least.
        trained_on: `dataset`, `split` and `rows`, for the record.

    Raises:
        ValueError: For layers, levels, heads or options that do not exist, and fewer than two classes.
    """

    own_losses = ("loss",)

    def __init__(
        self,
        denoiser: Denoiser,
        config: FinetuneConfig,
        class_names: Sequence[str],
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(denoiser, label_dropout=0.0)
        if len(class_names) < 2:
            raise ValueError(f"A classifier needs two classes; the data have {len(class_names)}: {list(class_names)}.")
        self.config, self.class_names = config, list(class_names)
        self.trained_on = {"dataset": "unknown", "split": "train", "rows": 0, **(trained_on or {})}
        self.layers, asked = config.place(denoiser)
        level = denoiser.level(asked)
        if config.clean:
            alpha = 1 / denoiser.schedule.sigma_data if denoiser.schedule.kind == "edm" else 1.0
            level = NoiseLevel(level.timestep, nsr=0.0, half_log_snr=float("inf"), alpha=alpha, sigma=0.0)
        self.level, self._null = level, {}  # type: ignore[var-annotated]
        width = sum(self.layer(path).channels for path in self.layers) * pooled_size(config.pooling)
        cls = head_class(config.head, PooledHead)
        assert issubclass(cls, PooledHead)
        if not cls.takes_steps:
            raise ValueError(f"The head {config.head!r} is not fitted by gradient steps, so nothing would be tuned.")
        assert isinstance(config.head_options, Mapping)
        self.head = cls(width, len(class_names), **config.head_options)
        self.head.reset_parameters()
        reached = reached_parameters(denoiser, self.layers)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in reached)
        text = f"Its `{type(self.network).__name__}` was tuned whole to classify (as DDAE, arXiv 2303.09769, fine-"
        text += 'tunes): `finetuned_probe("{folder}")` of `diffusers_repr.tasks` is the classifier. It no longer '
        text += "denoises.\n\nClasses: " + ", ".join(self.class_names[:50]) + "."
        tags = ["diffusers", "image-classification"]
        self.card: dict[str, Any] = {**self.card, "kind": "classifier", "text": text, "tags": tags,
                     "pipeline_tag": "image-classification"}  # fmt: skip
        if config.eval_split:
            accuracy = {"type": "accuracy", "name": "accuracy", "dataset": public_name(self.trained_on["dataset"]),
                        "split": config.eval_split}  # fmt: skip
            self.card["metrics"] = {"eval_accuracy": accuracy}

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch of images, or of the moments of their latents, with labels; `noise` in it is taken."""
        labels = batch["class_labels"]
        logits = self.logits(self.clean(batch), batch.get("noise"), batch.get("generator"))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def logits(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        parts: Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """`(B, K)` of clean pixels or latents.

        Args:
            x0: `(B, C, h, w)`.
            noise: As `x0`; drawn if None.
            generator: Of the drawing.
            parts: `network` and `head` of `result`, to be taken instead of those that are trained.
        """
        network, head = (self.network, self.head) if parts is None else (parts["network"], parts["head"])
        if noise is None:
            noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        x_t, size, denoiser = add_noise(x0, self.level, noise), (x0.shape[2], x0.shape[3]), self.denoiser
        pixels = (size[0] * denoiser.stride, size[1] * denoiser.stride)
        condition = denoiser.condition(
            self.config.prompt, class_labels=self.config.class_label, batch=len(x0), size=pixels, cache=self._null
        )
        on_device = {k: v.to(x0.device) if isinstance(v, Tensor) else v for k, v in condition.kwargs().items()}
        inputs = denoiser.network_inputs(x_t.to(floating_dtype(network)), self.level, on_device)
        # A forward that is broken off inside of a checkpointed block cannot be computed again.
        whole = getattr(network, "is_gradient_checkpointing", False) and torch.is_grad_enabled()
        with capture(network, self.layers, stop_early=not whole) as tape:
            network(**inputs)
        pooled = []
        for path in self.layers:
            value = tape[path]
            place = denoiser.token_grid(path, value.shape[1], size) if value.ndim == 3 else None
            pooled.append(pool(value, self.config.pooling, place))
        return head(torch.cat(pooled, dim=1))

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """There must be labels, of the classes there are.

        Raises:
            ValueError: If not.
        """
        check_class_labels(batch, self.class_names)

    def check_data(self, data: Any) -> None:
        """The classes of the data are those of the head, whatever the model was conditioned on.

        Raises:
            ValueError: If not.
        """
        names = getattr(data, "class_names", None)
        if names is not None and list(names) != self.class_names:
            raise ValueError(f"The data have the classes {list(names)}, the head has {self.class_names}.")

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """The head, and the network at a rate of its own."""
        network = [p for p in self.network.parameters() if p.requires_grad]
        return [
            {"params": list(self.head.parameters())},
            {"params": network, "lr_scale": self.config.network_lr_scale},
        ]

    def identity(self) -> dict[str, Any]:
        """With where the network is read, and the classes."""
        return {**super().identity(), **{k: v for k, v in self.record().items() if k != "train"}}

    def record(self) -> dict[str, Any]:
        """What `finetune.json` holds: all between an image and the head."""
        config, level = self.config, self.level
        assert level.timestep is not None
        return {
            "layers": self.layers,
            "timestep": float(level.timestep),
            "noise": "clean" if config.clean else "per_image",
            "pooling": config.pooling,
            "prompt": config.prompt,
            "class_label": config.class_label,
            "label_names": self.class_names,
            "head": config.head,
            "image_size": list(self.denoiser.image_size),
            "train": self.trained_on,
        }

    def result(self, state: State) -> nn.ModuleDict:
        """`network` and `head`, as `logits` takes them.

        Args:
            state: See `Objective.result`.
        """
        network = next(iter(self.trained_components().values()))
        head = ModelArtifact(self.head, "head")
        return nn.ModuleDict({"network": network.build(state), "head": head.build(state)})

    def artifacts(self) -> list[Artifact]:
        """The pipeline with the tuned network, the head, and what tells how it is read."""
        head = ModelArtifact(self.head, "head", folder=HEAD)
        return [*super().artifacts(), head, RecordArtifact(lambda state: self.record(), RECORD)]

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """None: the result does not sample.

        Raises:
            ValueError: Always; set `eval_batch_size` to 0.
        """
        raise ValueError("A network that was tuned to classify no longer denoises; set eval_batch_size to 0.")


__all__ = ["HEAD", "RECORD", "FinetuneConfig", "FinetuneObjective"]
