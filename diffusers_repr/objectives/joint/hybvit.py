"""HybViT: one vision transformer that classifies clean images and denoises noisy ones."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.objectives.joint.objective import JointObjective
from diffusers_repr.objectives.noisy import NoisyBatch


class HybViTObjective(JointObjective):
    """`CE + 100 L_simple` of a `JointViTModel` (Yang et al. 2022, HybViT, arXiv 2208.07791).

    Clean images pass without a timestep, noisy ones with theirs: two passes a step. The paper writes a squared error;
    its code trains the absolute one, on a cosine schedule (`DDPMScheduler(beta_schedule="squaredcos_cap_v2")`).

    Args:
        denoiser: Of a `JointViTModel` with classes.
        classification_weight: Of the cross-entropy.
        generation_weight: Of the denoising loss.
        loss: `l1`, as the code, or `l2`.
        label_smoothing: As the code; share of the target that is spread over all classes.
        **settings: Of `JointObjective`: `classify="both"` (not of the paper: a cross-entropy of x_t too, in the pass
            that denoises it, so that the classifier can guide it), `mixup`, augmentation, `time_sampling`.

    Raises:
        TypeError: For another network.
        ValueError: As `JointObjective`; for a network without classes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        classification_weight: float = 1.0,
        generation_weight: float = 100.0,
        loss: Literal["l1", "l2"] = "l1",
        label_smoothing: float = 0.1,
        **settings: Any,
    ) -> None:
        if settings.get("classify") == "noised":
            raise ValueError("HybViT classifies clean images, without a timestep: classify='clean' or 'both'.")
        if type(denoiser.model).__name__ != "JointViTModel":
            raise TypeError(
                f"HybViT trains a JointViTModel; got {type(denoiser.model).__name__}. For a UNet2DModel take "
                "JDMObjective."
            )
        if not denoiser.config["num_classes"]:
            raise ValueError("This JointViTModel has no classes (num_classes=0): nothing to classify.")
        super().__init__(
            denoiser,
            classification_weight=classification_weight,
            generation_weight=generation_weight,
            loss=loss,
            label_smoothing=label_smoothing,
            **settings,
        )

    @property
    def classes(self) -> int:
        """Of the network."""
        return int(self.denoiser.config["num_classes"])

    def denoise_and_classify(self, noisy: NoisyBatch) -> tuple[Tensor, Tensor]:
        """One pass with the timestep."""
        x_t = noisy.x_t.to(floating_dtype(self.network))
        out = self.network(**self.denoiser.network_inputs(x_t, noisy.level, noisy.condition))
        return out.sample.float(), out.logits.float()

    def classify_clean(self, x0: Tensor) -> Tensor:
        """A pass without a timestep."""
        return self.network(x0.to(floating_dtype(self.network))).logits.float()


__all__ = ["HybViTObjective"]
