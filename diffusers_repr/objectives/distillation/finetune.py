"""`FinetuneStudentObjective`: stage 2, the student with a classifier on labels; teacher and projectors are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.config.recipe import setting
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.distillation.student import Student
from diffusers_repr.objectives.labels import check_class_labels


@dataclasses.dataclass(frozen=True)
class FinetuneStudentConfig(MeasuredSplit):
    """How the student is tuned; the fields are keys of a recipe.

    Raises:
        ValueError: If a number is out of range.
    """

    backbone_lr_scale: float = setting(1.0, "learning rate of the backbone, times the classifier's; 0: frozen")
    label_smoothing: float = setting(0.0, "share of the target that is spread over all classes")

    def __post_init__(self) -> None:
        if self.backbone_lr_scale < 0:
            raise ValueError(f"`backbone_lr_scale` is 0 or more; got {self.backbone_lr_scale}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` is a share below 1, got {self.label_smoothing}.")
        super().__post_init__()


class FinetuneStudentObjective(Objective):
    """Cross-entropy of a transformers classifier (`AutoModelForImageClassification`) on a student's backbone.

    Stage 2 of RepFusion, and the task that DreamTeacher's backbones are for. The result is the classifier's folder;
    `Encoder.from_pretrained` reads its backbone.

    Logs `accuracy`.

    Args:
        student: The backbone, a ResNet, ConvNeXt or Swin of transformers; its weights are copied.
        class_names: Of the data; two at least.
        config: Settings.

    Raises:
        ValueError: For fewer than two classes.
        TypeError: For a backbone that transformers has no classifier for.
    """

    def __init__(
        self, student: Student, class_names: Sequence[str], config: FinetuneStudentConfig | None = None
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"A classifier needs two classes; the data have {len(class_names)}: {list(class_names)}.")
        own: Any = getattr(student.module, "config", None)
        if not hasattr(own, "model_type"):
            raise TypeError(
                f"{type(student.module).__name__} is no backbone of transformers, which has a classifier for it; "
                "put a head of your own on it, in an objective of your own."
            )
        self.config, self.backbone, self.class_names = config or FinetuneStudentConfig(), student, list(class_names)
        settings = type(own).from_dict(own.to_dict())
        settings.num_labels = len(class_names)
        settings.id2label = dict(enumerate(self.class_names))
        settings.label2id = {name: at for at, name in enumerate(self.class_names)}
        self.classifier = AutoModelForImageClassification.from_config(settings)
        self._inner().load_state_dict(student.module.state_dict())
        frozen = not self.config.backbone_lr_scale
        self._inner().requires_grad_(not frozen)
        self.card = {
            "kind": f"`{type(self.classifier).__name__}`", "library_name": "transformers",
            "pipeline_tag": "image-classification", "tags": ["vision", "image-classification"],
            "text": "Classes: " + ", ".join(self.class_names[:50]) + ".",
        }  # fmt: skip

    def _inner(self) -> nn.Module:
        """The classifier's backbone."""
        return cast(nn.Module, getattr(self.classifier, self.classifier.base_model_prefix))

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of images with `class_labels`."""
        labels = batch["class_labels"]
        logits = self.logits(self.classifier, batch["pixel_values"].float())
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def logits(self, classifier: nn.Module, pixels: Tensor) -> Tensor:
        """`(B, classes)` of images `(B, C, H, W)` in [-1, 1].

        Args:
            classifier: The trained one, or what `result` gave.
            pixels: The images.
        """
        inputs = self.backbone.inputs(self._inner(), self.backbone.prepared(pixels))
        return classifier(**inputs).logits.float()

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """The classifier's last layer, and the backbone at a rate of its own."""
        inner = {id(p) for p in self._inner().parameters()}
        every = [p for p in self.classifier.parameters() if p.requires_grad]
        return [
            {"params": [p for p in every if id(p) not in inner]},
            {"params": [p for p in every if id(p) in inner], "lr_scale": self.config.backbone_lr_scale},
        ]

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """There must be labels, of the classes there are.

        Raises:
            ValueError: If not.
        """
        check_class_labels(batch, self.class_names)

    def check_data(self, data: Any) -> None:
        """The classes of the data are those of the classifier.

        Raises:
            ValueError: If not.
        """
        names = getattr(data, "class_names", None)
        if names is not None and list(names) != self.class_names:
            raise ValueError(f"The data have the classes {list(names)}, the classifier has {self.class_names}.")

    def identity(self) -> dict[str, Any]:
        """With the classes."""
        return {"classes": self.class_names, "backbone": type(self.backbone.module).__name__}

    def artifacts(self) -> list[Artifact]:
        """The classifier, with its preprocessing."""
        _, preprocessor = self.backbone.artifacts("classifier")
        assert isinstance(preprocessor, FixedArtifact)
        return [ModelArtifact(self.classifier, "classifier"), preprocessor]


__all__ = ["FinetuneStudentConfig", "FinetuneStudentObjective"]
