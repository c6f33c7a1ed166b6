"""`finetuned_probe`: a network that was tuned whole to classify, with its head, as a `Probe`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from diffusers_repr.data import TrainData
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.pooling import POOLINGS, VECTORS
from diffusers_repr.heads import PooledHead
from diffusers_repr.hub import load_json_config, resolve_folder
from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.places import public_name
from diffusers_repr.hub.schema import anything, integer, listing, mapping, number, one_of, optional, record, text
from diffusers_repr.objectives import FinetuneObjective
from diffusers_repr.objectives.finetune import HEAD, RECORD
from diffusers_repr.tasks.files import read_head
from diffusers_repr.tasks.formats import PROBE
from diffusers_repr.tasks.images import read_pooled
from diffusers_repr.tasks.probe import Probe
from diffusers_repr.tasks.reading import reading_fields
from diffusers_repr.tasks.recipe import ProbeRecipe
from diffusers_repr.training.seeds import reseed

_SCHEMA = record(
    {
        "layers": listing(text(500), 1, 1000, distinct=True),
        "timestep": number(),
        "noise": one_of("per_image", "clean"),
        "pooling": text(20, pattern=VECTORS, what=POOLINGS),
        "prompt": optional(text()),
        "class_label": optional(integer(0, 1_000_000)),
        "label_names": listing(text(1000), 2, distinct=True),
        "image_size": listing(integer(1, MAX_SIDE), 2, 2),
        "train": mapping(anything(4, 1000), 0, 100),
    },
    others=True,
)
_VERSION = 1


def finetuned_probe(
    id_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    **kwargs: Any,
) -> Probe:
    """The classifier that `examples/train_finetuned_classifier.py` wrote: a `Probe` whose base is the tuned network.

    It predicts, is measured, saved and pushed as any other: `.save_pretrained(folder)` writes head and recipe, and the
    base stays the folder it is.

    Args:
        id_or_folder: The result of the run, or its Hub id.
        revision: Of a Hub id.
        token: Hub token.
        batch_size: Images read at a time.
        seed: Of the noise.
        **kwargs: For loading the network (`dtype`, ...).

    Raises:
        FileNotFoundError: For a folder that is no such result: it has no `finetune.json`.
        ValueError: For a damaged record or head.
    """
    folder = resolve_folder(id_or_folder, revision, token)
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(
            f"{str(id_or_folder)!r} has no {RECORD}: it was not tuned by examples/train_finetuned_classifier.py. "
            "`Probe.fit` fits a head on a frozen model, `Probe.from_pretrained` loads one."
        )
    told = load_json_config(folder, RECORD)
    _SCHEMA(told, f"{RECORD} of {str(id_or_folder)!r}")
    head = read_head(PROBE, folder / HEAD)
    assert isinstance(head, PooledHead)
    denoiser = Denoiser.from_pretrained(folder, token=token, **kwargs)
    denoiser.name, denoiser.revision = os.fspath(id_or_folder), revision
    size = (int(told["image_size"][0]), int(told["image_size"][1]))
    extractor = FeatureExtractor(
        denoiser, told["layers"], told["timestep"], told["noise"], pooling=told["pooling"], seed=seed,
        image_size=size, batch_size=batch_size,
    )  # fmt: skip
    condition = (told["prompt"], told["class_label"])
    grey = torch.full((1, denoiser.image_channels, *size), 0.0)
    output = read_pooled(extractor, grey, told["pooling"], *condition)
    sizes = {layer: feature.shape[-1] for layer, feature in output.features.items()}
    recipe = ProbeRecipe(
        **reading_fields(extractor, output, size, sizes, condition, seed=seed),
        label_names=tuple(told["label_names"]),
        pooling=told["pooling"],
        protocol={"name": "finetune", "version": _VERSION, "source": "The whole network was tuned with the head."},
        train={**told["train"], "dataset": public_name(str(told["train"].get("dataset", "unknown")))},
    )
    return Probe(head, recipe, denoiser, batch_size)


class FinetunedAccuracy:
    """Loss and accuracy of a network that is being tuned, on every image of a split, with one draw of noise.

    Args:
        objective: That trains it.
        data: The split, its images as they are.
        batch_size: Images of a forward.
        seed: Of the noise.
    """

    def __init__(self, objective: FinetuneObjective, data: TrainData, batch_size: int, seed: int) -> None:
        self.objective, self.data, self.batch_size, self.seed = objective, data, batch_size, seed

    @torch.no_grad()
    def __call__(self, parts: nn.ModuleDict, step: int) -> dict[str, float]:
        """`eval_loss` and `eval_accuracy`."""
        objective, sums = self.objective, torch.zeros(2, dtype=torch.float64)
        named: Mapping[str, nn.Module] = {"network": parts["network"], "head": parts["head"]}
        device = next(parts.parameters()).device
        for at, batch in enumerate(DataLoader(self.data, self.batch_size)):
            reseed(self.seed, at, 0)
            moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            moved = self.data.on_device(moved)
            logits, labels = objective.logits(objective.clean(moved), parts=named), moved["class_labels"]
            values = [functional.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()]
            sums += torch.stack([value.double().cpu() for value in values])
        found = dict(zip(("eval_loss", "eval_accuracy"), (sums / len(self.data)).tolist(), strict=True))
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


__all__ = ["FinetunedAccuracy", "finetuned_probe"]
