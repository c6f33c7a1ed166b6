"""What is measured on held-out data while a network is trained: for the argument `evaluate` of `train`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffusers_repr.data import TrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.objectives import ClassifierObjective, ReadoutObjective, ReadoutRows, SelfSupervisedObjective
from diffusers_repr.sweep import knn_probe, linear_probe
from diffusers_repr.training.batches import to_device
from diffusers_repr.training.seeds import reseed

PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)  # in the level range of readout heads


class ClassifierAccuracy:
    """Loss and accuracy of a noisy classifier on every image of a split, once in each part of the noise levels.

    Args:
        objective: That trains it.
        data: The split, its images as they are.
        batch_size: Images of a forward.
        seed: Of the noise.
    """

    def __init__(self, objective: ClassifierObjective, data: TrainData, batch_size: int, seed: int) -> None:
        self.objective, self.data, self.batch_size, self.seed = objective, data, batch_size, seed

    @torch.no_grad()
    def __call__(self, model: NoisyClassifier, step: int) -> dict[str, float]:
        """`eval_loss` and `eval_accuracy`, over all levels and of each part."""
        reseed(self.seed, step, 0)
        bins, device = self.objective.bins, model.device
        sums = torch.zeros(2, bins, dtype=torch.float64)
        for batch in DataLoader(self.data, self.batch_size):
            moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            moved = self.data.on_device(moved)
            for part in range(bins):
                places = (part + torch.rand(len(moved["class_labels"]), device=device)) / bins
                values = self.objective.classify(model, moved, places)
                sums[:, part] += torch.stack(values).double().sum(1).cpu()
        means = dict(zip(("eval_loss", "eval_accuracy"), sums / len(self.data), strict=True))
        found = {name: value.mean().item() for name, value in means.items()}
        found |= {f"{name}_{part}": value.item() for name, row in means.items() for part, value in enumerate(row)}
        return _told(found)


class EncoderAccuracy:
    """k-NN and linear-probe accuracy of an encoder, of the untrained one and of the pixels.

    Args:
        objective: That trains it, before its first step.
        train_set: uint8 images and labels that the probes learn from.
        test_set: Those that they are measured on.
    """

    def __init__(
        self, objective: SelfSupervisedObjective, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]
    ) -> None:
        self.objective, self.sets = objective, (train_set, test_set)
        self.untrained = objective.result({k: v.clone() for k, v in objective.state_dict().items()})

    @torch.no_grad()
    def features(self, encoder: nn.Module | None, images: Tensor) -> dict[str, Tensor]:
        """Class tokens and mean patch tokens of uint8 images, or their pixels without an encoder."""
        if encoder is None:
            return {"": to_unit(images).flatten(1)}
        tokens = torch.cat([self.objective.tokens(encoder, to_unit(part)) for part in images.split(512)])
        return {"_class_token": tokens[:, 0], "_patch_mean": tokens[:, 1:].mean(1)}

    def __call__(self, encoder: nn.Module, step: int) -> dict[str, float]:
        """An accuracy a network, a kind of feature and a probe."""
        device = next(encoder.parameters()).device
        (images, labels), (test_images, test_labels) = ([x.to(device) for x in part] for part in self.sets)
        found = {}
        named: Mapping[str, nn.Module | None] = {
            "trained": encoder, "untrained": self.untrained.to(device), "pixels": None
        }  # fmt: skip
        for name, one in named.items():
            bank, test = (self.features(one, part) for part in (images, test_images))
            for key in bank:
                for kind, probe in (("knn", knn_probe), ("linear", linear_probe)):
                    found[f"{name}{key}_{kind}"] = probe(bank[key], labels, test[key], test_labels).accuracy
        return _told(found)


class ReadoutErrors:
    """Mean error of readout heads by timestep over the rows of a split, and that of the best constant.

    Args:
        objective: That trains them.
        rows: The split.
        seed: Of the noise.
    """

    def __init__(self, objective: ReadoutObjective, rows: ReadoutRows, seed: int) -> None:
        self.objective, self.rows, self.seed = objective, rows, seed

    @torch.no_grad()
    def __call__(self, heads: nn.ModuleDict, step: int) -> dict[str, float]:
        """An error a head and a timestep, and `constant`."""
        objective, (low, high) = self.objective, self.objective.level_range
        depth = objective.config.kind == "depth"
        error: nn.Module = nn.L1Loss(reduction="sum") if depth else nn.MSELoss(reduction="sum")
        found: dict[str, float] = {}
        labels: list[Tensor] = []
        for place in PLACES:
            timestep, count = round(low + place * (high - low), 4 if high < 10 else 0), 0
            sums: dict[str, float] = {}
            for at, batch in enumerate(DataLoader(self.rows, 64)):
                reseed(self.seed, at, 0)
                batch = self.rows.on_device(to_device(batch, objective.denoiser.device))
                features, level = objective.features(batch["images"], torch.tensor(timestep))
                for name, head in heads.items():
                    read = head(features, level)
                    label = objective.label(batch, read)
                    sums[name] = sums.get(name, 0.0) + error(read, label).item()
                count += label.numel()
                labels += [label.cpu()] if place == PLACES[0] else []
            found |= {f"{objective.term(name)}_t{timestep:g}": value / count for name, value in sums.items()}
        every = torch.cat(labels)
        constant = every.median() if depth else every.mean()
        found["constant"] = error(every, constant.expand_as(every)).item() / every.numel()
        return _told(found)


def _told(found: dict[str, float]) -> dict[str, float]:
    print({name: round(value, 4) for name, value in found.items()}, flush=True)
    return found
