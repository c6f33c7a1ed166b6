"""`ClassifierGuidance`: towards a class, by a classifier of noisy inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.guidance.base import GradientRequest, Guidance
from diffusers_repr.guidance.energy import EnergyTerm, conditional_inputs

Classifier = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """Classifier guidance: `eps - s sigma grad log p(c | x_t)` (Dhariwal and Nichol 2021, arXiv 2105.05233).

    The form of algorithm 2, for every sampler: at each noise level the score is that of `p(x_t) p(c | x_t)^s`. With
    s = 1 the samples are those of `p(x | c)`, with s = 0 of `p(x)`. With any other s they are not those of
    `p(x) p(c | x)^s`, whose noised densities are others: above 1 they lie closer together and farther out. (For a
    Gaussian x and a Gaussian likelihood, with the prior's variance v and the posterior's v_1, samples have
    `v (v_1 / v)^s`, that law has `1 / (1 / v + s (1 / v_1 - 1 / v))`.)

    The paper's DDPM form, algorithm 1, shifts the mean of a step by `s Sigma grad log p`; on a DDPM step the change of
    eps shifts it by `s beta / sqrt(1 - beta) grad log p`, the same with `Sigma = beta` but for the factor
    `1 / sqrt(1 - beta)` (1.01 at the last of 1000 linear steps; beta is that of the step, larger on a coarse grid).
    For an exact classifier and a base without condition it is classifier-free guidance of scale s. With
    classifier-free guidance both add up. The network is not run for it: one backward pass through the classifier a
    step.

    Attributes:
        classifier: A `NoisyClassifier`, or any module or function `(x_t, timestep) -> logits (B, K)`. x_t
            `(B, C, H, W)` is what the network takes, `alpha x_0 + sigma eps`, in the module's dtype (for a function
            float32 or wider); timestep `(B,)` is the training timestep, whole numbers as int64. A module is frozen
            and in eval mode meanwhile.
        class_labels: c, one class for all samples or one each; None takes the `class_labels` that the network is
            called with.

    Example:
        >>> from torch import nn
        >>> logits = lambda x_t, timestep: x_t.mean((2, 3))
        >>> ClassifierGuidance(logits, [0, 2], scale=4.0).class_labels
        (0, 2)
    """

    classifier: Classifier = field(repr=False)
    class_labels: int | Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.classifier):
            raise TypeError(f"A classifier is a function (x_t, timestep) -> logits; got {self.classifier!r}.")
        if self.class_labels is not None:
            object.__setattr__(self, "class_labels", _as_tuple(self.class_labels))

    def bind(self, denoiser: Denoiser) -> EnergyTerm:
        """Ready for a model.

        Raises:
            ValueError: For a classifier of another base or noise process, classes that it does not know, and
                `class_labels=None` with a network that takes no labels.
        """
        return ClassifierTerm(self, denoiser)


class ClassifierTerm(EnergyTerm):
    """The energy `-log p(c | x_t)`."""

    def __init__(self, config: ClassifierGuidance, denoiser: Denoiser) -> None:
        classifier = config.classifier
        modules = (classifier,) if isinstance(classifier, nn.Module) else ()
        super().__init__(config, denoiser, GradientRequest(self._energy, modules=modules))
        self.classifier = classifier
        self.labels = None if config.class_labels is None else _as_tuple(config.class_labels)
        self._checked = False
        check_base: Any = getattr(classifier, "check_base", None)
        if check_base is not None:
            check_base(denoiser.schedule, _channels(denoiser), _latent_scale(denoiser))
        classes = getattr(classifier, "config", {})
        classes = classes.get("num_classes") if isinstance(classes, Mapping) else None
        if self.labels is not None and classes is not None:
            _check_range(torch.tensor(self.labels), classes)
        if self.labels is None and "class_labels" not in forward_names(denoiser.model):
            raise ValueError(
                f"{type(denoiser.model).__name__} is called without class_labels, so ClassifierGuidance does not know "
                "the class: ClassifierGuidance(classifier, class_labels=...)."
            )

    def starts(self) -> None:
        """Labels of the call are checked once a run: reading them waits for the device."""
        self._checked = False

    def _energy(self, features: Mapping[str, Tensor], x0: Tensor | None, call: NetworkCall, x: Tensor) -> Tensor:
        logits = self._logits(x, call)
        labels = self._labels(call, x).to(logits.device)
        if not self._checked:
            _check_range(labels, logits.shape[1])
            self._checked = True
        picked = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        return -picked.to(x.device)

    def _logits(self, x: Tensor, call: NetworkCall) -> Tensor:
        timestep = torch.as_tensor(call.level.timestep)
        if not timestep.is_floating_point() or bool(timestep == timestep.round()):
            timestep = timestep.long()
        first = next(iter(self.classifier.parameters()), None) if isinstance(self.classifier, nn.Module) else None
        given = x if first is None else x.to(first.device, first.dtype)
        found = self.classifier(given, timestep.to(given.device).expand(len(x)))
        logits = getattr(found, "logits", found)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"A classifier gives logits (B, K), here ({len(x)}, K); got {got}.")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _labels(self, call: NetworkCall, x: Tensor) -> Tensor:
        if self.labels is not None:
            if len(self.labels) not in (1, len(x)):
                raise ValueError(
                    f"ClassifierGuidance has {len(self.labels)} class_labels for {len(x)} samples; give one for all, "
                    "or one each (of num_images_per_prompt images all have their own)."
                )
            return torch.tensor(self.labels).expand(len(x))
        labels = conditional_inputs(self.denoiser, call, x).get("class_labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(
                f"The network is called without ids of classes (class_labels={type(labels).__name__}), so "
                "ClassifierGuidance does not know the class: ClassifierGuidance(classifier, class_labels=...)."
            )
        return labels.long()


def _as_tuple(labels: Any) -> tuple[int, ...]:
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels are whole numbers; got {labels!r}.") from error
    if not values.numel():
        raise ValueError("class_labels is empty; give one class for all samples, or one each.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool or values.ndim > 1:
        raise TypeError(f"class_labels are whole numbers, one for all samples or one each; got {labels!r}.")
    return tuple(values.reshape(-1).tolist())


def _check_range(labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"class_labels must lie in 0..{classes - 1}, the classes of the classifier; got "
            f"{low if low < 0 else high}."
        )


def _channels(denoiser: Denoiser) -> int:
    """Of x_0; the input of inpainting networks has more, the output of those with a learned variance too."""
    channels = denoiser.family.channels()
    return min(channels, int(denoiser.config.get("out_channels") or channels))


def _latent_scale(denoiser: Denoiser) -> float | None:
    return None if denoiser.vae is None else denoiser.vae.config.get("scaling_factor")
