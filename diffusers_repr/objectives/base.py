"""`Objective`: one module that owns everything a training method trains; the one thing that `train` prepares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.objectives.artifacts import Artifact, trained_parts

Batch = dict[str, Any]


class Objective(nn.Module):
    """Base of training methods. Subclass, register what is trained as submodules, write `forward` and `artifacts`.

    A batch is a dict: `pixel_values` (B, C, H, W) float32 in [-1, 1]; and, where the data have them, `class_labels`
    (B,) int64, `caption` (list of str), `moments` (B, 2c, h, w), mean and standard deviation of the VAE's posterior,
    `features` (encoder name -> (B, N, D) of its tokens) and `features_global` (name -> (B, D)), `index` (B,), and what
    the denoiser's `conditioner` reads.

    Frozen parts (teachers, VAEs) are kept by `freeze`: they move with the objective, stay in eval mode, and are absent
    from parameters, from `state_dict` and from the moving average.

    Attributes:
        phases: What `forward` is called with in turn in each step; one optimizer each. One phase for most methods.
        card: What the card calls the result (`kind`), and its `library_name`, `pipeline_tag`, `tags` and `base_model`
            on the Hub; `text`, Markdown below the first paragraph, in which `{folder}` becomes the result's Hub id or
            folder; `metrics`, name of a measured number -> arguments of its `hub.Metric`.
        discarded: Paths of submodules that are trained and, on purpose, in none of `artifacts`; a run warns of others.
    """

    phases: tuple[str, ...] = ("main",)
    discarded: tuple[str, ...] = ()
    card: Mapping[str, Any] = {
        "kind": "diffusion model",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "image-generation"],
    }
    _frozen: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self._frozen = {}  # a plain dict: its modules are no submodules

    # What a method defines

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of one micro-batch.

        Args:
            batch: See the class. `noise` (as x_0) and `time` (B,) in it are used instead of drawn ones.
            phase: One of `phases`.

        Returns:
            `loss`, a scalar that carries the gradient, and detached scalars to be logged: the unweighted terms.
        """
        raise NotImplementedError

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer of a phase; all that require a gradient by default."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def on_step_end(self, step: int, ema: Any) -> None:
        """Called after every optimizer step; `step` counts from 1, `ema` is the moving average or None."""

    def artifacts(self) -> Sequence[Artifact]:
        """What is saved; the first is the result itself, which `train` samples from and measures."""
        raise NotImplementedError

    def unsaved(self) -> dict[str, int]:
        """What is trained, in no artifact and not `discarded`: name of the submodule (or parameter) -> parameters."""
        saved = (*self.discarded, *(part.path for part in trained_parts(self.artifacts())))
        found: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not any(f"{name}.".startswith(f"{path}.") for path in saved):
                place = name.rpartition(".")[0] or name
                found[place] = found.get(place, 0) + parameter.numel()
        return found

    def ema_modules(self) -> dict[str, nn.Module]:
        """Submodules whose moving average is kept, by their path in this module: what is saved averaged."""
        return {part.path: part.module for part in trained_parts(self.artifacts()) if part.averaged}

    def networks(self) -> dict[str, nn.Module]:
        """Those of `ema_modules` that have parameters: what can be compiled, checkpointed and given adapters."""
        return {name: module for name, module in self.ema_modules().items() if any(True for _ in module.parameters())}

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raise ValueError for a batch (still on the CPU) that the method cannot use."""

    def check_data(self, data: Any) -> None:
        """Raise ValueError for data that do not fit, before the first step."""

    def identity(self) -> dict[str, Any]:
        """What decides the result besides the recipe, as JSON: a checkpoint of another is refused."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Numbers that belong on the card of the result."""
        return {}

    # The result

    def result(self, state: Mapping[str, Tensor]) -> Any:
        """The first of `artifacts`: what `preview` and `evaluate` of `train` get.

        Args:
            state: Names as in `state_dict` -> CPU tensors; the moving average where there is one.

        Raises:
            TypeError: If it cannot be made.
        """
        return self.artifacts()[0].build(state)

    def save_pretrained(self, folder: str | Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Write each of `artifacts` into its place in `folder`.

        Args:
            folder: Where to.
            state: As `result`.
            dtype: Of the saved weights.
        """
        for artifact in self.artifacts():
            artifact.save(Path(folder), state, dtype)

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """`count` PIL images from the pipeline.

        Args:
            pipe: What `result` gave.
            count: How many.
            generator: On the CPU.
            steps: Sampling steps.
        """
        return pipe(batch_size=count, generator=generator, num_inference_steps=steps).images

    def preview_labels(self, count: int) -> Sequence[int] | None:
        """Class of each of `preview`'s images, equal in a row of 8; None where they are of no class."""
        return None

    # Frozen parts

    def freeze(self, name: str, module: Any) -> Any:
        """Keep a module that is used and not trained.

        Args:
            name: How to find it in `frozen`.
            module: An `nn.Module`, or an object with `.to(device)` (an `Encoder`).

        Returns:
            The module, in eval mode and without gradients.
        """
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
        self._frozen[name] = module
        return module

    def freeze_base(self, denoiser: Denoiser) -> None:
        """Keep a denoiser whose network and whose pipeline's other parts are not trained; a prompt is encoded once."""
        denoiser.prompts = {}
        self.freeze("network", denoiser.model)
        parts = {"vae": denoiser.vae} if denoiser.pipe is None else denoiser.pipe.components
        for name, part in parts.items():
            if isinstance(part, nn.Module) and part is not denoiser.model:
                self.freeze(name, part)

    @property
    def frozen(self) -> dict[str, Any]:
        """The frozen parts by name."""
        return self._frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        """Frozen modules move with this one, but keep their dtype's own choice of `fn`.

        They do not follow to the meta device, where FSDP puts what it is about to shard and to load again.
        `nn.Module._apply` is what `to`, `half` and `cuda` all call; if it goes, frozen parts stay where they were.
        """
        super()._apply(fn, recurse)
        if fn(torch.empty(0)).is_meta:
            return self
        for module in self.frozen.values():
            if isinstance(module, nn.Module):
                module._apply(fn)
        return self

    # State

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name: parameters that require a gradient, and persistent buffers.

        The tensors themselves, not copies: a checkpoint is written back into them.
        """
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        fixed = {name for name, p in self.named_parameters() if not p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k in trained or k not in fixed}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """`loss` as the weighted sum of the terms, and the detached terms themselves.

    Args:
        terms: Name -> scalar.
        weights: Name -> factor; 1 where left out.

    Example:
        >>> out = weighted_sum({"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, {"b": 0.5})
        >>> float(out["loss"]), sorted(out)
        (2.5, ['a', 'b', 'loss'])
    """
    loss = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


__all__ = ["Batch", "Objective", "weighted_sum"]
