"""`EnergyGuidance`: the gradient of any function of features, the estimate of the clean data and the condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch, without_rows
from diffusers_repr.capture.gradient import check_checkpointing, refuse_swapped_weights
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import GradientRequest, Guidance, GuidanceTerm

UPDATES = ("eps", "latent_sign", "latent_adam")

# (layer path -> map, x0, network inputs of the conditional rows) -> loss
Energy = Callable[[Mapping[str, Tensor], Tensor | None, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class EnergyGuidance(Guidance):
    """Guidance towards low values of a differentiable function of your own.

    At each noise level the score becomes that of `p(x_t) exp(-scale energy(x_t))`; samples of a law of that form are
    not promised (see `ClassifierGuidance`).

    With g the gradient of the energy with respect to what the network takes, for the conditional rows:

    - `update="eps"`: `eps + scale sigma g` (Dhariwal and Nichol 2021, arXiv 2105.05233, algorithm 2, for any energy).
      Classifier-free guidance adds to it unscaled. One backward pass and no further network pass.
    - `"latent_sign"`: before the step `x_t - scale sign(g)`; the network then runs on the moved input.
    - `"latent_adam"`: the first step of a fresh Adam with rate `scale`, `x_t - scale g / (|g| + 1e-8)`; the step of
      Readout Guidance (Luo et al. 2024, arXiv 2312.02150, whose code sums the gradients of both conditions). Both do
      not depend on the size of the energy. They cost one more pass, which stops after the last layer. A sampler that
      calls the network twice a step (Heun, KDPM2) goes on from the first call's latents: a move at the second one
      changes the slope alone.

    Parameters are frozen meanwhile and nothing accumulates in `.grad`; a network in float16 is differentiated in
    float16, the energy itself in float32.

    Attributes:
        fn: `fn(features, x0, condition) -> loss`, a scalar (summed over samples) or one number a sample `(B,)`.
            `features`: layer path -> map `(B, C, h, w)`, tokens turned into maps, what is no image as it is; `x0`:
            the estimate of the clean data `(B, C, H, W)` under the condition, or None; both float32 or wider.
            `condition`: the network's keyword inputs for these rows, the timestep and the noisy input (with its
            gradient) among them. A module is frozen and in eval mode meanwhile.
        layers: Exact module paths that it reads; the forward is differentiated no further than the last of them.
        x0: Whether it reads the estimate, which takes the gradient through the whole network; None: if there are no
            layers. False without layers is an energy of the noisy input alone, for which the network does not run.
        update: What is done with the gradient.
        checkpoint: Recompute activations in the backward pass: less memory, one forward more.

    Example:
        >>> def darker(features, x0, condition):
        ...     return x0.square().mean((1, 2, 3))
        >>> EnergyGuidance(darker, scale=20.0, interval=(200, 900)).update
        'eps'
    """

    fn: Energy = field(repr=False)
    layers: str | Sequence[str] = ()
    x0: bool | None = None
    update: str = "eps"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise TypeError(f"EnergyGuidance takes a function fn(features, x0, condition); got {self.fn!r}.")
        if isinstance(self.layers, (str, list)):
            object.__setattr__(self, "layers", (self.layers,) if isinstance(self.layers, str) else tuple(self.layers))
        check_update(self.update)

    def bind(self, denoiser: Denoiser) -> EnergyTerm:
        """Ready for a model.

        Raises:
            TypeError: For layers that are no paths.
            ValueError: For layers that do not exist, and checkpointing that the model lacks.
        """

        def loss(features: Mapping[str, Tensor], x0: Tensor | None, call: NetworkCall, x: Tensor) -> Tensor:
            return self.fn(features, x0, conditional_inputs(denoiser, call, x))

        paths = tuple(check_layers(denoiser.model, self.layers)) if self.layers != () else ()
        request = GradientRequest(
            loss,
            paths,
            needs_x0=not paths if self.x0 is None else self.x0,
            update=self.update,
            checkpoint=self.checkpoint,
            modules=(self.fn,) if isinstance(self.fn, nn.Module) else (),
        )
        return EnergyTerm(self, denoiser, request)


class EnergyTerm(GuidanceTerm):
    """The gradient of an energy, as a correction of eps or a step on the latents. The engine computes it.

    Args:
        config: Settings: scale, interval, adaptive.
        denoiser: The model.
        request: The energy and what it reads.

    Raises:
        TypeError: For layers that are no paths.
        ValueError: For layers that do not exist, an unknown update, checkpointing without a network that can, and
            weights that move while the network runs.
    """

    def __init__(self, config: Guidance, denoiser: Denoiser, request: GradientRequest) -> None:
        super().__init__(config, denoiser)
        check_update(request.update)
        if request.update == "eps" and (request.both or request.steps > 1):
            raise ValueError(
                f"{self.label}: published=True and steps= are of steps on the latents, not of update='eps'."
            )
        if request.layers:
            check_layers(denoiser.model, request.layers)
        if request.reads_network:
            refuse_swapped_weights(denoiser.model)
        if request.checkpoint:
            check_checkpointing(denoiser.model)
            if not request.reads_network:
                raise ValueError(f"{self.label} does not run the network; leave checkpoint=False.")
        self.gradient = request


def conditional_inputs(denoiser: Denoiser, call: NetworkCall, x: Tensor) -> dict[str, Any]:
    """Keyword inputs of the network for the conditional rows of a call, made from `x`."""
    family = denoiser.family
    inputs = index_batch(call.inputs, call.rows, call.batch.cond, without_rows(family))
    return family.with_sample(inputs, x)


def check_update(update: str) -> None:
    """Raise ValueError unless `update` is one of `UPDATES`."""
    if update not in UPDATES:
        raise ValueError(f"update={update!r}; it is one of {', '.join(UPDATES)}.")
