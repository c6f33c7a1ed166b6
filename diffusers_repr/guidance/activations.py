"""`steer`: towards a class, by moving a U-Net's activations along the gradient of its own classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture.capture import after_breaking_off, is_breaking_off
from diffusers_repr.capture.gradient import frozen, half_scale, refuse_inference_mode, refuse_swapped_weights
from diffusers_repr.capture.unet_halves import bottleneck
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.guidance.base import check_finite

NORMALIZATIONS = ("none", "relative")

# (hidden, skips, timestep) -> logits (B, K)
ActivationClassifier = Callable[[Tensor, Sequence[Tensor], Any], Tensor]


class Steering:
    """What `steer` yields.

    Attributes:
        scale: Of the move; may be set between two calls of the network.
        calls: How often the network was steered.
    """

    def __init__(self, scale: float) -> None:
        self.scale, self.calls = scale, 0


@contextmanager
def steer(
    unet: nn.Module,
    classifier: ActivationClassifier,
    class_labels: Tensor,
    scale: float,
    normalization: str = "none",
) -> Iterator[Steering]:
    """Inside, every call of the network is guided by the classifier of its activations.

    The sampling of JDM (Deja et al. 2023, arXiv 2301.13622, section 4.3), for any sampler. Between encoder and decoder
    each activation `a` moves to `a + scale d CE / d a`. The derivative is the total one, through the deeper layers
    too: the first skips carry the noisy image, and moving them up the cross-entropy adds to the noise that is found
    in it, which is then taken away. The derivative of the classifier's own inputs alone has the wrong sign.

    Calls of this thread are steered, those of others are as ever.

    One pass and one backward pass through the encoder for each call, which gets no gradient; parameters are frozen
    and the classifier is in eval mode meanwhile. With scale 0 the call is bit-equal to one without.

    Args:
        unet: A `UNet2DModel` without classes.
        classifier: `(hidden, skips, timestep) -> logits (B, K)`, such as a `JointHead`.
        class_labels: The class of each row of a call, `(B,)`.
        scale: Of the move. Towards the class above 0, away from it below.
        normalization: `none`, as the paper; `relative`: scale times the length of a sample's activations is how far
            they move, all together, whatever the length of the gradient.

    Yields:
        A `Steering`, whose scale may be changed.

    Raises:
        TypeError: For a network that is no `UNet2DModel`.
        ValueError: For an unknown normalisation, an infinite scale, weights that move while the network runs; in a
            call, for another number of rows than of labels.
        RuntimeError: For a compiled network, and in inference mode; at the end, if the network was never called.
    """
    check_finite("scale", scale)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r}; it is one of {', '.join(NORMALIZATIONS)}.")
    refuse_swapped_weights(unet)
    steering = Steering(scale)
    with ExitStack() as stack:
        run = _Call(unet, classifier, class_labels, steering, normalization)
        stack.callback(run.end)
        hooks = Hooks(stack)
        hooks.before(unet, run.begin)
        stack.enter_context(bottleneck(unet, run.move))
        hooks.after(unet, lambda module, args, kwargs, output: run.end(), always_call=True)
        yield steering
        if steering.scale and not steering.calls:
            raise RuntimeError(f"Nothing was steered: this {type(unet).__name__} was not called inside the block.")


class _Call:
    """One call of the network: gradients are on up to the middle block."""

    def __init__(
        self,
        unet: nn.Module,
        classifier: ActivationClassifier,
        labels: Tensor,
        steering: Steering,
        normalization: str,
    ) -> None:
        self.unet, self.classifier, self.labels = unet, classifier, labels
        self.steering, self.relative = steering, normalization == "relative"
        self._undo = ExitStack()
        self._on, self._timestep = False, None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The network's hook, before it runs."""
        self.end()
        if not self.steering.scale:
            return None
        refuse_inference_mode()
        given = {**dict(zip(("sample", "timestep", "class_labels", "return_dict"), args, strict=False)), **kwargs}
        sample, self._timestep = given["sample"], given["timestep"]
        if len(self.labels) != len(sample):
            raise ValueError(
                f"The network is called with {len(sample)} rows and steered to {len(self.labels)} class_labels; give "
                "one for each row."
            )
        modules = [part for part in (self.unet, self.classifier) if isinstance(part, nn.Module)]
        with ExitStack() as undo:
            undo.enter_context(frozen(*modules))
            undo.enter_context(eval_mode(*modules[1:]))
            undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            torch.set_grad_enabled(True)
            self._undo, self._on = undo.pop_all(), True
        if is_breaking_off(module):
            after_breaking_off(self.end)
        return (), {**given, "sample": sample.detach().clone().requires_grad_(True)}

    def move(self, hidden: Tensor, skips: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]] | None:
        """What the decoder gets."""
        if not self._on:
            return None
        parts = [hidden, *skips]
        gradients = total_gradients(self.classifier, parts, self._timestep, self.labels)
        torch.set_grad_enabled(False)
        scale: Tensor | float = self.steering.scale
        if self.relative:
            length = _norm(gradients)
            scale = scale * _norm(parts) / torch.where(length > 0, length, 1.0)
        moved = [_moved(part, gradient, scale) for part, gradient in zip(parts, gradients, strict=True)]
        self.steering.calls += 1
        return moved[0], moved[1:]

    def end(self) -> None:
        """Gradient mode and flags as they were."""
        self._on, self._timestep = False, None
        self._undo.close()


def total_gradients(
    classifier: ActivationClassifier, activations: Sequence[Tensor], timestep: Any, labels: Tensor
) -> list[Tensor]:
    """`d CE / d a` of each activation, summed over samples, also by way of the activations that it leads to.

    The chain rule in two parts: through the classifier in float32 or wider, then through the network in its own dtype.

    Args:
        classifier: `(hidden, skips, timestep) -> logits (B, K)`.
        activations: The middle block's output and the skips, in one graph.
        timestep: What the network was called with.
        labels: `(B,)`.

    Returns:
        In the shapes of the activations, float32 or wider.

    Raises:
        ValueError: For labels that the classifier does not have.
    """
    wide = [torch.promote_types(part.dtype, torch.float32) for part in activations]
    leaves = [part.detach().to(kind).requires_grad_(True) for part, kind in zip(activations, wide, strict=True)]
    logits = classifier(leaves[0], leaves[1:], timestep)
    if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        raise ValueError(f"class_labels must lie in 0..{logits.shape[1] - 1}; got {labels.tolist()}.")
    direct = torch.autograd.grad(F.cross_entropy(logits, labels.to(logits.device), reduction="sum"), leaves)
    through = [(part, gradient) for part, gradient in zip(activations, direct, strict=True)]
    scale = half_scale(through)
    seeds = [(scale * gradient).to(part.dtype) for part, gradient in through]
    total = torch.autograd.grad(list(activations), list(activations), seeds)
    return [gradient.to(kind) / scale for gradient, kind in zip(total, wide, strict=True)]


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """Length of all of a sample's values together, `(B,)`."""
    return torch.stack([part.float().flatten(1).square().sum(1) for part in parts]).sum(0).sqrt()


def _moved(part: Tensor, gradient: Tensor, scale: Tensor | float) -> Tensor:
    if isinstance(scale, Tensor):
        scale = scale.view(-1, *[1] * (part.ndim - 1)).to(gradient.dtype)
    return (part.detach() + scale * gradient).to(part.dtype)


__all__ = ["NORMALIZATIONS", "ActivationClassifier", "Steering", "steer", "total_gradients"]
