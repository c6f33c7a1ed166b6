"""JDM: a classifier on the encoder of the U-Net that denoises."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffusers_repr.capture.unet_halves import bottleneck, encode_partial
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.heads.joint import JointHead
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact
from diffusers_repr.objectives.joint.objective import JointObjective
from diffusers_repr.objectives.noisy import NoisyBatch


class JDMObjective(JointObjective):
    """Joint diffusion model (Deja et al. 2023, arXiv 2301.13622): `MSE(eps) + 0.001 CE`, one encoder for both.

    The classifier reads the activations of x_0 at the lowest noise level, in a pass that ends behind the middle block
    (on `UNet2DModel`s about a third of a forward); with `classify="noised"` those of x_t in the pass that denoises it,
    at no cost. A classifier of x_t guides samples better, one of x_0 classifies images better.

    The paper's commands train a U-Net with dropout 0.3 (`UNet2DModel(dropout=0.3)`), which acts on both losses.

    Args:
        denoiser: Of a `UNet2DModel` without classes.
        head: Its classifier, `JointHead.for_unet(unet, num_classes)`. If it is the `classifier` of the denoiser's
            pipeline, it is saved in this; else under `heads/classifier`.
        classification_weight: Of the cross-entropy; 0.001 in the paper's code. The digits like 0.1.
        **settings: Of `JointObjective`: `classify`, `label_smoothing`, augmentation, `time_sampling`.

    Raises:
        TypeError: For a network without the two halves of a U-Net.
        ValueError: As `JointObjective`.
    """

    def __init__(
        self, denoiser: Denoiser, head: JointHead, *, classification_weight: float = 0.001, **settings: Any
    ) -> None:
        super().__init__(denoiser, classification_weight=classification_weight, **settings)
        with bottleneck(self.network, lambda hidden, skips: None):
            pass  # refuses networks that have no encoder and decoder
        for name, part in list(self.frozen.items()):
            if part is head:  # a component of the pipeline, and trained
                del self.frozen[name]
        self.head = head.requires_grad_(True)

    @property
    def classes(self) -> int:
        """Of the head."""
        return int(self.head.config["num_classes"])

    def denoise_and_classify(self, noisy: NoisyBatch) -> tuple[Tensor, Tensor]:
        """One pass: the head reads the activations on their way to the decoder."""
        logits: list[Tensor] = []
        timestep = self.denoiser.family.timestep(noisy.level, noisy.x_t)

        def read(hidden: Tensor, skips: tuple[Tensor, ...]) -> None:
            logits.append(self.head(hidden, skips, timestep))

        with bottleneck(self.network, read):
            prediction = self.predict(noisy)
        return prediction, logits[0]

    def classify_clean(self, x0: Tensor) -> Tensor:
        """The encoder alone, at the lowest noise level."""
        inputs = clean_inputs(self.denoiser, x0.to(floating_dtype(self.network)))
        # A sharded network prepares its backward pass at the end of the forward.
        whole = any(cls.__name__.startswith("FSDP") for cls in type(self.network).__mro__)
        found = encode_partial(self.network, **inputs, stop_early=not whole)
        return self.head(found.hidden, found.skips, inputs["timestep"])

    def trained_components(self) -> dict[str, ModelArtifact]:
        """The network, and the head if the pipeline has a place for it."""
        own = {} if self._place is None else {self._place: ModelArtifact(self.head, "head")}
        return {**super().trained_components(), **own}

    def artifacts(self) -> list[Artifact]:
        """The pipeline, and the head where that has no place for it."""
        apart = [ModelArtifact(self.head, "head", folder="heads/classifier")] if self._place is None else []
        return [*super().artifacts(), *apart]

    @property
    def _place(self) -> str | None:
        """Name of the head among the pipeline's components."""
        components = {} if self.denoiser.pipe is None else self.denoiser.pipe.components
        return next((name for name, part in components.items() if part is self.head), None)


def clean_inputs(denoiser: Denoiser, x0: Tensor) -> dict[str, Any]:
    """Inputs of the network for data without noise, at the lowest noise level that it knows.

    Args:
        denoiser: Of any noise process.
        x0: `(B, C, H, W)`.
    """
    level = denoiser.level(denoiser.schedule.timestep_range[0])
    # 1 within 5e-5, but for EDM, which scales what its network takes.
    return denoiser.network_inputs(x0 * float(level.alpha), level, {})


__all__ = ["JDMObjective", "clean_inputs"]
