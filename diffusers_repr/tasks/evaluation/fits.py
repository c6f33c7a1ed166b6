"""What recipes may tell the fitting of each task: the keys of the section `fit`, and the arguments they become."""

from __future__ import annotations

from typing import Any, Literal

from diffusers_repr.heads import head_class
from diffusers_repr.heads.fitting.pixels import DDPM_SEG
from diffusers_repr.heads.fitting.protocols import get_protocol
from diffusers_repr.sweep.selection import Selection


def classification(
    *,
    head: str = "linear",
    protocol: str | None = None,
    pooling: str | None = None,
    head_options: dict[str, Any] | None = None,
    selection: str | None = None,
    use: Literal["best", "layers", "levels"] = "best",
    prompt: str | None = None,
    class_label: int | None = None,
) -> dict[str, Any]:
    """Arguments of `Probe.fit`.

    Args:
        head: By its name.
        protocol: How it is fitted.
        pooling: `mean`, `max` or `adaptive:P`.
        head_options: Arguments of the head's class.
        selection: Folder of a selection, in place of layers and timesteps.
        use: What of it.
        prompt: Of every image.
        class_label: Condition of a class-conditional model.
    """
    head_class(head)
    get_protocol(protocol, head)
    chosen = {} if selection is None else {"selection": Selection.load(selection), "use": use}
    pooled = {} if pooling is None else {"pooling": pooling}
    told = {"head": head, "protocol": protocol, "head_options": head_options, "prompt": prompt}
    return {**told, "class_labels": class_label, **pooled, **chosen}


def segmentation(
    *,
    members: int = 10,
    hidden_features: list[int] | None = None,
    max_epochs: int | None = None,
    preset: str | None = None,
    store_dtype: Literal["float32", "float16"] = "float32",
    prompt: str | None = None,
    class_label: int | None = None,
) -> dict[str, Any]:
    """Arguments of `Segmenter.fit`.

    Args:
        members: Networks that vote.
        hidden_features: Their widths.
        max_epochs: Passes over the pixels at most.
        preset: Layers, levels and size of a paper.
        store_dtype: Of the features in memory.
        prompt: Of every image.
        class_label: Condition of a class-conditional model.
    """
    protocol = DDPM_SEG if max_epochs is None else DDPM_SEG.replace(max_epochs=max_epochs)
    told = {"members": members, "hidden_features": hidden_features, "protocol": protocol, "preset": preset}
    return {**told, "store_dtype": store_dtype, "prompt": prompt, "class_labels": class_label}


def correspondence(
    *,
    preset: str | None = None,
    alpha: float = 0.1,
    reference: Literal["box", "image"] = "box",
    prompt: str | None = None,
    class_label: int | None = None,
) -> dict[str, Any]:
    """Arguments of `Correspondence.fit`.

    Args:
        preset: Layer, level and size of a paper.
        alpha: Of the PCK by which layer and level are chosen on the split `train`.
        reference: Likewise.
        prompt: Of every image; `{category}` stands for the category of a pair.
        class_label: Condition of a class-conditional model.
    """
    told = {"preset": preset, "alpha": alpha, "reference": reference}
    return {**told, "prompt": prompt, "class_labels": class_label}


def zero_shot(
    *,
    classes: list[str] | dict[str, Any] | None = None,
    template: str | list[str] | None = None,
    rule: str | None = None,
    error: float | None = None,
    candidates: int | None = None,
    draws: int | None = None,
    criterion: str | None = None,
    loss: str | None = None,
    ensemble: Literal["mean", "best"] | None = None,
    image_size: int | list[int] | None = None,
    resize: Literal["crop", "stretch"] | None = None,
) -> dict[str, Any]:
    """Arguments of `ZeroShotClassifier.fit`; those that are not told are left to it.

    Args:
        classes: Names, or names with their prompts.
        template: Puts names into words.
        rule: `calibrated`, `racing` or `averaging`.
        error: Of `calibrated`: probability that it eliminates the true class.
        candidates: Levels that are tried.
        draws: Of noise, at each.
        criterion: By which levels are ordered.
        loss: `l2`, `l1`, `huber` or `vlb`.
        ensemble: How several prompts of a class count.
        image_size: One side, or height and width.
        resize: How images are brought to it.
    """
    size = tuple(image_size) if isinstance(image_size, list) else image_size
    given = {
        "classes": classes,
        "template": template,
        "rule": rule,
        "error": error,
        "candidates": candidates,
        "draws": draws,
        "criterion": criterion,
        "loss": loss,
        "ensemble": ensemble,
        "image_size": size,
        "resize": resize,
    }
    return {name: value for name, value in given.items() if value is not None}


__all__ = ["classification", "correspondence", "segmentation", "zero_shot"]
