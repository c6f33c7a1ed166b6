"""What is measured on held-out images while a backbone is distilled or tuned: probes on its features, accuracy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusers_repr.data import TrainData
from diffusers_repr.objectives import DreamTeacherObjective, FinetuneStudentObjective, RepFusionObjective
from diffusers_repr.sweep import few_shot_probe, linear_probe

SHOTS = 5


class StudentAccuracy:
    """Linear and 5-shot probes on the student's pooled features, trained and untrained, on the teacher's, on pixels.

    Args:
        objective: That trains the student, before its first step.
        train_data: Images and labels that the probes learn from, as they are.
        test_data: Those that they are measured on.
        seed: Of the teacher's noise and of which labels are drawn.
    """

    def __init__(
        self,
        objective: RepFusionObjective | DreamTeacherObjective,
        train_data: TrainData,
        test_data: TrainData,
        seed: int = 0,
    ) -> None:
        self.objective, self.seed = objective, seed
        self.sets = [every_row(data) for data in (train_data, test_data)]
        self.untrained = objective.result({k: v.clone() for k, v in objective.state_dict().items()})

    def __call__(self, module: nn.Module, step: int) -> dict[str, float]:
        """An accuracy a network and a probe: `student_`, `untrained_`, `teacher_` and `pixels_`."""
        device = next(module.parameters()).device
        (images, labels), (test_images, test_labels) = ([x.to(device) for x in part] for part in self.sets)
        found: dict[str, float] = {}
        for name in ("student", "untrained", "teacher", "pixels"):
            network = {"student": module, "untrained": self.untrained.to(device)}.get(name)
            bank, test = (self.features(name, network, part) for part in (images, test_images))
            given = (bank, labels, test, test_labels)
            found[f"{name}_{SHOTS}_shot"] = few_shot_probe(*given, shots=SHOTS, seed=self.seed).mean
            found[f"{name}_linear"] = linear_probe(*given, seed=self.seed).accuracy
        return _told(found)

    @torch.no_grad()
    def features(self, name: str, network: nn.Module | None, images: Tensor) -> Tensor:
        """`(N, D)` of images in [-1, 1]: of a network like the student, of the teacher, or the pixels."""
        if name == "pixels":
            return images.flatten(1)
        parts = []
        generator = torch.Generator(images.device).manual_seed(self.seed)
        for pixels in images.split(256):
            if network is not None:
                parts.append(self.objective.backbone.pooled(network, pixels))
                continue
            maps = self.objective.teacher.read(pixels, self.objective.reading_level(), generator)
            parts.append(torch.cat([value.float().mean((2, 3)) for value in maps], dim=1))
        return torch.cat(parts)


class TunedAccuracy:
    """Loss and accuracy of a student that is being tuned, on every image of a split.

    Args:
        objective: That tunes it.
        data: The split, its images as they are.
        batch_size: Images of a forward.
    """

    def __init__(self, objective: FinetuneStudentObjective, data: TrainData, batch_size: int) -> None:
        self.objective, self.data, self.batch_size = objective, data, batch_size

    def __call__(self, classifier: nn.Module, step: int) -> dict[str, float]:
        """`eval_loss` and `eval_accuracy`."""
        loss, accuracy = self.measured(classifier)
        return _told({"eval_loss": loss, "eval_accuracy": accuracy})

    @torch.no_grad()
    def measured(self, classifier: nn.Module) -> tuple[float, float]:
        """Mean loss, and accuracy; of a classifier in eval mode they depend on no batch."""
        device, sums = next(classifier.parameters()).device, torch.zeros(2, dtype=torch.float64)
        for batch in DataLoader(self.data, self.batch_size):
            moved = self.data.on_device({k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)})
            labels = moved["class_labels"]
            logits = self.objective.logits(classifier, moved["pixel_values"])
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, (logits.argmax(1) == labels).sum()]).double().cpu()
        loss, accuracy = (sums / len(self.data)).tolist()
        return loss, accuracy


def every_row(data: TrainData) -> tuple[Tensor, Tensor]:
    """All images `(N, C, H, W)` in [-1, 1] and their class ids `(N,)`.

    Raises:
        ValueError: For data without labels.
    """
    batches = [data.on_device(batch) for batch in DataLoader(data, 256)]
    if "class_labels" not in batches[0]:
        raise ValueError("`eval_split` measures by labels, and the data have none; name --label_column or drop it.")
    return torch.cat([b["pixel_values"] for b in batches]), torch.cat([b["class_labels"] for b in batches])


def _told(found: dict[str, float]) -> dict[str, float]:
    print({name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


__all__ = ["SHOTS", "StudentAccuracy", "TunedAccuracy", "every_row"]
