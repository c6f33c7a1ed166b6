"""`Student`: an ordinary backbone that is trained, and how its stages are read; new, or from a folder."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from diffusers_repr.capture.persistent import PersistentCapture
from diffusers_repr.config.recipe import setting
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.backbone import BackboneSource
from diffusers_repr.encoders.family import BackboneFamily, encoder_family
from diffusers_repr.encoders.preprocessing import expand_channels, preprocess
from diffusers_repr.encoders.source import device_of
from diffusers_repr.encoders.stages import Stage, measure_stages, stage_paths
from diffusers_repr.objectives.artifacts import FixedArtifact, ModelArtifact
from diffusers_repr.objectives.new_or_trained import new_or_trained
from diffusers_repr.objectives.preprocessor import Preprocessor

MODEL_TYPES = ("resnet", "convnext", "convnextv2", "swin")


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The backbone; the fields are keys of a recipe.

    Raises:
        ValueError: Without a student or with two, and for arguments that its config does not know.
    """

    student: dict | str | None = setting(
        None, "a new backbone: model_type (resnet, convnext, convnextv2, swin) and arguments of its config, a mapping"
    )
    student_name_or_path: str | None = setting(None, "a trained backbone to go on from: a folder or Hub id")

    def __post_init__(self) -> None:
        new_or_trained(self, "student", "backbone", MODEL_TYPES)

    def build(self, channels: int, size: tuple[int, int]) -> Student:
        """The student.

        Args:
            channels: Of the data's images.
            size: (H, W) of them.

        Raises:
            ValueError: For one that takes images of other channels, or whose strides do not divide the size.
            TypeError: For a folder of a network without stages.
        """
        if self.student_name_or_path is not None:
            return Student.from_pretrained(self.student_name_or_path, size)
        arguments = dict(cast(Mapping[str, Any], self.student))
        kind = arguments.pop("model_type")
        known = AutoConfig.for_model(kind).to_dict()
        if "image_size" in known:
            arguments.setdefault("image_size", min(size))
        # ConvNeXt has its number of stages as an argument of its own, and asks for as many names.
        if "num_stages" in known and "depths" in arguments:
            arguments.setdefault("num_stages", len(arguments["depths"]))
        config = AutoConfig.for_model(kind, **{"num_channels": channels, **arguments})
        return Student(AutoModel.from_config(config), size=size)


class Student:
    """A backbone with what is known of it; the objective that trains it registers `module`.

    Args:
        module: A ResNet, ConvNeXt or Swin of transformers; or any network of images whose modules give maps.
        size: (H, W) of the images.
        stages: Of another network, the modules that give its maps, finest first; the elements of its `stages` if None.
        channels: Of its images; what its config says if None.
        mean: Of pixels in [0, 1], which it takes standardised; 0.5 and 0.5: it takes [-1, 1].
        std: As `mean`.

    Raises:
        ValueError: For images that the last stage's stride does not divide.
        TypeError: For a network without stages.

    Attributes:
        stages: `Stage`s, finest first.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        size: tuple[int, int],
        stages: Sequence[str] | None = None,
        channels: int | None = None,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        self.module, self.size, self.mean, self.std = module, size, tuple(mean), tuple(std)
        config: Any = getattr(module, "config", None)
        told = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        channels = channels or told.get("num_channels") or told.get("in_channels") or 3
        self.channels = int(channels)
        self.inputs: Callable[[nn.Module, Tensor], dict[str, Any]] = _first_argument
        family = None if stages is not None else _family(told.get("model_type"))
        if family is not None:
            self.stages = family.stages(told)
            self.inputs = family.inputs
            coarsest = self.stages[-1].stride
            if any(side % coarsest for side in size):
                raise ValueError(
                    f"Images are {size[0]} x {size[1]}, and the student's last stage has a stride of {coarsest}, "
                    "which does not divide them. Take a smaller patch_size or fewer stages, or another `resolution`."
                )
        else:
            self.stages = measure_stages(module, stages or stage_paths(module), self.channels, size)
        self._reads: PersistentCapture | None = None
        self._used: list[Stage] = []

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, size: tuple[int, int]) -> Student:
        """A trained backbone of transformers, with the preprocessing that it was trained with.

        Args:
            name_or_path: Folder or Hub id.
            size: (H, W) of the images.

        Raises:
            TypeError, ValueError, OSError: As `Encoder.from_pretrained`; ValueError for one without stages.
        """
        encoder = Encoder.from_pretrained(name_or_path)
        if not isinstance(encoder.source, BackboneSource):
            raise ValueError(
                f"{str(name_or_path)!r} is a {type(encoder.module).__name__}, which has no stages; students are "
                f"{', '.join(MODEL_TYPES)}."
            )
        module = encoder.module.requires_grad_(True)
        return cls(module, size=size, mean=encoder.source.mean, std=encoder.source.std)

    def use(self, stages: Sequence[Stage]) -> None:
        """Choose the stages that `maps` gives; what no gradient of them reaches is frozen.

        Args:
            stages: Of `self.stages`.
        """
        self._used = list(stages)
        paths = list(dict.fromkeys(stage.path for stage in stages))
        reached = self._reached(paths)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in reached)
        self._reads = PersistentCapture(self.module, paths)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Maps `(B, C, h, w)` of the stages that are used, with their graph.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1]; grey ones are repeated for a student of colours.
        """
        assert self._reads is not None
        size = (pixels.shape[2], pixels.shape[3])
        with self._reads.recording() as seen:
            self.module(**self.inputs(self.module, self.prepared(pixels)))
        return [stage.as_map(seen[stage.path], size) for stage in self._used]

    def prepared(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] as the module takes them."""
        pixels = expand_channels(pixels, self.channels)
        return preprocess(pixels, (pixels.shape[2], pixels.shape[3]), self.mean, self.std)

    def pooled(self, module: nn.Module, pixels: Tensor) -> Tensor:
        """The mean of the last used stage's map, `(B, C)`, of the module or one of its kind; without gradients."""
        student = copy.copy(self)
        student.module, student._reads = module, PersistentCapture(module, [self._used[-1].path])
        student._used = self._used[-1:]
        try:
            with torch.no_grad(), eval_mode(module):
                return student.maps(pixels)[0].float().mean((2, 3))
        finally:
            student._reads.close()

    def artifacts(self, path: str) -> list[Any]:
        """The backbone as a plain folder, with its preprocessing.

        Args:
            path: Of the module in the objective.
        """
        height, width = self.size
        own: dict[str, Any] = {"size": {"height": height, "width": width}} if height == width else {}
        planes = [list(v) * (self.channels if len(v) == 1 else 1) for v in (self.mean, self.std)]
        preprocessor = Preprocessor(**own, image_mean=planes[0], image_std=planes[1])
        return [ModelArtifact(self.module, path), FixedArtifact(preprocessor)]

    def describe(self) -> dict[str, Any]:
        """What decides the result, as JSON."""
        return {"stages": [dataclasses.asdict(stage) for stage in self._used]}

    def _reached(self, paths: Sequence[str]) -> set[str]:
        """Parameters that the maps depend on, found by one forward and backward of two grey images."""
        module, found = self.module, PersistentCapture(self.module, paths)
        grey = torch.zeros(2, self.channels, *self.size, device=device_of(module))
        try:
            with torch.enable_grad(), eval_mode(module), found.recording() as seen:
                module(**self.inputs(module, grey))
        finally:
            found.close()
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        total = torch.stack([value.float().sum() for value in seen.values()]).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _first_argument(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """By the name that the network's forward has for it."""
    return {next(iter(inspect.signature(module.forward).parameters)): pixels}


def _family(model_type: str | None) -> BackboneFamily | None:
    if model_type not in MODEL_TYPES:
        return None
    family = encoder_family(model_type)
    assert isinstance(family, BackboneFamily)
    return family


__all__ = ["MODEL_TYPES", "Student", "StudentConfig"]
