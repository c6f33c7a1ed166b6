"""What a training method saves: a pipeline, a network by itself, heads, whatever else has `save_pretrained`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.files import write_json
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.objectives.adapters import adapter_state, merge_lora, save_adapters

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Artifact:
    """Base of what is saved; subclass for another kind.

    Attributes:
        folder: Where it is written, in the folder of the result; empty: the result itself.
    """

    folder: str = field(default="", kw_only=True)

    @property
    def parts(self) -> tuple[ModelArtifact, ...]:
        """The trained models in it."""
        return ()

    def check(self) -> None:
        """Raise TypeError for what cannot be made; called before the first step."""

    def __str__(self) -> str:
        """What it is, and where."""
        return f"{self.kind} in {self.folder or 'the folder itself'}"

    @property
    def kind(self) -> str:
        """Class of what is saved."""
        return type(self).__name__

    def build(self, state: State) -> Any:
        """The object itself, on the CPU.

        Args:
            state: Names as in the objective's `state_dict` -> CPU tensors; the moving average where there is one.
        """
        raise NotImplementedError

    def save(self, root: Path, state: State, dtype: torch.dtype) -> None:
        """Write it into its folder.

        Args:
            root: Folder of the result.
            state: As `build`.
            dtype: Of the saved weights.
        """
        self.build(state).save_pretrained(root / self.folder)


@dataclass(frozen=True)
class ModelArtifact(Artifact):
    """A trained model of diffusers, of transformers or of this package, as a folder that loads by itself.

    Attributes:
        module: As it is in training, maybe sharded or compiled.
        path: Of the module in the objective.
        config: Entries of the saved config that tell what it was trained with.
        averaged: Whether its moving average is kept and saved, and not the weights of the last step.
        make: A fresh model with random weights; from class and config of `module` if None.
    """

    module: Any
    path: str
    config: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = True
    make: Callable[[], Any] | None = None

    @property
    def parts(self) -> tuple[ModelArtifact, ...]:
        """Itself."""
        return (self,)

    @property
    def kind(self) -> str:
        """Class of the model."""
        return model_class(plain_module(self.module)).__name__

    @property
    def name(self) -> str:
        """Last part of the folder."""
        return self.folder.rpartition("/")[2]

    def check(self) -> None:
        """See `Artifact.check`: a plain module has no config to be made and loaded by."""
        inner = plain_module(self.module)
        if self.make is None and not (hasattr(inner, "config") and hasattr(inner, "save_pretrained")):
            raise TypeError(
                f"ModelArtifact of {self.path!r} has a {type(inner).__name__}, which has no config and no "
                "save_pretrained; it takes a model of diffusers, transformers or this package. Make it one: class "
                "Mine(ModelMixin, ConfigMixin), with @register_to_config at its __init__."
            )

    def build(self, state: State) -> Any:
        """See `Artifact.build`, in eval mode."""
        return rebuild(self.module, state, f"{self.path}.", self.make)

    def save(self, root: Path, state: State, dtype: torch.dtype) -> None:
        """See `Artifact.save`."""
        model = self.build(state)
        nn.Module.to(model, dtype)
        if self.config:
            model.register_to_config(**self.config)
        model.save_pretrained(root / self.folder)


@dataclass(frozen=True)
class PipelineArtifact(Artifact):
    """A diffusers pipeline.

    Attributes:
        pipeline: Name of its class, one of this package or of diffusers; or a pipeline, whose untrained components and
            settings are taken over. None cannot be saved, and says so.
        components: Name in the pipeline -> a `ModelArtifact`, or with a class name also what is not trained.
    """

    pipeline: Any
    components: Mapping[str, Any]

    @property
    def parts(self) -> tuple[ModelArtifact, ...]:
        """The trained components."""
        return tuple(part for part in self.components.values() if isinstance(part, ModelArtifact))

    @property
    def kind(self) -> str:
        """Class of the pipeline."""
        return self.pipeline if isinstance(self.pipeline, str) else type(self.pipeline).__name__

    def check(self) -> None:
        """See `Artifact.check`.

        Raises:
            TypeError: Without a pipeline.
        """
        if self.pipeline is None:
            raise TypeError("The denoiser has no pipeline to be saved as; build it by Denoiser.from_pipe(pipe).")

    def build(self, state: State) -> Any:
        """See `Artifact.build`.

        Raises:
            TypeError: Without a pipeline.
        """
        self.check()
        made = {k: part.build(state) if isinstance(part, Artifact) else part for k, part in self.components.items()}
        if isinstance(self.pipeline, str):
            return named_pipeline(self.pipeline)(**made)
        pipe = copy.copy(self.pipeline)
        # Where diffusers' ConfigMixin keeps the config, private: a copy shares it, and without this line the config of
        # the user's pipeline would name our components.
        pipe.__dict__["_internal_dict"] = copy.deepcopy(pipe._internal_dict)
        pipe.register_modules(**made)
        return pipe

    def save(self, root: Path, state: State, dtype: torch.dtype) -> None:
        """See `Artifact.save`; what was not trained keeps its dtype. Adapters are merged in, and saved apart too."""
        pipe = self.build(state)
        for name, part in self.components.items():
            if isinstance(part, Artifact):
                nn.Module.to(getattr(pipe, name), dtype)
        pipe.save_pretrained(root / self.folder)
        tuned = {name: part for name, part in self.components.items() if isinstance(part, ModelArtifact)}
        adapters = {name: adapter_state(state, part.path, dtype) for name, part in tuned.items()}
        save_adapters(pipe, {name: found for name, found in adapters.items() if found}, root / self.folder)


@dataclass(frozen=True)
class FixedArtifact(Artifact):
    """What is saved as it stands and holds nothing of the state: a fitted assigner, a preprocessor.

    Attributes:
        thing: With `save_pretrained`.
    """

    thing: Any

    @property
    def kind(self) -> str:
        """Class of the thing."""
        return type(self.thing).__name__

    def build(self, state: State) -> Any:
        """The thing."""
        return self.thing


@dataclass(frozen=True)
class RecordArtifact(FixedArtifact):
    """A JSON file in the result's own folder, by which the package reads the result.

    Attributes:
        thing: `state -> what is written`.
        file: Its name.
    """

    file: str

    @property
    def kind(self) -> str:
        """The name of the file."""
        return self.file

    def save(self, root: Path, state: State, dtype: torch.dtype) -> None:
        """See `Artifact.save`."""
        write_json(root / self.file, self.thing(state))


def rebuild(module: Any, state: State, prefix: str, make: Callable[[], Any] | None = None) -> Any:
    """A fresh model of the same class and config on the CPU, with weights out of `state`.

    Args:
        module: A model of diffusers or transformers, maybe sharded or compiled.
        state: Full tensors by name.
        prefix: Path of `module` in `state`, with the dot at its end.
        make: See `ModelArtifact`.

    Raises:
        KeyError: If `state` lacks one of its tensors.
    """
    inner = plain_module(module)
    with torch.random.fork_rng(devices=[]):
        fresh = make() if make else _same_kind(inner)
    own = {k: state.get(prefix + k, v).detach().to("cpu") for k, v in inner.state_dict().items()}
    fresh.load_state_dict({k: v.clone() for k, v in merge_lora(own).items()})
    return fresh.eval()


def _same_kind(module: Any) -> Any:
    """A model of the class and config of another."""
    if not isinstance(module.config, Mapping):  # of transformers
        return model_class(module)(copy.deepcopy(module.config))
    return model_class(module)(**{k: v for k, v in module.config.items() if not k.startswith("_")})


def model_class(module: nn.Module) -> type[nn.Module]:
    """The class of a model as it was before FSDP gave it another."""
    return next(c for c in type(module).__mro__ if not c.__name__.startswith("FSDP"))


def check_places(artifacts: Sequence[Artifact], method: str) -> None:
    """Refuse artifacts that would write over one another.

    Args:
        artifacts: Of one method.
        method: Its name, for messages.

    Raises:
        ValueError: If there is none, or two lie in one folder; beside one in the folder of the result itself only
            `FixedArtifact`s may lie there, whose files have other names.
    """
    if not artifacts:
        raise ValueError(f"`{method}.artifacts` names nothing to be saved.")
    places = [artifact.folder for artifact in artifacts if artifact.folder or not isinstance(artifact, FixedArtifact)]
    for artifact in artifacts:
        if isinstance(artifact, PipelineArtifact):
            places += [f"{artifact.folder}/{name}".lstrip("/") for name in artifact.components]
    doubled = sorted({place or "the folder itself" for place in places if places.count(place) > 1})
    if doubled:
        raise ValueError(
            f"`{method}.artifacts` saves two things in {', '.join(doubled)}, and one would write over the other; give "
            "one a folder of its own (`folder=`)."
        )


def trained_parts(artifacts: Sequence[Artifact]) -> list[ModelArtifact]:
    """The trained models of several artifacts, in order."""
    return [part for artifact in artifacts for part in artifact.parts]


__all__ = [
    "Artifact",
    "FixedArtifact",
    "ModelArtifact",
    "PipelineArtifact",
    "RecordArtifact",
    "check_places",
    "model_class",
    "rebuild",
    "trained_parts",
]
